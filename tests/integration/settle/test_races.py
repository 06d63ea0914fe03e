"""Two workers at once: each interleaving ends with one active purchase per pair and no deadlock."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from uuid import UUID

import pytest

from outbox_worker.model import Guard, Outcome
from tests.support.factories import Payment, ProbedProcessor, Shop, drain_all
from tests.support.interleaving import (
    AT_ONCE,
    GATE,
    PATIENCE,
    Steps,
    deadlocks,
    errors,
    poll,
    run_together,
    settle_all,
    stop_insert_of,
)
from tests.support.makers import Connect, MakeDatabase, MakeProcessor

# --- the same pair in two events: one worker is stopped before every statement in turn


def one_of_each(shop: Shop) -> list[Payment]:
    """Write two payments of one pair, with one event each."""
    first, _ = shop.paid(due_in="-2 seconds")
    second, _ = shop.paid(student=first.student_id, course=first.course_id, due_in="-1 second")
    return [first, second]


def one_of_each_marked(shop: Shop) -> list[Payment]:
    """Write the same payments with marks that claim a purchase. Both events are judged."""
    payments = one_of_each(shop)
    for row in shop.rows("SELECT event_id, CAST(payload ->> 'payment_id' AS uuid) AS payment_id FROM outbox"):
        shop.mark(row.event_id, "created", row.payment_id)
    return payments


def marked_and_clean(shop: Shop) -> list[Payment]:
    """Write the same payments.

    The older event is judged, the younger goes through the fast statement.
    """
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
    """One worker stops before its 1st, 2nd, … statement. Meanwhile the other does all it can."""
    fast_database = make_database()
    fast = make_processor(batch_size=1, policy=AT_ONCE, database=fast_database)
    statements = []
    steps = Steps(shop, fast, lambda: make_processor(batch_size=1, policy=AT_ONCE, database=make_database()), pool)
    for payments, statement in steps.through(lambda: kind(shop)):
        statements.append(statement)
        assert shop.count("outbox") == 0
        assert [row.is_active for row in shop.purchases(payments[0].pair)] == [True], statement
        marks = sorted(row.outcome for row in shop.rows("SELECT outcome FROM processed_events"))
        assert marks[-1] == "duplicate_payment" or kind is not one_of_each, (statement, marks)
        shop.rows("TRUNCATE processed_events, purchases, payments")
    assert "SKIP LOCKED" in statements[0]
    assert statements[-2:] == ["COMMIT", ""]
    assert len(statements) >= (3 if kind is one_of_each else 6), statements
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
    """A refund of A looks for another successful payment (design, section 3).

    The refund holds the lock of the pair. A is active. B succeeded meanwhile. Whoever is first, B
    must not be marked as a duplicate of a purchase that the refund deactivates.
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
    poll(lambda: settling.done() or shop.waiting(), "the worker is done or waits")
    refunding.commit()
    assert Outcome.DUPLICATE_PAYMENT not in settling.result(PATIENCE).outcomes()
    drain_all(processor)
    assert shop.outcome_of(event) == "created"
    assert [row.payment_id for row in shop.purchases(first.pair) if row.is_active] == [second.id]
    assert processor.watch.state.guard == both_guards


def test_a_duplicate_verdict_waits_for_the_pairs_lock(
    both_guards: str, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """Another session holds the lock of the pair and nothing else.

    The worker does not reach the verdict, however often it looks.
    """
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
    """Events with locked pairs must not stop the events behind them for ever."""
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
    """Write two payments per pair.

    The first half of the queue has the pairs upwards, the second downwards.
    """
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


def test_opposite_orders_never_deadlock(
    both_guards: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> None:
    databases = [make_database(connections=1), make_database(connections=1)]
    one, two = (make_processor(batch_size=40, policy=AT_ONCE, database=database) for database in databases)
    for _ in range(50):
        pay_in_opposite_orders(shop, 40)
        reports = run_together(pool, one, two)
        assert all(report.claimed for report in reports)
        settle_all(one, lambda: shop.count("outbox") == 0)
        assert errors(one, two) == {}
        assert shop.doubled() == 0
    assert shop.count("purchases") == 50 * 40
    assert one.watch.state.guard == two.watch.state.guard == both_guards
    assert deadlocks(shop, *databases) == 0


def test_two_inserts_in_opposite_claim_order_meet_in_the_same_order(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """Stop the first worker between its two rows while the second worker inserts.

    This is the deterministic version of the test above. Written in claim order, the second worker
    would hold the row that the first needs next.
    """
    low, high, course = UUID(int=1 << 100), UUID(int=2 << 100), UUID(int=7)
    shop.paid(student=low, course=course, due_in="-9 hours")
    second_row, _ = shop.paid(student=high, course=course, due_in="-8 hours")
    shop.paid(student=high, course=course, due_in="-7 hours")
    shop.paid(student=low, course=course, due_in="-6 hours")
    databases = [make_database(connections=1), make_database(connections=1)]
    one, two = (make_processor(batch_size=2, policy=AT_ONCE, database=database) for database in databases)
    stop_insert_of(shop, second_row, "BEFORE")  # workers who knew it would go carefully
    holder = connect(autocommit=True)
    holder.execute("SELECT pg_advisory_lock(%s)", [GATE])
    first = pool.submit(one.process_batch)
    poll(shop.waiting, "the first worker is between its rows")
    second = pool.submit(two.process_batch)
    poll(lambda: second.done() or shop.waiting() >= 2, "the second waits for the first")
    holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    wait([first, second], PATIENCE)
    assert first.result().outcomes() == {Outcome.CREATED: 2}
    assert second.result().outcomes() == {Outcome.DUPLICATE_PAYMENT: 2}
    assert errors(one, two) == {}
    assert deadlocks(shop, *databases) == 0


def test_a_granted_purchase_is_not_written_behind_later_pairs(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """All statements that write purchases follow one order, also two of one transaction.

    One worker writes the clean purchase of the high pair, then recovers the low pair. The other
    writes low, then high.
    """
    databases = [make_database(connections=1), make_database(connections=1)]
    one, two = (make_processor(batch_size=2, policy=AT_ONCE, database=database) for database in databases)
    known, delivered_again = shop.paid(due_in="-10 hours")
    shop.mark(delivered_again, "created", known.id)
    assert one.process_batch().outcomes() == {Outcome.RECOVERED: 1}, "from now on the first one looks for marks"
    low, high, course = UUID(int=1 << 100), UUID(int=2 << 100), UUID(int=7)
    recovered, event = shop.paid(student=low, course=course, due_in="-9 hours")
    shop.mark(event, "created", recovered.id)
    clean, _ = shop.paid(student=high, course=course, due_in="-8 hours")
    shop.paid(student=low, course=course, due_in="-7 hours")
    shop.paid(student=high, course=course, due_in="-6 hours")
    stop_insert_of(shop, clean, "AFTER")
    holder = connect(autocommit=True)
    holder.execute("SELECT pg_advisory_lock(%s)", [GATE])
    assert one.watch.state.guard is Guard.INDEX
    first = pool.submit(one.process_batch)
    poll(shop.waiting, "the first worker has written the high pair")
    second = pool.submit(two.process_batch)
    poll(lambda: second.done() or shop.waiting() >= 2, "the second has written the low pair and waits")
    holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    wait([first, second], PATIENCE)
    first.result(), second.result()
    settle_all(one, lambda: shop.count("outbox") == 0)
    assert shop.doubled() == 0
    assert shop.count("purchases") == 3
    assert errors(one, two) == {}
    assert deadlocks(shop, *databases) == 0


# --- claims


def test_rows_share_locked_by_a_foreign_key_are_not_claimed_then_blocked(
    both_guards: str, shop: Shop, connect: Connect, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    """FOR NO KEY UPDATE would claim such a row.

    Its DELETE would then wait for the other transaction.
    """
    shop.rows("CREATE TABLE notes (outbox_id bigint REFERENCES outbox (id) ON DELETE CASCADE)")
    _, event = shop.paid(due_in="-1 hour")
    neighbours = [shop.paid()[1] for _ in range(5)]
    stranger = connect()
    stranger.execute("INSERT INTO notes SELECT id FROM outbox WHERE event_id = %s", [event])
    processor = make_processor(database=make_database(deadline_seconds=2))
    report = processor.process_batch()
    assert report.outcomes() == {Outcome.CREATED: 5}
    assert all(shop.outcome_of(each) == "created" for each in neighbours)
    assert errors(processor) == {}
    assert shop.event(event).attempts == 0
    stranger.commit()
    assert drain_all(processor) == {Outcome.CREATED: 1}
    assert processor.watch.state.guard == both_guards


def test_no_event_is_handed_out_twice(
    both_guards: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> None:
    """Four workers take small batches of payments confirmed twice.

    Each event is settled exactly once.
    """
    shop.pay_many(300, events=2)
    workers = [make_processor(batch_size=16, policy=AT_ONCE, database=make_database()) for _ in range(4)]

    def work(processor: ProbedProcessor) -> Counter[Outcome]:
        settled: Counter[Outcome] = Counter()
        while shop_count() > 0:
            settled += processor.process_batch().outcomes()
        return settled

    counting = threading.Lock()

    def shop_count() -> int:
        with counting:
            return shop.count("outbox")

    settled = [future.result(PATIENCE) for future in [pool.submit(work, each) for each in workers]]
    assert sum(settled, Counter()) == {Outcome.CREATED: 300, Outcome.ALREADY_EXISTS: 300}
    assert shop.count("processed_events") == 600
    assert shop.count("purchases") == 300
    assert shop.doubled() == 0
    assert {worker.watch.state.guard for worker in workers} == {both_guards}


def test_duplicates_through_four_workers(
    both_guards: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> None:
    """Settle 2,000 events of 50 pairs."""
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
