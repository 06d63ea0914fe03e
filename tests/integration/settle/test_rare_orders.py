"""Orders that only rare moments show: two writes of one transaction, late payments, events of one due time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any
from uuid import UUID, uuid4

import pytest

from outbox_worker.model import Guard, Outcome
from tests.support.factories import Payment, Shop, drain_all, hold_pair
from tests.support.interleaving import AT_ONCE, GATE, PATIENCE, deadlocks, errors, poll, settle_all, stop_insert_of
from tests.support.makers import Connect, MakeDatabase, MakeProcessor


def test_a_granted_purchase_is_not_written_behind_later_pairs(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """Every statement that writes purchases goes in one order, and so do two statements of one transaction.

    One worker writes the clean purchase of the high pair, then recovers the low one; the other writes low, then high.
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


@pytest.mark.parametrize("guard_kind", ["lock"], indirect=True)
def test_a_payment_that_becomes_visible_after_the_locks_were_taken_waits_for_its_own(
    shop: Shop, connect: Connect, make_processor: MakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Payment(uuid4(), uuid4(), uuid4(), "49.90", "EUR")
    shop.confirm(absent)
    processor, holder = make_processor(), connect()
    lock = processor.repository.lock_pairs

    def lock_and_pay(*given: Any) -> Any:
        locks = lock(*given)
        if not shop.count("payments"):
            shop.payment(id=absent.id, student=absent.student_id, course=absent.course_id)
            hold_pair(holder, absent)
        return locks

    monkeypatch.setattr(processor.repository, "lock_pairs", lock_and_pay)
    assert processor.process_batch().verdicts == {}
    assert shop.count("purchases") == 0, "somebody else has its pair"
    holder.rollback()
    assert drain_all(processor) == {Outcome.CREATED: 1}


def test_events_of_one_due_time_are_claimed_in_the_order_of_their_ids(
    shop: Shop, make_processor: MakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer's transaction gives all its events one due time."""
    shop.pay_many(25)
    shop.rows("UPDATE outbox SET due_at = now() - interval '1 minute'")
    processor = make_processor(batch_size=10)
    monkeypatch.setattr(processor._pacing, "claimed_from_start", lambda *_: None)
    processor._pacing.frontier.start_due = float("inf")
    starts: list[Any] = []
    claim = processor.outbox.claim

    def watched(session: Any, limit: int, until: Any = None, start: Any = None) -> Any:
        starts.append(start)
        return claim(session, limit, until, start)

    monkeypatch.setattr(processor.outbox, "claim", watched)
    assert [len(processor.process_batch().batch) for _ in range(3)] == [10, 10, 5]
    assert [start is None for start in starts] == [True, False, False]
