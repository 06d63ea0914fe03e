"""Rare moments: a payment that appears after the locks were taken, and events with one due time."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from outbox_worker.model import Outcome
from tests.support.factories import Payment, Shop, drain_all, hold_pair
from tests.support.makers import Connect, MakeProcessor


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
    """A transaction of a producer gives all its events one due time."""
    shop.pay_many(25)
    shop.rows("UPDATE outbox SET due_at = now() - interval '1 minute'")
    processor = make_processor(batch_size=10)
    monkeypatch.setattr(processor._pacing, "claimed_from_start", lambda *_, **__: None)
    processor._pacing.frontier.start_due = float("inf")
    starts: list[Any] = []
    fast = processor._fast
    run = fast._run

    def watched(transaction: Any, wanted: Any, start: Any) -> Any:
        starts.append(start)
        return run(transaction, wanted, start)

    monkeypatch.setattr(fast, "_run", watched)
    assert [processor.process_batch().claimed for _ in range(3)] == [10, 10, 5]
    assert [start is None for start in starts] == [True, False, False]
