"""Databases under migration: empty, or migrated with or without rows."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from tests.support import servers
from tests.support.factories import Shop
from tests.support.installations import SHOPS_PURCHASES, Installation


@pytest.fixture
def make_site(
    make_url: Callable[[str | None], str], request: pytest.FixtureRequest
) -> Callable[[str | None], Installation]:
    def make(template: str | None) -> Installation:
        url = make_url(template)
        connection = psycopg.connect(servers.libpq(url), autocommit=True)
        request.addfinalizer(connection.close)
        return Installation(url, connection)

    return make


@pytest.fixture
def empty(make_site: Callable[[str | None], Installation]) -> Installation:
    """Make a database without a table."""
    return make_site(None)


@pytest.fixture
def migrated(make_site: Callable[[str | None], Installation]) -> Installation:
    """Make a database at core@head, without an option."""
    return make_site("lock")


@pytest.fixture
def stock(migrated: Installation) -> Shop:
    """Return a shop that writes rows to the migrated database."""
    return Shop(migrated.connection)


@pytest.fixture
def adopting(empty: Installation) -> Installation:
    """Make a database in which another application created ``purchases``."""
    empty.execute(SHOPS_PURCHASES)
    return empty
