"""Fixtures: an operator, and both orders in which a backfill can read payments."""

from __future__ import annotations

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from tests.support.backfilling import Operator
from tests.support.factories import Shop


@pytest.fixture
def operator(database: Database, tables: Tables, settings: Settings) -> Operator:
    return Operator(database, tables, settings)


@pytest.fixture(params=["id", "created_at"])
def order(request: pytest.FixtureRequest, shop: Shop) -> str:
    if request.param == "created_at":
        shop.rows("CREATE INDEX ON payments (created_at, id)")
    return str(request.param)
