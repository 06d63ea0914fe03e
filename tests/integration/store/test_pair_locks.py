"""The lock of a pair: who waits for it, and which other programs can take it."""

from __future__ import annotations

import itertools
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import text

from outbox_worker.database.engine import Database
from outbox_worker.database.planner import INDEX_PLANS
from outbox_worker.decision import RetryPolicy
from outbox_worker.model import Outcome
from outbox_worker.schema.tables import PAIR_INDEX
from tests.support.factories import ProbedProcessor, Shop, drain_all, hold_pair
from tests.support.guarding import without_index
from tests.support.makers import Connect, MakeProcessor

# --- many payments of one pair


@pytest.mark.parametrize("payments", [2, 7])
def test_payments_of_one_pair_in_one_batch(
    both_guards: str, payments: int, shop: Shop, make_processor: MakeProcessor
) -> None:
    """Exactly one payment is granted, that of the oldest event.

    The other payments are duplicates.
    """
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
    """Events with marks are judged. Still, at most one payment per pair is granted."""
    oldest, event = shop.paid(due_in="-1 hour")
    shop.mark(event, "created", oldest.id)
    for _ in range(3):
        other, its = shop.paid(student=oldest.student_id, course=oldest.course_id)
        shop.mark(its, "created", other.id)
    processor = make_processor()
    assert processor.process_batch().outcomes() == {Outcome.RECOVERED: 1, Outcome.DUPLICATE_PAYMENT: 3}
    assert processor.watch.state.guard == both_guards
    assert [row.payment_id for row in shop.purchases(oldest.pair)] == [oldest.id]


# --- other programs can take the lock of a pair


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
    assert report.outcomes() == {Outcome.CREATED: 1}
    assert [row.is_active for row in shop.purchases(other)] == [True]
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
    """A reversed pair, another seed and a 32-bit hash give other keys than the lock of the pair."""
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
    """A function with the name of the lock function is found first.

    It records the order of the keys.
    """
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
    """A batch with more pairs than one transaction can lock takes several transactions.

    No transaction fails with 53200, and no event is charged.
    """
    assert guard_kind == "lock"
    processor = make_processor(batch_size=10_000)
    capacity = processor.watch.state.lock_capacity
    shop.pay_many(2 * capacity + 1)
    sizes = []
    for _ in itertools.takewhile(lambda _: shop.count("outbox"), range(10)):
        report = processor.process_batch()
        sizes.append(report.settled)
        assert report.outcomes() == {Outcome.CREATED: report.claimed}
    assert sizes == [capacity, capacity, 1]


def test_a_retry_in_lock_mode_after_42p10_charges_nobody(shop: Shop, make_processor: MakeProcessor) -> None:
    policy = RetryPolicy(max_attempts=1, base=timedelta(seconds=1), maximum=timedelta(seconds=1))
    processor = make_processor(policy=policy)
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    shop.pay_many(40, pairs=20)
    assert drain_all(processor) == Counter({Outcome.CREATED: 20, Outcome.DUPLICATE_PAYMENT: 20})
    assert shop.count("dead_letters") == 0
