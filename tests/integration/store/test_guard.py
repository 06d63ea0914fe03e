"""The guard: which one is in force, what happens if it changed unseen, and the lock of a pair."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from sqlalchemy import event as listener

from outbox_worker.database.engine import Database
from outbox_worker.model import Guard, Outcome
from outbox_worker.schema.tables import PAIR_INDEX, Tables
from outbox_worker.store.guard import GuardState, GuardWatch
from tests.support.factories import Shop, drain_all
from tests.support.guarding import (
    DEFERRABLE,
    FULL,
    SOUND,
    fallbacks,
    leave_invalid_index,
    pay_twice,
    transactions,
    without_index,
)
from tests.support.makers import Connect, MakeProcessor

GATE = 4242
"""Key of the advisory lock at which ``gate`` stops a worker's insert."""


class Gate:
    """Stop the worker's next insert into ``purchases`` inside the statement, after its snapshot."""

    def __init__(self, shop: Shop, holder: psycopg.Connection[Any]) -> None:
        self._shop, self._holder = shop, holder
        shop.rows(
            f"""
            CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF current_setting('application_name') = 'outbox-worker' THEN
                    PERFORM pg_advisory_xact_lock_shared({GATE});
                END IF;
                RETURN NEW;
            END $$
            """
        )
        shop.rows("CREATE TRIGGER gate BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION wait_at_gate()")
        holder.execute("SELECT pg_advisory_lock(%s)", [GATE])

    def wait_until_reached(self) -> None:
        turn = threading.Event()
        for _ in range(500):
            if self._shop.scalar(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                GATE,
            ):
                return
            turn.wait(0.01)
        raise AssertionError("nobody came to the gate")

    def open(self) -> None:
        self._holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])


@pytest.fixture
def gate(shop: Shop, connect: Connect) -> Gate:
    return Gate(shop, connect(autocommit=True))


# --- the index vanishes and is created again


def test_a_batch_that_trips_over_a_dropped_index_is_settled_by_the_lock(
    shop: Shop, make_processor: MakeProcessor, records: list[dict[str, Any]]
) -> None:
    processor = make_processor()
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    first, _, _, _ = pay_twice(shop)
    recovered, event = shop.paid()
    shop.mark(event, "created", recovered.id)
    shop.pay_many(20)
    assert processor.watch.state.guard is Guard.INDEX
    report = processor.process_batch()
    assert report.outcomes() == {Outcome.CREATED: 21, Outcome.DUPLICATE_PAYMENT: 1, Outcome.RECOVERED: 1}
    assert (report.guard, len(report.batch)) == (Guard.LOCK, 23)
    assert transactions(processor) == {"commit": 1.0}
    assert fallbacks(processor) == 1
    assert shop.count("outbox") == 0
    assert len(shop.purchases(first.pair)) == 1
    assert [each["guard"] for each in records if each.get("event") == "guard_changed"] == ["index", "lock"]


def test_the_guard_is_believed_until_the_next_probe_and_told_once_per_change(
    shop: Shop, database: Database, make_processor: MakeProcessor, records: list[dict[str, Any]]
) -> None:
    processor = make_processor()
    watch = processor.watch

    def settle() -> Guard:
        pay_twice(shop)
        report = processor.process_batch()
        assert report.outcomes() == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
        return report.guard

    def probe_again() -> Guard:
        with database.transaction() as session:
            return watch.probe(session).guard

    assert (settle(), fallbacks(processor)) == (Guard.INDEX, 0)
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    assert (settle(), watch.state.guard, fallbacks(processor)) == (Guard.LOCK, Guard.LOCK, 1)
    assert (settle(), fallbacks(processor)) == (Guard.LOCK, 1 + 2), "a fast transaction and a careful one"
    assert probe_again() is Guard.LOCK
    shop.rows(SOUND)
    assert (settle(), fallbacks(processor)) == (Guard.LOCK, 1 + 2 + 2)
    assert probe_again() is Guard.INDEX
    assert probe_again() is Guard.INDEX
    assert (settle(), fallbacks(processor)) == (Guard.INDEX, 5)
    told = [each["guard"] for each in records if each.get("event") == "guard_changed"]
    assert told == ["index", "lock", "index"]
    logged = [each for each in records if each.get("event") == "constraint_fallback"]
    assert len(logged) == 5
    metrics = processor.telemetry.metrics
    assert metrics.registry.get_sample_value("outbox_guard", {"mode": "index"}) == 1
    assert metrics.registry.get_sample_value("outbox_guard", {"mode": "lock"}) == 0
    assert shop.doubled() == 0


def test_an_index_that_becomes_deferrable_is_left_for_the_lock(
    shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """ON CONFLICT then raises 42P10 or 55000.

    Both errors are the guard's fault, never an event's.
    """
    processor = make_processor()
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    shop.rows(f"{DEFERRABLE} INITIALLY DEFERRED")
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert processor.watch.state.guard is Guard.LOCK
    with database.transaction() as session:
        assert processor.watch.probe(session).guard is Guard.LOCK


def test_a_predicate_that_changes_its_form_costs_one_batch(
    shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """`is_active` infers an index on `(is_active = true)` too, but not one on `IS TRUE`."""
    processor = make_processor()
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    shop.rows("CREATE UNIQUE INDEX other ON purchases (student_id, course_id) WHERE is_active IS TRUE")
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert fallbacks(processor) == 1
    with database.transaction() as session:
        assert processor.watch.probe(session) == GuardState(
            Guard.INDEX, "(is_active IS TRUE)", processor.watch.state.lock_capacity
        )


def test_a_watch_asks_once_and_then_only_whether_an_index_has_changed(
    shop: Shop, database: Database, tables: Tables
) -> None:
    """Idle workers look at the guard every few seconds."""
    watch = GuardWatch(tables.purchases, lambda _: None)
    asked: list[str] = []
    listener.listen(database.engine, "before_cursor_execute", lambda *event: asked.append(event[2]))

    def probe() -> tuple[Guard, int]:
        with database.transaction() as session:
            del asked[:]
            return watch.probe(session).guard, len(asked)

    assert probe()[0] is Guard.INDEX
    assert probe() == (Guard.INDEX, 1)
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    assert probe()[0] is Guard.LOCK
    assert probe() == (Guard.LOCK, 1)
    shop.rows(SOUND)
    assert probe()[0] is Guard.INDEX
    watch.fall_back()
    assert probe()[0] is Guard.INDEX, "a belief that failed is asked about anew, whatever the catalogue says"
    shop.rows("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'sound'::regclass")
    assert probe()[0] is Guard.LOCK


def test_the_watch_tells_of_the_first_state_and_of_changes_only(shop: Shop, database: Database, tables: Tables) -> None:
    told: list[Guard] = []
    watch = GuardWatch(tables.purchases, told.append)
    assert watch.state.guard is Guard.LOCK
    with database.transaction() as session:
        watch.probe(session)
        watch.probe(session)
    assert told == [Guard.INDEX]
    capacity = watch.state.lock_capacity
    lost = GuardState(Guard.LOCK, lock_capacity=capacity, has_index_paths=False)
    assert watch.fall_back() == watch.fall_back() == lost
    assert told == [Guard.INDEX, Guard.LOCK]
    assert capacity > 1
    assert shop.scalar("SELECT 1") == 1


# --- another writer was first


@without_index
def test_a_writer_that_skips_the_lock_is_read_back_not_rejected(
    guard_kind: str,
    shop: Shop,
    connect: Connect,
    pool: ThreadPoolExecutor,
    make_processor: MakeProcessor,
    request: pytest.FixtureRequest,
) -> None:
    """The pair becomes active between look and insert. The enforcing index answers 23505."""
    assert guard_kind == "lock"
    leave_invalid_index(shop, connect, pool)
    payment, event = shop.paid()
    others = [shop.paid()[0] for _ in range(5)]
    gate: Gate = request.getfixturevalue("gate")
    processor = make_processor()
    settling: Future[Any] = pool.submit(processor.process_batch)
    gate.wait_until_reached()
    shop.purchase(student=payment.student_id, course=payment.course_id)
    gate.open()
    assert settling.result().outcomes() == {Outcome.CREATED: 5, Outcome.DUPLICATE_PAYMENT: 1}
    assert shop.outcome_of(event) == "duplicate_payment"
    assert shop.count("dead_letters") == 0
    assert shop.purchases(payment) == []
    assert all(len(shop.purchases(other)) == 1 for other in others)


def test_under_the_index_a_foreign_purchase_makes_a_duplicate(
    shop: Shop, gate: Gate, pool: ThreadPoolExecutor, make_processor: MakeProcessor
) -> None:
    payment, event = shop.paid()
    shop.paid()
    processor = make_processor()
    settling = pool.submit(processor.process_batch)
    gate.wait_until_reached()
    shop.purchase(student=payment.student_id, course=payment.course_id)
    gate.open()
    assert settling.result().outcomes() == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert shop.outcome_of(event) == "duplicate_payment"


@pytest.mark.parametrize(("active", "outcome"), [(True, "already_exists"), (False, "suppressed")])
def test_a_foreign_purchase_of_the_same_payment_is_read_back(
    both_guards: str,
    active: bool,
    outcome: str,
    shop: Shop,
    gate: Gate,
    pool: ThreadPoolExecutor,
    make_processor: MakeProcessor,
) -> None:
    """The unique index on payment_id answers 23505. That index is no guard."""
    payment, event = shop.paid()
    other, _ = shop.paid()
    processor = make_processor()
    assert processor.watch.state.guard == both_guards
    settling = pool.submit(processor.process_batch)
    gate.wait_until_reached()
    shop.purchase(payment, active=active)
    gate.open()
    assert settling.result().outcomes() == {Outcome.CREATED: 1, Outcome(outcome): 1}
    assert shop.outcome_of(event) == outcome
    assert [row.is_active for row in shop.purchases(payment)] == [active]
    assert len(shop.purchases(other)) == 1
    assert processor.watch.state.guard == both_guards


@without_index
@pytest.mark.parametrize("index", [FULL, DEFERRABLE, f"{DEFERRABLE} INITIALLY DEFERRED"])
def test_an_inactive_row_in_a_full_unique_index_is_the_events_own_trouble(
    guard_kind: str, index: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    """Some of these constraints refuse the row only at COMMIT.

    The other events of the batch are settled.
    """
    assert guard_kind == "lock"
    shop.rows(index)
    payment, event = shop.paid()
    shop.purchase(student=payment.student_id, course=payment.course_id, active=False)
    shop.pay_many(9)
    processor = make_processor()
    report = processor.process_batch()
    assert report.outcomes() == {Outcome.CREATED: 9, Outcome.RETRIED: 1}
    left = shop.event(event)
    assert left.attempts == 1
    assert left.last_error.startswith("rejected_by_database: ")
    assert "23505" in left.last_error
    shop.rows("UPDATE outbox SET attempts = 9, due_at = clock_timestamp()")
    assert drain_all(processor) == {Outcome.DEAD: 1}
    assert (shop.letter_of(event).reason, shop.letter_of(event).attempts) == ("rejected_by_database", 10)
