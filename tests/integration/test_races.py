"""Two workers at once: every interleaving ends with one active purchase a pair, and none with a deadlock."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from conftest import MakeDatabase, MakeProcessor
from factories import Payment, ProbedProcessor, Shop, drain_all
from sqlalchemy import event as listener

from outbox_worker.database import Database
from outbox_worker.decision import RetryPolicy
from outbox_worker.model import Guard, Outcome
from outbox_worker.telemetry import BatchReport

Connect = Callable[..., psycopg.Connection[Any]]
PATIENCE = 20.0

AT_ONCE = RetryPolicy(max_attempts=10, base=timedelta(milliseconds=1), maximum=timedelta(milliseconds=1))
"""An event that makes way for others is due again at once."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=8) as executor:
        yield executor


class Brake:
    """Stops one worker just before its n-th statement from the claim on (COMMIT counts as one), until released."""

    def __init__(self, database: Database, step: int) -> None:
        self._step, self._seen = step, 0
        self.reached, self.released = threading.Event(), threading.Event()
        self.statement = ""
        listener.listen(database.engine, "before_cursor_execute", self._before)
        listener.listen(database.engine, "commit", self._before_commit)

    def _before(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "set_config" not in statement and "SAVEPOINT" not in statement:
            self._count(statement)

    def _before_commit(self, _connection: Any) -> None:
        self._count("COMMIT")

    def _count(self, statement: str) -> None:
        self._seen += 1
        if self._seen == self._step:
            self.statement = statement
            self.reached.set()
            assert self.released.wait(PATIENCE), "never released"


def poll(holds: Callable[[], Any], what: str) -> Any:
    deadline, turn = time.monotonic() + PATIENCE, threading.Event()
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        turn.wait(0.005)
    return found


def waits_for_a_lock(shop: Shop) -> bool:
    return bool(
        shop.scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'outbox-worker' AND wait_event_type = 'Lock'"
        )
    )


def errors(*processors: ProbedProcessor) -> dict[str, float]:
    """Errors of the database that the processors met, by class."""
    total: Counter[str] = Counter()
    for processor in processors:
        for name, value in processor.telemetry.metrics.snapshot().items():
            if name.startswith("outbox_database_errors_total") and value:
                total[name] += int(value)
    return dict(total)


def deadlocks(shop: Shop, *databases: Database) -> int:
    """By the server's own count. A session hands in what it counted when it ends."""
    for database in databases:
        database.close()
    poll(
        lambda: (
            not shop.scalar(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'outbox-worker'"
            )
        ),
        "sessions end",
    )
    shop.rows("SELECT pg_stat_clear_snapshot()")
    return int(shop.scalar("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))


def settle_all(processor: ProbedProcessor, shop_is_empty: Callable[[], bool]) -> Counter[Outcome]:
    """Like a claim loop: on and on until the outbox is empty; rows and pairs that others hold are met again."""
    outcomes: Counter[Outcome] = Counter()
    deadline = time.monotonic() + PATIENCE
    while not shop_is_empty():
        outcomes += processor.process_batch().outcomes()
        assert time.monotonic() < deadline, outcomes
    return outcomes


# --- the same pair in two events, one worker stopped before every statement in turn


def one_of_each(shop: Shop) -> list[Payment]:
    """Two payments of one pair, two events."""
    first, _ = shop.paid(due_in="-2 seconds")
    second, _ = shop.paid(student=first.student_id, course=first.course_id, due_in="-1 second")
    return [first, second]


def one_of_each_marked(shop: Shop) -> list[Payment]:
    """The same with marks that claim a purchase: both go the way of judgement."""
    payments = one_of_each(shop)
    for row in shop.rows("SELECT event_id, CAST(payload ->> 'payment_id' AS uuid) AS payment_id FROM outbox"):
        shop.mark(row.event_id, "created", row.payment_id)
    return payments


def marked_and_clean(shop: Shop) -> list[Payment]:
    """The older event goes the way of judgement, the younger the fast one."""
    payments = one_of_each(shop)
    row = shop.rows("SELECT event_id FROM outbox ORDER BY due_at")[0]
    shop.mark(row.event_id, "created", payments[0].id)
    return payments


@pytest.mark.parametrize("kind", [one_of_each, one_of_each_marked, marked_and_clean])
def test_two_workers_on_one_pair_whatever_the_moment(
    both_guards: str,
    kind: Callable[[Shop], list[Payment]],
    shop: Shop,
    make_database: MakeDatabase,
    make_processor: MakeProcessor,
    pool: ThreadPoolExecutor,
) -> None:
    """One worker stands still before its 1st, 2nd, … statement while the other does what it can."""
    fast_database = make_database()
    fast = make_processor(batch_size=1, policy=AT_ONCE, database=fast_database)
    statements, met = [], []
    for step in range(1, 30):
        payments = kind(shop)
        slow_database = make_database(connections=1)
        slow = make_processor(batch_size=1, policy=AT_ONCE, database=slow_database)
        brake = Brake(slow_database, step)
        braked = pool.submit(slow.process_batch)
        poll(lambda b=brake, f=braked: b.reached.is_set() or f.done(), "the statement, or the end")
        statements.append(brake.statement)
        other = pool.submit(fast.process_batch)
        poll(lambda f=other: f.done() or waits_for_a_lock(shop), "the other worker is done or waits")
        brake.released.set()
        reports = [braked.result(PATIENCE), other.result(PATIENCE)]
        drain_all(fast)
        assert shop.count("outbox") == 0
        assert [row.is_active for row in shop.purchases(payments[0].pair)] == [True], brake.statement
        marks = sorted(row.outcome for row in shop.rows("SELECT outcome FROM processed_events"))
        met.append([report.outcomes() for report in reports])
        assert marks[-1] == "duplicate_payment" or kind is not one_of_each, (brake.statement, marks)
        shop.rows("TRUNCATE processed_events, purchases, payments")
        assert errors(slow) == {}
        slow_database.close()
        if not brake.reached.is_set():
            break
    assert "SKIP LOCKED" in statements[0]
    assert statements[-2:] == ["COMMIT", ""]
    assert len(statements) >= 6, statements
    assert fast.watch.state.guard == both_guards
    assert errors(fast) == {}
    assert deadlocks(shop, fast_database) == 0


def test_a_refund_that_comes_between_is_not_lost(
    both_guards: str,
    shop: Shop,
    make_database: MakeDatabase,
    make_processor: MakeProcessor,
    connect: Connect,
    pool: ThreadPoolExecutor,
) -> None:
    """Design, section 3: A is active; a refund of A, under the pair's lock, looks for another standing payment.

    B succeeded meanwhile. Whoever is first, B must not be marked as a duplicate of a purchase that is going.
    """
    first = shop.payment()
    shop.purchase(first)
    refunding = connect()
    refunding.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended(CAST(student_id AS text) || ':' || CAST(course_id AS text), 0))"
        " FROM payments WHERE id = %s",
        [first.id],
    )
    refunding.execute("UPDATE purchases SET is_active = false WHERE payment_id = %s", [first.id])
    second, event = shop.paid(student=first.student_id, course=first.course_id)
    processor = make_processor(database=make_database(connections=1))
    settling = pool.submit(processor.process_batch)
    poll(lambda: settling.done() or waits_for_a_lock(shop), "the worker is done or waits")
    refunding.commit()
    assert Outcome.DUPLICATE_PAYMENT not in settling.result(PATIENCE).outcomes()
    drain_all(processor)
    assert shop.outcome_of(event) == "created"
    assert [row.payment_id for row in shop.purchases(first.pair) if row.is_active] == [second.id]
    assert processor.watch.state.guard == both_guards


def test_a_duplicate_verdict_waits_for_the_pairs_lock(
    both_guards: str, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """Nothing but the lock is held: the verdict is not reached, however often the worker looks."""
    first = shop.payment()
    shop.purchase(first)
    _, event = shop.paid(student=first.student_id, course=first.course_id)
    holder = connect()
    holder.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"{first.student_id}:{first.course_id}"])
    processor = make_processor()
    for _ in range(3):
        assert processor.process_batch().verdicts == {}
    left = shop.event(event)
    assert (left.attempts, left.last_error) == (0, None)
    holder.rollback()
    assert processor.process_batch().outcomes() == {Outcome.DUPLICATE_PAYMENT: 1}
    assert processor.watch.state.guard == both_guards


def test_a_full_claim_of_held_pairs_makes_way_uncharged(
    both_guards: str, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """Events whose pairs stay locked must not stop those behind them for ever."""
    held = [shop.payment() for _ in range(3)]
    holder = connect()
    for payment in held:
        shop.purchase(payment)
        shop.paid(student=payment.student_id, course=payment.course_id, due_in="-1 hour")
        holder.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"{payment.student_id}:{payment.course_id}"]
        )
    behind, event = shop.paid()
    processor = make_processor(batch_size=3)
    for _ in range(8):
        processor.process_batch()
    assert shop.outcome_of(event) == "created"
    assert len(shop.purchases(behind)) == 1
    assert shop.rows("SELECT DISTINCT attempts FROM outbox") == [(0,)]
    assert shop.count("outbox") == 3
    holder.rollback()
    shop.make_due()
    assert drain_all(processor) == {Outcome.DUPLICATE_PAYMENT: 3}
    assert processor.watch.state.guard == both_guards


# --- deadlocks


def pay_in_opposite_orders(shop: Shop, pairs: int) -> None:
    """Two payments a pair: the first half of the queue goes through the pairs upwards, the second downwards."""
    shop.rows(
        """
        WITH pair AS MATERIALIZED (
            SELECT k, CAST(md5(random()::text || k) AS uuid) AS student_id, CAST(md5(k::text) AS uuid) AS course_id
            FROM generate_series(1, %(pairs)s) AS k
        ), ranked AS (
            SELECT student_id, course_id, row_number() OVER (ORDER BY student_id, course_id) AS rank FROM pair
        ), paid AS (
            INSERT INTO payments (student_id, course_id, amount, currency, status, updated_at)
            SELECT student_id, course_id, 10, 'EUR', 'succeeded',
                   timestamptz '2026-01-01' + interval '1 s' * CASE half WHEN 1 THEN rank ELSE 10000 - rank END
            FROM ranked, generate_series(1, 2) AS half
            RETURNING id, updated_at
        )
        INSERT INTO outbox (event_id, event_type, payload, due_at)
        SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', jsonb_build_object('payment_id', id), updated_at
        FROM paid ORDER BY updated_at
        """,
        {"pairs": pairs},
    )


def run_together(pool: ThreadPoolExecutor, *processors: ProbedProcessor) -> list[BatchReport]:
    """One batch each: all have claimed before one goes on."""
    meeting = threading.Barrier(len(processors), timeout=PATIENCE)
    for processor in processors:
        processor.meeting = meeting
    batches = [pool.submit(processor.process_batch) for processor in processors]
    return [future.result(PATIENCE) for future in batches]


def test_opposite_orders_never_deadlock(
    both_guards: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> None:
    databases = [make_database(connections=1), make_database(connections=1)]
    one, two = (make_processor(batch_size=40, policy=AT_ONCE, database=database) for database in databases)
    for _ in range(50):
        pay_in_opposite_orders(shop, 40)
        reports = run_together(pool, one, two)
        assert all(report.batch for report in reports)
        settle_all(one, lambda: shop.count("outbox") == 0)
        assert errors(one, two) == {}
        assert shop.doubled() == 0
    assert shop.count("purchases") == 50 * 40
    assert one.watch.state.guard == two.watch.state.guard == both_guards
    assert deadlocks(shop, *databases) == 0


GATE = 4242


def stop_insert_of(shop: Shop, payment: Payment, moment: str) -> None:
    """The insert of this payment's purchase waits, BEFORE or AFTER the row, for the advisory lock ``GATE``."""
    shop.rows(
        f"""
        CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.payment_id = '{payment.id}' THEN PERFORM pg_advisory_xact_lock({GATE}); END IF;
            RETURN NEW;
        END $$
        """
    )
    shop.rows(f"CREATE TRIGGER gate {moment} INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION wait_at_gate()")


def test_two_inserts_in_opposite_claim_order_meet_in_the_same_order(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """The certain version of the one above: the first is stopped between its two rows while the second comes.

    Written in claim order the second would hold what the first needs next.
    """
    low, high, course = UUID(int=1 << 100), UUID(int=2 << 100), UUID(int=7)
    shop.paid(student=low, course=course, due_in="-9 hours")
    second_row, _ = shop.paid(student=high, course=course, due_in="-8 hours")
    shop.paid(student=high, course=course, due_in="-7 hours")
    shop.paid(student=low, course=course, due_in="-6 hours")
    stop_insert_of(shop, second_row, "BEFORE")
    holder = connect(autocommit=True)
    holder.execute("SELECT pg_advisory_lock(%s)", [GATE])
    databases = [make_database(connections=1), make_database(connections=1)]
    one, two = (make_processor(batch_size=2, policy=AT_ONCE, database=database) for database in databases)
    first = pool.submit(one.process_batch)
    poll(lambda: waits_for_a_lock(shop), "the first worker is between its rows")
    second = pool.submit(two.process_batch)
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
    poll(lambda: second.done() or shop.scalar(waiting) >= 2, "the second waits for the first")
    holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    wait([first, second], PATIENCE)
    assert first.result().outcomes() == {Outcome.CREATED: 2}
    assert second.result().outcomes() == {Outcome.DUPLICATE_PAYMENT: 2}
    assert errors(one, two) == {}
    assert deadlocks(shop, *databases) == 0


def test_a_granted_purchase_is_not_written_behind_later_pairs(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """Every statement that writes purchases goes in one order, and so do two statements of one transaction.

    One worker writes the clean purchase of the high pair, then recovers the low one; the other writes low, then high.
    """
    low, high, course = UUID(int=1 << 100), UUID(int=2 << 100), UUID(int=7)
    recovered, event = shop.paid(student=low, course=course, due_in="-9 hours")
    shop.mark(event, "created", recovered.id)
    clean, _ = shop.paid(student=high, course=course, due_in="-8 hours")
    shop.paid(student=low, course=course, due_in="-7 hours")
    shop.paid(student=high, course=course, due_in="-6 hours")
    stop_insert_of(shop, clean, "AFTER")
    holder = connect(autocommit=True)
    holder.execute("SELECT pg_advisory_lock(%s)", [GATE])
    databases = [make_database(connections=1), make_database(connections=1)]
    one, two = (make_processor(batch_size=2, policy=AT_ONCE, database=database) for database in databases)
    assert one.watch.state.guard is Guard.INDEX
    first = pool.submit(one.process_batch)
    poll(lambda: waits_for_a_lock(shop), "the first worker has written the high pair")
    second = pool.submit(two.process_batch)
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()"
    poll(lambda: second.done() or shop.scalar(waiting) >= 2, "the second has written the low pair and waits")
    holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    wait([first, second], PATIENCE)
    first.result(), second.result()
    settle_all(one, lambda: shop.count("outbox") == 0)
    assert shop.doubled() == 0
    assert shop.count("purchases") == 2
    assert errors(one, two) == {}
    assert deadlocks(shop, *databases) == 0


# --- claims


def test_rows_share_locked_by_a_foreign_key_are_not_claimed_then_blocked(
    both_guards: str, shop: Shop, connect: Connect, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    """FOR NO KEY UPDATE would claim such a row, and its DELETE would then wait for the stranger."""
    shop.rows("CREATE TABLE notes (outbox_id bigint REFERENCES outbox (id) ON DELETE CASCADE)")
    _, event = shop.paid(due_in="-1 hour")
    neighbours = [shop.paid()[1] for _ in range(5)]
    stranger = connect()
    stranger.execute("INSERT INTO notes SELECT id FROM outbox WHERE event_id = %s", [event])
    processor = make_processor(database=make_database(deadline_seconds=2))
    report = processor.process_batch()
    assert {claimed.event_id for claimed in report.batch.values()} == set(neighbours)
    assert report.outcomes() == {Outcome.CREATED: 5}
    assert errors(processor) == {}
    assert shop.event(event).attempts == 0
    stranger.commit()
    assert drain_all(processor) == {Outcome.CREATED: 1}
    assert processor.watch.state.guard == both_guards


def test_no_event_is_handed_out_twice(
    both_guards: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> None:
    """Four workers, small batches, every payment confirmed twice: each event is settled exactly once."""
    shop.pay_many(300, events=2)
    workers = [make_processor(batch_size=16, policy=AT_ONCE, database=make_database()) for _ in range(4)]

    def work(processor: ProbedProcessor) -> list[UUID]:
        settled: list[UUID] = []
        while shop_count() > 0:
            report = processor.process_batch()
            settled += [
                report.batch[key].event_id
                for key, verdict in report.verdicts.items()
                if verdict.outcome is not Outcome.RETRIED
            ]
        return settled

    counting = threading.Lock()

    def shop_count() -> int:
        with counting:
            return shop.count("outbox")

    settled = [one for future in [pool.submit(work, each) for each in workers] for one in future.result(PATIENCE)]
    assert len(settled) == len(set(settled)) == 600
    assert shop.count("purchases") == 300
    assert shop.doubled() == 0
    assert {worker.watch.state.guard for worker in workers} == {both_guards}


def test_duplicates_through_four_workers(
    both_guards: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> None:
    """2,000 events of 50 pairs."""
    shop.pay_many(2000, pairs=50)
    databases = [make_database(connections=1) for _ in range(4)]
    workers = [make_processor(batch_size=100, policy=AT_ONCE, database=database) for database in databases]
    counting = threading.Lock()

    def is_empty() -> bool:
        with counting:
            return shop.count("outbox") == 0

    total: Counter[Outcome] = Counter()
    for future in [pool.submit(settle_all, worker, is_empty) for worker in workers]:
        total += future.result(2 * PATIENCE)
    assert total == {Outcome.CREATED: 50, Outcome.DUPLICATE_PAYMENT: 1950}
    assert shop.active_pairs().total() == len(shop.active_pairs()) == 50
    assert errors(*workers) == {}
    assert {worker.watch.state.guard for worker in workers} == {both_guards}
    assert deadlocks(shop, *databases) == 0
