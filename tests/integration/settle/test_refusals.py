"""An event is charged for its own refusal, but never for the database's trouble."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import event as listener
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.direct import Direct
from outbox_worker.database.engine import Database
from outbox_worker.database.failures import Failure, classify, sqlstate
from outbox_worker.errors import CommitLost
from outbox_worker.model import PURCHASE_CONFIRMED, Outcome, Reason
from outbox_worker.settings import Settings
from outbox_worker.settle.savepoints import MAX_SAVEPOINTS
from outbox_worker.settle.settlement import FOR_RECORDING
from tests.support.factories import Clerk, Payment, ProbedProcessor, Shop, drain_all
from tests.support.interleaving import poll
from tests.support.makers import Connect, MakeDatabase, MakeProcessor
from tests.support.refusals import BAD, GOOD, NO_TRIGGER, REFUSALS, pay, pay_many, raising, run, trigger
from tests.support.settling import settle
from tests.support.trips import RoundTrips

pytestmark = pytest.mark.usefixtures("both_guards")

LAST = 9
PATIENCE_SECONDS = 20.0
COMMIT_GATE = 4711
"""Key of the advisory lock at which ``wait_in_commit`` stops a COMMIT."""


# --- one event is refused, and only that one


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_event_alone_is_charged(
    shop: Shop, processor: ProbedProcessor, settings: Settings, both_guards: str, name: str
) -> None:
    refusal = REFUSALS[name]
    is_silent = refusal.is_arbiter and both_guards == "index"
    run(shop, refusal.schema)
    good = [pay(shop, GOOD), pay(shop, GOOD)]
    bad, at_its_end = pay(shop, BAD), pay(shop, BAD, attempts=LAST)
    good += [pay(shop, GOOD), pay(shop, GOOD)]
    if refusal.also:
        for payment, _ in (bad, at_its_end):
            shop.rows(refusal.also, *payment.pair)
    started = db_now(shop)
    assert settle(processor) == (
        {event: Outcome.CREATED for _, event in good} | {bad[1]: Outcome.RETRIED, at_its_end[1]: Outcome.DEAD}
    )
    for payment, event in good:
        assert_created(shop, payment, event)
    waiting, letter = shop.event(bad[1]), shop.letter_of(at_its_end[1])
    base = settings.retry_base_seconds
    assert started + seconds(base) <= waiting.due_at <= db_now(shop) + seconds(base * 1.25)
    assert waiting.attempts == 1
    assert waiting.last_error.startswith("rejected_by_database: ")
    assert (letter.reason, letter.attempts, letter.state) == (Reason.REJECTED_BY_DATABASE, LAST + 1, "open")
    for told in (waiting.last_error, letter.detail):
        assert ("raised no error" if is_silent else f"SQLSTATE {refusal.sqlstate}") in told
        assert not any(str(value) in told for value in (BAD, bad[0].id, at_its_end[0].id, "100.00"))
    assert metric(processor, "outbox_dead_letters_total", reason="rejected_by_database") == 1
    assert shop.purchases(bad[0]) == shop.purchases(at_its_end[0]) == []
    run(shop, refusal.cure)
    shop.make_due()
    assert settle(processor) == {bad[1]: Outcome.CREATED}
    assert_created(shop, *bad)


def test_a_refused_event_hides_nothing_of_its_neighbours(shop: Shop, processor: ProbedProcessor) -> None:
    """The careful way, too, keeps every rule and writes every row."""
    run(shop, REFUSALS["trigger"].schema)
    _, bad = pay(shop, BAD)
    payment, created = pay(shop, GOOD)
    recovered, mismatch, unknown = pay(shop, GOOD)[1], pay(shop, GOOD)[1], shop.confirm(None, event_type="OTHER")
    shop.rows("UPDATE outbox SET payload = payload || '{\"amount\": 1}' WHERE event_id = %s", mismatch)
    shop.mark(recovered, "created")
    again, twice = shop.confirm(payment), shop.confirm(shop.payment("succeeded", *payment.pair))
    missing = shop.confirm(Payment(uuid4(), uuid4(), GOOD, "1.00", "EUR"))
    assert settle(processor) == {
        bad: Outcome.RETRIED,
        created: Outcome.CREATED,
        recovered: Outcome.RECOVERED,
        mismatch: Outcome.DEAD,
        unknown: Outcome.DEAD,
        again: Outcome.ALREADY_EXISTS,
        twice: Outcome.DUPLICATE_PAYMENT,
        missing: Outcome.RETRIED,
    }
    assert {row.event_id: row.attempts for row in shop.rows("SELECT * FROM outbox")} == {bad: 1, missing: 1}
    assert {row.outcome for row in shop.rows("SELECT * FROM processed_events")} == {
        *("created", "recovered", "already_exists", "duplicate_payment"),
    }
    assert (shop.count("dead_letters"), shop.count("purchases"), shop.doubled()) == (2, 2, 0)


def test_row_security_that_refuses_one_row(shop: Shop, clerk: Clerk, make_processor: MakeProcessor) -> None:
    run(
        shop,
        "ALTER TABLE purchases ENABLE ROW LEVEL SECURITY;"
        f"CREATE POLICY p ON purchases USING (true) WITH CHECK (course_id <> '{BAD}')",
    )
    processor = make_processor(database=clerk.database)
    good, bad, also_good = pay(shop, GOOD), pay(shop, BAD), pay(shop, GOOD)
    assert settle(processor) == {good[1]: Outcome.CREATED, bad[1]: Outcome.RETRIED, also_good[1]: Outcome.CREATED}
    assert "SQLSTATE 42501" in shop.event(bad[1]).last_error


# --- the database is in trouble


def test_an_unclear_failure_of_every_event_is_nobodys_fault(
    shop: Shop, database: Database, processor: ProbedProcessor
) -> None:
    run(shop, raising("42501", only_bad=False))
    pay_many(shop, 100, GOOD)
    trips = RoundTrips(database)
    assert_pauses(shop, processor, "42501")
    assert trips.savepoints() == [0, MAX_SAVEPOINTS - FOR_RECORDING], "the rest would record what was refused"
    run(shop, NO_TRIGGER)
    assert drain_all(processor) == {Outcome.CREATED: 100}


def test_an_unclear_failure_of_every_purchase_is_nobodys_fault_though_other_events_pass(
    shop: Shop, processor: ProbedProcessor
) -> None:
    """Events that need no purchase are settled. They do not prove that the database is healthy."""
    run(shop, raising("42501", only_bad=False))
    pay_many(shop, 10, GOOD)
    missing = shop.confirm(Payment(uuid4(), uuid4(), GOOD, "1.00", "EUR"))
    assert_pauses(shop, processor, "42501")
    run(shop, NO_TRIGGER)
    assert settled(processor) == {Outcome.CREATED: 10, Outcome.RETRIED: 1}
    assert shop.event(missing).attempts == 1


@pytest.mark.parametrize("state", ["53100", "53200", "58030", "XX000", "XX001", "28000", "3D000", "2200H"])
def test_trouble_is_nobodys_fault_even_if_one_event_meets_it(
    shop: Shop, processor: ProbedProcessor, state: str
) -> None:
    run(shop, raising(state))
    pay(shop, GOOD)
    _, bad = pay(shop, BAD)
    assert settled(processor) == {Outcome.CREATED: 1}
    assert shop.event(bad).attempts == 0
    run(shop, NO_TRIGGER)
    shop.make_due()
    assert settled(processor) == {Outcome.CREATED: 1}


@pytest.mark.parametrize("table", ["purchases", "payments", "processed_events", "dead_letters", "outbox"])
def test_a_table_that_is_away_is_nobodys_fault(shop: Shop, processor: ProbedProcessor, table: str) -> None:
    pay_many(shop, 5, GOOD)
    away = dict.fromkeys(["outbox"], "away") if table == "outbox" else {}
    shop.rows(f"ALTER TABLE {table} RENAME TO away")
    assert_pauses(shop, processor, "42P01", **away)
    shop.rows(f"ALTER TABLE away RENAME TO {table}")
    assert settled(processor) == {Outcome.CREATED: 5}


@pytest.mark.parametrize(
    ("privilege", "table"),
    [
        ("INSERT", "purchases"),
        ("SELECT", "payments"),
        ("INSERT", "processed_events"),
        ("SELECT", "dead_letters"),
        ("DELETE", "outbox"),
    ],
)
def test_a_privilege_that_is_revoked_is_nobodys_fault(
    shop: Shop, clerk: Clerk, make_processor: MakeProcessor, privilege: str, table: str
) -> None:
    processor = make_processor(database=clerk.database)
    pay_many(shop, 5, GOOD)
    clerk.revoke(privilege, table)
    assert_pauses(shop, processor, "42501")
    clerk.grant(privilege, table)
    assert settled(processor) == {Outcome.CREATED: 5}


# --- another transaction blocks an event


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_event_that_always_meets_a_conflict_makes_way_uncharged(
    shop: Shop, processor: ProbedProcessor, settings: Settings, place: int
) -> None:
    """If a failure asks for a repetition, the worker halves the batch, down to one event."""
    run(shop, raising("40001"))
    courses = [GOOD] * 7
    courses[place] = BAD
    events = [pay(shop, course)[1] for course in courses]
    assert_only_one_waits(shop, processor, settings, events, place)
    run(shop, NO_TRIGGER)
    shop.make_due()
    assert settle(processor) == {events[place]: Outcome.CREATED}


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_event_that_takes_longer_than_a_statement_may_makes_way_soon(
    place: int,
    shop: Shop,
    make_database: MakeDatabase,
    make_processor: MakeProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each try costs the whole time limit.

    The number of tries must be about the logarithm of the events.
    """
    run(shop, trigger(f"IF NEW.course_id = '{BAD}' THEN PERFORM pg_sleep(5); END IF;"))
    courses = [GOOD] * 7
    courses[place] = BAD
    events = [pay(shop, course)[1] for course in courses]
    processor = make_processor(database=make_database(deadline_seconds=0.3))
    rolled_back: list[Exception] = []
    monkeypatch.setattr(processor.telemetry, "transaction_failed", lambda error, _: rolled_back.append(error))
    while shop.count("purchases") < 6:
        with suppress(DBAPIError):
            processor.process_batch()
        assert len(rolled_back) <= 8
    assert shop.event(events[place]).attempts == 0


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_an_event_whose_purchase_a_foreign_transaction_writes_makes_way_uncharged(
    shop: Shop, foreign: Foreign, settings: Settings, ends: str
) -> None:
    paid = [pay(shop, GOOD) for _ in range(5)]
    payment, event = paid[2]
    foreign.writes(payment)
    assert_only_one_waits(shop, foreign.processor, settings, [event for _, event in paid], 2)
    foreign.ends(ends)
    shop.make_due()
    assert settle(foreign.processor) == {event: Outcome.CREATED if ends == "rollback" else Outcome.ALREADY_EXISTS}
    assert len(shop.purchases(payment.pair)) == 1


@pytest.mark.parametrize("both_guards", ["index"], indirect=True)
@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_an_event_whose_pair_a_foreign_transaction_takes_makes_way_uncharged(
    shop: Shop, foreign: Foreign, settings: Settings, ends: str
) -> None:
    """Under the guard ``lock``, nothing waits for a writer that skips the lock."""
    paid = [pay(shop, GOOD) for _ in range(5)]
    payment, event = paid[2]
    foreign.writes(shop.payment("succeeded", *payment.pair))
    assert_only_one_waits(shop, foreign.processor, settings, [event for _, event in paid], 2)
    foreign.ends(ends)
    shop.make_due()
    assert settle(foreign.processor) == {event: Outcome.CREATED if ends == "rollback" else Outcome.DUPLICATE_PAYMENT}
    assert len(shop.purchases(payment.pair)) == 1


def test_an_event_whose_pair_is_locked_stays_as_it_was(
    shop: Shop, connect: Connect, processor: ProbedProcessor
) -> None:
    """A session that holds the pair's public lock delays this event only, under either guard."""
    before, (payment, held), behind = pay(shop, GOOD), pay(shop, GOOD), pay(shop, GOOD)
    shop.mark(held, "created")
    was = shop.event(held)
    other = connect()
    other.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"{payment.student_id}:{GOOD}",))
    assert settle(processor) == {before[1]: Outcome.CREATED, behind[1]: Outcome.CREATED}
    assert settle(processor) == {}
    assert shop.event(held) == was
    other.rollback()
    assert settle(processor) == {held: Outcome.RECOVERED}


# --- COMMIT has no answer


def test_a_commit_that_is_killed_is_settled_again(
    shop: Shop, make_processor: MakeProcessor, make_database: MakeDatabase, connect: Connect
) -> None:
    """The backend is terminated inside COMMIT. Nothing took effect and no event is charged.

    The next batch settles the events.
    """
    run(
        shop,
        trigger(f"PERFORM pg_advisory_xact_lock({COMMIT_GATE});", kind="CONSTRAINT TRIGGER refuse AFTER").replace(
            "ON purchases", "ON processed_events"
        ),
    )
    processor = make_processor(database=make_database(deadline_seconds=10 * PATIENCE_SECONDS))
    paid = [pay(shop, GOOD) for _ in range(3)]
    was = shop.rows("SELECT * FROM outbox ORDER BY id")
    gate = connect(autocommit=True)
    gate.execute("SELECT pg_advisory_lock(%s)", (COMMIT_GATE,))
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(processor.process_batch)
        pid = poll(lambda: backend_at_the_gate(shop), "COMMIT waits at the gate")
        shop.rows("SELECT pg_terminate_backend(%s)", pid)
        assert isinstance(answer.exception(PATIENCE_SECONDS), CommitLost)
    gate.execute("SELECT pg_advisory_unlock(%s)", (COMMIT_GATE,))
    assert (shop.rows("SELECT * FROM outbox ORDER BY id"), shop.purchases()) == (was, [])
    assert metric(processor, "outbox_transactions_total", result="unknown") == 1
    assert settled(processor) == {Outcome.CREATED: 3}
    for payment, event in paid:
        assert_created(shop, payment, event)


@pytest.mark.parametrize("careful", [False, True], ids=["fast", "careful"])
def test_a_commit_whose_answer_is_lost_counts(
    careful: bool, shop: Shop, database: Database, processor: ProbedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction took effect, but the connection broke before the answer.

    The worker asks the database for the result. It reports the events once.
    """
    paid = [pay(shop, GOOD) for _ in range(3)]
    hang_up_at_commit(database, careful, monkeypatch)
    processor.is_careful = careful
    report = processor.process_batch()
    assert (report.transaction, report.outcomes()) == ("unknown", {Outcome.CREATED: 3})
    assert metric(processor, "outbox_transactions_total", result="unknown") == 1
    assert metric(processor, "outbox_events_total", event_type=PURCHASE_CONFIRMED, outcome="created") == 3
    for payment, event in paid:
        assert_created(shop, payment, event)
    assert settle(processor) == {}


@pytest.mark.parametrize("careful", [False, True], ids=["fast", "careful"])
@pytest.mark.parametrize("asked", ["of the future", "in vain"])
def test_a_commit_of_which_nobody_knows_is_lost(
    asked: str,
    careful: bool,
    shop: Shop,
    database: Database,
    processor: ProbedProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A standby that was promoted without the transaction refuses the question.

    A standby that is down does, too.
    """
    for _ in range(3):
        pay(shop, GOOD)
    hang_up_at_commit(database, careful, monkeypatch)
    processor.is_careful = careful
    questions = {
        "of the future": "SELECT pg_xact_status('281474976711656')",
        "in vain": "SELECT pg_terminate_backend(pg_backend_pid())",
    }

    def ask(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return (questions[asked], {}) if "pg_xact_status" in statement else (statement, parameters)

    listener.listen(database.engine, "before_cursor_execute", ask, retval=True)
    with pytest.raises(CommitLost) as lost:
        processor.process_batch()
    assert classify(lost.value) is Failure.RECONNECT
    assert metric(processor, "outbox_transactions_total", result="unknown") == 1
    assert metric(processor, "outbox_database_errors_total", **{"class": "reconnect"}) == 1
    assert settle(processor) == {}


# --- fixtures


class Foreign:
    """A slow writer of purchases, and a processor that waits only briefly for it."""

    def __init__(self, connection: psycopg.Connection[Any], processor: ProbedProcessor) -> None:
        self._connection, self.processor = connection, processor

    def writes(self, payment: Payment) -> None:
        self._connection.execute(
            "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency) VALUES (%s, %s, %s, 1, 'EUR')",
            (*payment.pair, payment.id),
        )

    def ends(self, how: str) -> None:
        getattr(self._connection, how)()


@pytest.fixture
def foreign(connect: Connect, make_processor: MakeProcessor, make_database: MakeDatabase) -> Foreign:
    """A wait for a lock ends after 0.4 s.

    Batches are small, and halving them waits only a few times.
    """
    return Foreign(connect(), make_processor(batch_size=4, database=make_database(deadline_seconds=2)))


# --- helpers


def settled(processor: ProbedProcessor) -> dict[Outcome, int]:
    return dict(processor.process_batch().outcomes())


def metric(processor: ProbedProcessor, name: str, **labels: str) -> float:
    return processor.telemetry.metrics.registry.get_sample_value(name, labels) or 0


def assert_created(shop: Shop, payment: Payment, event: UUID) -> None:
    assert (shop.event(event), shop.outcome_of(event), shop.letter_of(event)) == (None, "created", None)
    assert [row.is_active for row in shop.purchases(payment)] == [True]


def assert_pauses(shop: Shop, processor: ProbedProcessor, state: str, outbox: str = "outbox") -> None:
    """Check that the batch raises the database's error and changes no column of the outbox."""
    was = shop.rows(f"SELECT * FROM {outbox} ORDER BY id")
    with pytest.raises((DBAPIError, psycopg.Error)) as raised:
        processor.process_batch()
    assert sqlstate(raised.value) == state
    assert classify(raised.value) in (Failure.PAUSE, Failure.UNCLEAR)
    assert shop.rows(f"SELECT * FROM {outbox} ORDER BY id") == was


def assert_only_one_waits(
    shop: Shop, processor: ProbedProcessor, settings: Settings, events: list[UUID], place: int
) -> None:
    """Check that all events but one are settled.

    That event is postponed by the base delay and not charged.
    """
    started = db_now(shop)
    outcomes: dict[UUID, Outcome] = {}
    for _ in range(4 * len(events)):
        outcomes |= settle(processor)
        if len(outcomes) == len(events) - 1 and shop.event(events[place]).due_at > db_now(shop):
            break
    assert outcomes == {event: Outcome.CREATED for event in events if event != events[place]}
    waiting, base = shop.event(events[place]), seconds(settings.retry_base_seconds)
    assert started + base <= waiting.due_at <= db_now(shop) + base
    assert (waiting.attempts, waiting.last_error) == (0, None)


def backend_at_the_gate(shop: Shop) -> int | None:
    pid: int | None = shop.scalar(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        COMMIT_GATE,
    )
    return pid


def hang_up_at_commit(database: Database, careful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next COMMIT take effect, and lose its answer with the connection."""

    def commit_and_hang_up(connection: Any) -> None:
        driver = connection.connection.dbapi_connection
        driver.commit()
        driver.close()

    def commit_directly(transaction: Direct) -> None:
        monkeypatch.undo()
        transaction._connection.commit()
        transaction._connection.close()
        transaction._connection.commit()

    if careful:
        listener.listen(database.engine, "commit", commit_and_hang_up, once=True)
    else:
        monkeypatch.setattr(Direct, "commit", commit_directly)


def db_now(shop: Shop) -> datetime:
    now: datetime = shop.scalar("SELECT clock_timestamp()")
    return now


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)
