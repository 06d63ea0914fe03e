"""Any role can see which transaction holds the vacuum horizon, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from outbox_worker.daemon.horizon import HorizonWatch
from outbox_worker.daemon.signals import Signals
from outbox_worker.daemon.worker import Worker
from outbox_worker.database.engine import Database
from outbox_worker.settings import Settings
from tests.support import servers
from tests.support.factories import Shop

HOLDERS = {
    "a snapshot": ("REPEATABLE READ, READ ONLY", "SELECT 1"),
    "a write": ("READ COMMITTED", "SELECT pg_current_xact_id()"),
}


@pytest.fixture
def look(shop: Shop, database: Database) -> Callable[[], float]:
    """Make the watch of a role that cannot see other sessions. A write precedes each look."""
    watch, role = HorizonWatch(), shop.scalar("SELECT 'watcher_' || replace(gen_random_uuid()::text, '-', '')")
    shop.rows(f"CREATE ROLE {role}")

    def seconds() -> float:
        shop.pay_many(1)
        with database.transaction() as session:
            session.execute(text(f"SET LOCAL ROLE {role}"))
            return watch.stood_still_seconds(session)

    return seconds


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_transaction_that_holds_the_horizon_is_seen_until_it_ends(
    look: Callable[[], float], connect: Callable[..., psycopg.Connection[Any]], holder: str
) -> None:
    isolation, statement = HOLDERS[holder]
    holding = connect(autocommit=True)
    assert look() == look() == 0, "nothing holds it"
    holding.execute(f"BEGIN ISOLATION LEVEL {isolation}")
    holding.execute(statement)
    assert look() == 0, "seen for the first time"
    seen = [look(), look()]
    assert 0 < seen[0] < seen[1]
    holding.execute("COMMIT")
    assert look() == look() == 0


def test_what_waits_in_another_database_holds_nothing(
    look: Callable[[], float], make_url: Callable[[str | None], str]
) -> None:
    with psycopg.connect(servers.libpq(make_url(None))) as elsewhere:
        elsewhere.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        elsewhere.execute("SELECT pg_current_xact_id()")
        assert look() == look() == look() == 0


def test_a_worker_looks_with_each_heartbeat(
    shop: Shop, settings: Settings, connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """The first look sees the transaction. The last look sees how long it has held the horizon."""
    holding = connect()
    holding.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    holding.execute("SELECT 1")
    shop.pay_many(3)
    worker = Worker(settings)
    with Signals() as signals:
        assert worker.drain(signals) == 0
    assert (worker.telemetry.metrics.registry.get_sample_value("outbox_vacuum_horizon_seconds") or 0) > 0
