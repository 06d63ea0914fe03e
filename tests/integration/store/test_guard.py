"""The guard: which one is in force, what happens when it is another than believed, and what the pair's lock is."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import bindparam, text
from sqlalchemy import event as listener
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import ProgrammingError

from outbox_worker.database import INDEX_PLANS, Database
from outbox_worker.decision import RetryPolicy
from outbox_worker.guard import GuardState, GuardWatch, probe_guard, relation_name
from outbox_worker.model import Guard, Outcome
from outbox_worker.schema import PAIR_INDEX, Tables, build_tables
from outbox_worker.settings import load_settings
from tests.support.factories import Payment, ProbedProcessor, Shop, drain_all, hold_pair
from tests.support.makers import MakeDatabase, MakeProcessor

Connect = Callable[..., psycopg.Connection[Any]]

SOUND = "CREATE UNIQUE INDEX sound ON purchases (student_id, course_id) WHERE is_active"
FULL = "CREATE UNIQUE INDEX guard ON purchases (student_id, course_id)"
DEFERRABLE = "ALTER TABLE purchases ADD CONSTRAINT guard UNIQUE (student_id, course_id) DEFERRABLE"
GATE = 4242
"""The advisory lock on which ``gate`` lets a worker's insert wait."""

without_index = pytest.mark.parametrize("guard_kind", ["lock"], indirect=True)


class Gate:
    """Stops the worker's next insert into ``purchases`` in the middle of the statement: its snapshot is taken then."""

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
    """Two payments of one pair, the first event older."""
    first, event = shop.paid(due_in="-2 seconds")
    second, later = shop.paid(student=first.student_id, course=first.course_id, due_in="-1 second")
    return first, event, second, later


def leave_invalid_index(shop: Shop, connect: Connect, pool: ThreadPoolExecutor) -> None:
    """What a time-out at the end of CREATE UNIQUE INDEX CONCURRENTLY leaves: INVALID, and yet it enforces."""
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


# --- the probe


SOUND_FORMS = {
    "plain": ("WHERE is_active", "is_active"),
    "seed": ("WHERE (is_active = true)", "(is_active = true)"),
    "is true": ("WHERE is_active IS TRUE", "(is_active IS TRUE)"),
    "include": ("INCLUDE (payment_id) WHERE is_active", "is_active"),
}
UNFIT = {
    "no index": [],
    "not unique": ["CREATE INDEX guard ON purchases (student_id, course_id) WHERE is_active"],
    "full": [FULL],
    "deferrable": [DEFERRABLE],
    "initially deferred": [f"{DEFERRABLE} INITIALLY DEFERRED"],
    "another predicate": [f"{SOUND} AND amount > 0"],
    "the inactive ones": ["CREATE UNIQUE INDEX guard ON purchases (student_id, course_id) WHERE NOT is_active"],
    "one column": ["CREATE UNIQUE INDEX guard ON purchases (student_id) WHERE is_active"],
    "three columns": ["CREATE UNIQUE INDEX guard ON purchases (student_id, course_id, amount) WHERE is_active"],
    "other columns": ["CREATE UNIQUE INDEX guard ON purchases (student_id, payment_id) WHERE is_active"],
    "an expression": ["CREATE UNIQUE INDEX guard ON purchases (student_id, CAST(course_id AS text)) WHERE is_active"],
    "another table": ["CREATE UNIQUE INDEX guard ON payments (student_id, course_id)"],
}


@without_index
@pytest.mark.parametrize("form", SOUND_FORMS)
def test_every_sound_form_is_the_guard_and_the_insert_infers_it(
    guard_kind: str, form: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    definition, predicate = SOUND_FORMS[form]
    shop.rows(f"CREATE UNIQUE INDEX guard ON purchases (student_id, course_id) {definition}")
    processor = make_processor()
    state = processor.watch.state
    assert (state.guard, state.predicate) == (Guard.INDEX, predicate)
    first, event, _, later = pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert (shop.outcome_of(event), shop.outcome_of(later)) == ("created", "duplicate_payment")
    assert [row.payment_id for row in shop.purchases(first.pair)] == [first.id]
    assert fallbacks(processor) == 0
    assert processor.watch.state is state


@without_index
@pytest.mark.parametrize("form", UNFIT)
def test_what_is_no_guard_leaves_the_lock_in_force(
    guard_kind: str, form: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    for statement in UNFIT[form]:
        shop.rows(statement)
    processor = make_processor()
    assert (processor.watch.state.guard, processor.watch.state.predicate) == (Guard.LOCK, "")
    if form in ("one column", "another table"):
        return  # these say more than "one active purchase a pair"; what they refuse is not the guard's matter
    first, event, _, later = pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert (shop.outcome_of(event), shop.outcome_of(later)) == ("created", "duplicate_payment")
    assert [row.payment_id for row in shop.purchases(first.pair)] == [first.id]
    assert fallbacks(processor) == 1


@without_index
def test_columns_in_the_other_order_are_the_same_guard(
    guard_kind: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    shop.rows("CREATE UNIQUE INDEX guard ON purchases (course_id, student_id) WHERE is_active")
    processor = make_processor()
    assert processor.watch.state.guard is Guard.INDEX
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert fallbacks(processor) == 0


@without_index
@pytest.mark.parametrize("unfit", [FULL, f"{SOUND.replace(' sound ', ' odd ')} AND amount > 0"])
def test_a_sound_index_counts_whatever_stands_beside_it(
    guard_kind: str, unfit: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    shop.rows(SOUND)
    shop.rows(unfit)
    processor = make_processor()
    assert processor.watch.state.guard is Guard.INDEX
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert processor.watch.state.guard is Guard.INDEX
    assert fallbacks(processor) == 0


@without_index
def test_a_deferrable_arbiter_beside_a_sound_index_spoils_it(
    guard_kind: str, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """The planner takes a full constraint as arbiter too; EXPLAIN is content, every execution raises 55000.

    A probe that believed EXPLAIN alone would find the index again after every batch that trips over it.
    """
    assert guard_kind == "lock"
    shop.rows(SOUND)
    shop.rows(DEFERRABLE)
    processor = make_processor()
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert processor.watch.state.guard is Guard.LOCK
    with database.transaction() as session:
        assert processor.watch.probe(session).guard is Guard.LOCK


@without_index
def test_an_index_that_failed_over_duplicates_is_no_guard(
    guard_kind: str, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    gift, twin = shop.purchase(), shop.payment()
    first, _ = shop.paid()
    row = shop.rows("SELECT student_id, course_id FROM purchases WHERE id = %s", gift)[0]
    shop.purchase(student=row.student_id, course=row.course_id)
    with pytest.raises(psycopg.errors.UniqueViolation):
        connect(autocommit=True).execute(
            "CREATE UNIQUE INDEX CONCURRENTLY guard ON purchases (student_id, course_id) WHERE is_active"
        )
    assert shop.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = 'guard'::regclass") is False
    shop.confirm(shop.payment(student=first.student_id, course=first.course_id))
    shop.confirm(twin)
    processor = make_processor()
    assert processor.watch.state.guard is Guard.LOCK
    assert drain_all(processor) == {Outcome.CREATED: 2, Outcome.DUPLICATE_PAYMENT: 1}
    assert len(shop.purchases(first.pair)) == 1


@without_index
def test_an_invalid_index_that_enforces_already_is_no_guard_but_is_obeyed(
    guard_kind: str,
    shop: Shop,
    connect: Connect,
    pool: ThreadPoolExecutor,
    database: Database,
    tables: Tables,
    make_processor: MakeProcessor,
) -> None:
    assert guard_kind == "lock"
    leave_invalid_index(shop, connect, pool)
    processor = make_processor()
    assert processor.watch.state.guard is Guard.LOCK
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    shop.rows("REINDEX INDEX CONCURRENTLY leftover")
    assert probe(database, tables).guard is Guard.INDEX


@without_index
@pytest.mark.parametrize("active", ["enabled", "is Active?", "select"])
@pytest.mark.parametrize("predicate", ["{}", "({} = true)", "{} IS TRUE"])
def test_an_index_on_renamed_columns(
    guard_kind: str, active: str, predicate: str, shop: Shop, database_url: str, make_database: MakeDatabase
) -> None:
    """The catalogue prints the user's own name, quoted where it must be; so do we."""
    assert guard_kind == "lock"
    names = {"student_id": "user_id", "course_id": "Course", "is_active": active}
    for column, name in names.items():
        shop.rows(f'ALTER TABLE purchases RENAME COLUMN {column} TO "{name}"')
    where = predicate.format(f'"{active}"')
    shop.rows(f'CREATE UNIQUE INDEX guard ON purchases (user_id, "Course") WHERE {where}')
    settings = load_settings(
        database_url=database_url, columns={f"purchases.{column}": name for column, name in names.items()}
    )
    tables = build_tables(settings)
    assert probe(make_database(), tables).guard is Guard.INDEX


def test_another_schemas_index_is_not_ours(shop: Shop, database_url: str, make_database: MakeDatabase) -> None:
    shop.rows("CREATE SCHEMA shop")
    shop.rows("CREATE TABLE shop.purchases (LIKE public.purchases)")
    tables = build_tables(load_settings(database_url=database_url, tables={"purchases": "shop.purchases"}))
    assert relation_name(tables.purchases) == "shop.purchases"
    assert probe(make_database(), tables).guard is Guard.LOCK


# --- an index that is there must never look as if it were not


def test_thirty_batches_on_one_connection_never_miss_the_index(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    """psycopg prepares after five executions, PostgreSQL plans generically after five more."""
    database = make_database(connections=1)
    processor = make_processor(database=database)
    for _ in range(30):
        shop.paid()
        pay_twice(shop)
        report = processor.process_batch()
        assert report.outcomes() == {Outcome.CREATED: 2, Outcome.DUPLICATE_PAYMENT: 1}
        assert report.guard is Guard.INDEX
    assert fallbacks(processor) == 0
    assert transactions(processor) == {"commit": 30.0}
    with database.transaction() as session:
        runs = session.execute(
            text(
                "SELECT generic_plans + custom_plans FROM pg_prepared_statements"
                " WHERE statement LIKE '%INSERT INTO public.purchases%ON CONFLICT%'"
            )
        ).scalars()
        assert max(runs, default=0) >= 20, "the insert was not prepared on this connection; the test proves nothing"


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan"])
def test_the_batch_insert_holds_under_a_generic_plan(
    mode: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    set_mode = f"ALTER DATABASE %I SET plan_cache_mode = {mode}"
    shop.rows(f"DO $$ BEGIN EXECUTE format('{set_mode}', current_database()); END $$")
    database = make_database(connections=1)
    processor = make_processor(database=database)
    for _ in range(26):
        pay_twice(shop)
        assert processor.process_batch().outcomes() == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert fallbacks(processor) == 0


def test_a_bound_predicate_would_be_caught_by_the_test_above(
    shop: Shop, tables: Tables, make_database: MakeDatabase
) -> None:
    """The statement that the product must not use: the same insert with its predicate as a parameter."""
    purchases = tables.purchases
    where = purchases.c.is_active == bindparam("active", True, literal_execute=False)
    statement = insert(purchases).on_conflict_do_nothing(
        index_elements=[purchases.c.student_id, purchases.c.course_id], index_where=where
    )
    database, failed_at = make_database(connections=1), 0
    for run in range(1, 26):
        row = dict(zip(("student_id", "course_id"), shop.payment().pair, strict=True))
        try:
            with database.transaction() as session:
                session.execute(statement, {**row, "amount": 1, "currency": "EUR", "is_active": True})
        except ProgrammingError as error:
            assert isinstance(error.orig, psycopg.errors.InvalidColumnReference)  # noqa: PT017 - the loop goes on else
            failed_at = run
            break
    assert 5 < failed_at <= 25


# --- the index vanishes and comes back


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
    assert (settle(), fallbacks(processor)) == (Guard.LOCK, 2)
    assert probe_again() is Guard.LOCK
    shop.rows(SOUND)
    assert (settle(), fallbacks(processor)) == (Guard.LOCK, 3)
    assert probe_again() is Guard.INDEX
    assert probe_again() is Guard.INDEX
    assert (settle(), fallbacks(processor)) == (Guard.INDEX, 3)
    told = [each["guard"] for each in records if each.get("event") == "guard_changed"]
    assert told == ["index", "lock", "index"]
    logged = [each for each in records if each.get("event") == "constraint_fallback"]
    assert len(logged) == 3
    metrics = processor.telemetry.metrics
    assert metrics.registry.get_sample_value("outbox_guard", {"mode": "index"}) == 1
    assert metrics.registry.get_sample_value("outbox_guard", {"mode": "lock"}) == 0
    assert shop.doubled() == 0


def test_an_index_that_becomes_deferrable_is_left_for_the_lock(
    shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """ON CONFLICT raises 42P10 or 55000 then; both are the guard's, never an event's."""
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
    """`is_active` infers `(is_active = true)` too, but not `IS TRUE`."""
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
    """Idle workers look every few seconds."""
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


# --- somebody else was first


@without_index
def test_a_writer_that_skips_the_lock_is_read_back_not_rejected(
    guard_kind: str,
    shop: Shop,
    connect: Connect,
    pool: ThreadPoolExecutor,
    make_processor: MakeProcessor,
    request: pytest.FixtureRequest,
) -> None:
    """The pair becomes active between look and insert; the enforcing index answers 23505."""
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
    """23505 on payment_id: the unique index that is no guard."""
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
    """Also where the constraint speaks only at COMMIT; the neighbours do not suffer."""
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


# --- many payments of one pair


@pytest.mark.parametrize("payments", [2, 7])
def test_payments_of_one_pair_in_one_batch(
    both_guards: str, payments: int, shop: Shop, make_processor: MakeProcessor
) -> None:
    """Exactly one is granted, the oldest event's; the others paid twice."""
    oldest, event = shop.paid(due_in="-1 hour")
    for _ in range(payments - 1):
        shop.paid(student=oldest.student_id, course=oldest.course_id)
    shop.pay_many(30)
    processor = make_processor()
    report = processor.process_batch()
    assert report.guard == both_guards
    assert report.outcomes() == {Outcome.CREATED: 31, Outcome.DUPLICATE_PAYMENT: payments - 1}
    assert [row.payment_id for row in shop.purchases(oldest.pair)] == [oldest.id]
    assert shop.outcome_of(event) == "created"
    assert shop.count("outbox") == 0


def test_recovered_payments_of_one_pair_in_one_batch(
    both_guards: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    """The careful half of the same promise: events with marks are judged, and still at most one per pair is granted."""
    oldest, event = shop.paid(due_in="-1 hour")
    shop.mark(event, "created", oldest.id)
    for _ in range(3):
        other, its = shop.paid(student=oldest.student_id, course=oldest.course_id)
        shop.mark(its, "created", other.id)
    processor = make_processor()
    assert processor.process_batch().outcomes() == {Outcome.RECOVERED: 1, Outcome.DUPLICATE_PAYMENT: 3}
    assert processor.watch.state.guard == both_guards
    assert [row.payment_id for row in shop.purchases(oldest.pair)] == [oldest.id]


# --- the pair's lock is public


def test_an_event_waits_while_somebody_holds_its_pairs_lock(
    both_guards: str, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    first = shop.payment()
    shop.purchase(first)
    payment, event = shop.paid(student=first.student_id, course=first.course_id)
    other, _ = shop.paid()
    before = shop.event(event)
    holder = connect()
    hold_pair(holder, payment)
    processor = make_processor()
    report = processor.process_batch()
    assert report.guard == both_guards
    assert [report.batch[key].payment_id for key in report.verdicts] == [str(other.id)]
    assert shop.event(event) == before
    assert shop.outcome_of(event) is None
    holder.rollback()
    assert processor.process_batch().outcomes() == {Outcome.DUPLICATE_PAYMENT: 1}


def test_a_clean_insert_needs_the_lock_only_without_the_index(
    both_guards: str, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    payment, event = shop.paid()
    holder = connect()
    hold_pair(holder, payment)
    processor = make_processor()
    report = processor.process_batch()
    expected = {Outcome.CREATED: 1} if both_guards == "index" else {}
    assert report.outcomes() == expected
    assert len(shop.purchases(payment)) == len(expected)
    holder.rollback()
    drain_all(processor)
    assert shop.outcome_of(event) == "created"


def test_other_keys_do_not_hold_an_event_up(
    both_guards: str, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """Neither the reversed pair, nor the pair with another seed, nor the 32-bit hash is the key."""
    first = shop.payment()
    shop.purchase(first)
    shop.paid(student=first.student_id, course=first.course_id)
    student, course = map(str, first.pair)
    holder = connect()
    holder.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"{course}:{student}"])
    holder.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 1))", [f"{student}:{course}"])
    holder.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [f"{student}:{course}"])
    processor = make_processor()
    assert processor.process_batch().outcomes() == {Outcome.DUPLICATE_PAYMENT: 1}
    assert processor.watch.state.guard == both_guards


def test_locks_are_taken_in_ascending_key_order_and_at_most_capacity_of_them(
    shop: Shop, database: Database, processor: ProbedProcessor
) -> None:
    """A function of the same name, found first, writes down the order in which keys are asked for."""
    shop.pay_many(60, pairs=40)
    shop.rows("CREATE TABLE asked (n bigint GENERATED ALWAYS AS IDENTITY, key bigint)")
    shop.rows(
        "CREATE FUNCTION public.pg_try_advisory_xact_lock(bigint) RETURNS boolean LANGUAGE sql VOLATILE AS"
        " 'INSERT INTO public.asked (key) VALUES ($1); SELECT pg_catalog.pg_try_advisory_xact_lock($1)'"
    )
    keys = "hashtextextended(CAST(student_id AS text) || ':' || CAST(course_id AS text), 0)"
    every = [row[0] for row in shop.rows(f"SELECT DISTINCT {keys} AS key FROM payments ORDER BY key")]
    assert len(every) == 40
    for capacity in (1000, 15):
        with database.transaction(**INDEX_PLANS, search_path="public, pg_catalog") as session:
            batch = processor.outbox.claim(session, 1000).batch
            locks = processor.repository.lock_pairs(session, batch, capacity)
            asked = list(session.execute(text("SELECT key FROM asked ORDER BY n")).scalars())
            session.rollback()
        assert asked == sorted(asked)
        assert list(dict.fromkeys(asked)) == every[:capacity]
        assert locks.keys == set(every[:capacity])
        assert locks.locked | locks.contended == set(batch)
        assert bool(locks.contended) == (capacity == 15)
        assert not locks.locked & locks.contended


@without_index
def test_a_batch_never_fills_the_lock_table(guard_kind: str, shop: Shop, make_processor: MakeProcessor) -> None:
    """More pairs than one transaction may lock: several transactions, no 53200, nothing charged."""
    assert guard_kind == "lock"
    processor = make_processor(batch_size=10_000)
    capacity = processor.watch.state.lock_capacity
    shop.pay_many(2 * capacity + 1)
    sizes = []
    for _ in itertools.takewhile(lambda _: shop.count("outbox"), range(10)):
        report = processor.process_batch()
        sizes.append(len(report.verdicts))
        assert report.outcomes() == {Outcome.CREATED: len(report.batch)}
    assert sizes == [capacity, capacity, 1]


def test_a_retry_in_lock_mode_after_42p10_charges_nobody(shop: Shop, make_processor: MakeProcessor) -> None:
    policy = RetryPolicy(max_attempts=1, base=timedelta(seconds=1), maximum=timedelta(seconds=1))
    processor = make_processor(policy=policy)
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    shop.pay_many(40, pairs=20)
    assert drain_all(processor) == Counter({Outcome.CREATED: 20, Outcome.DUPLICATE_PAYMENT: 20})
    assert shop.count("dead_letters") == 0
