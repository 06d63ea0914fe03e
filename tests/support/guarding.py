"""Indexes that can or cannot be the guard (it prevents a second active purchase of a pair)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import psycopg
import pytest

from outbox_worker.database.engine import Database
from outbox_worker.schema.tables import Tables
from outbox_worker.store.guard import GuardState, probe_guard
from tests.support.factories import Payment, ProbedProcessor, Shop
from tests.support.makers import Connect

SOUND = "CREATE UNIQUE INDEX sound ON purchases (student_id, course_id) WHERE is_active"

FULL = "CREATE UNIQUE INDEX guard ON purchases (student_id, course_id)"

DEFERRABLE = "ALTER TABLE purchases ADD CONSTRAINT guard UNIQUE (student_id, course_id) DEFERRABLE"

without_index = pytest.mark.parametrize("guard_kind", ["lock"], indirect=True)


def probe(database: Database, tables: Tables) -> GuardState:
    with database.transaction() as session:
        return probe_guard(session, tables.purchases)


def fallbacks(processor: ProbedProcessor) -> float:
    return processor.telemetry.metrics.snapshot()["outbox_constraint_fallback_total"]


def transactions(processor: ProbedProcessor) -> dict[str, float]:
    snapshot = processor.telemetry.metrics.snapshot()
    start = 'outbox_transactions_total{result="'
    return {name.removeprefix(start).rstrip('"}'): value for name, value in snapshot.items() if name.startswith(start)}


def pay_twice(shop: Shop) -> tuple[Payment, UUID, Payment, UUID]:
    """Write two payments of one pair. The event of the first payment is older."""
    first, event = shop.paid()
    second, later = shop.paid(student=first.student_id, course=first.course_id)
    return first, event, second, later


def leave_invalid_index(shop: Shop, connect: Connect, pool: ThreadPoolExecutor) -> None:
    """Leave an INVALID index that still enforces uniqueness, like a cancelled CREATE UNIQUE INDEX
    CONCURRENTLY."""
    old, builder = connect(), connect(autocommit=True)
    old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    old.execute("SELECT count(*) FROM outbox")
    building = pool.submit(
        builder.execute,
        "CREATE UNIQUE INDEX CONCURRENTLY leftover ON purchases (student_id, course_id) WHERE is_active",
    )
    turn = threading.Event()
    while not shop.scalar("SELECT count(*) FROM pg_index WHERE indexrelid = to_regclass('leftover') AND indisready"):
        assert not building.done(), building.exception()
        turn.wait(0.01)
    builder.cancel()
    with pytest.raises(psycopg.errors.QueryCanceled):
        building.result()
    old.rollback()
    assert shop.rows("SELECT indisvalid, indisready FROM pg_index WHERE indexrelid = 'leftover'::regclass") == [
        (False, True)
    ]
