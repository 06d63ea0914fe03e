"""Events that are taken alone: accused before the work, acquitted with it; the processor's side of crashes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from outbox_worker.model import Outcome
from tests.support.factories import ProbedProcessor, Shop, drain_all
from tests.support.makers import MakeProcessor


def crashes(shop: Shop) -> list[int]:
    return [count for (count,) in shop.rows("SELECT crashes FROM outbox ORDER BY id")]


def isolate(shop: Shop, event: Any, times: int) -> None:
    shop.rows("UPDATE outbox SET crashes = %s WHERE event_id = %s", times, event)


def test_a_suspect_is_left_out_of_the_batch_and_then_taken_alone(shop: Shop, make_processor: MakeProcessor) -> None:
    _, suspect = shop.paid(due_in="-1 hour")
    shop.pay_many(5)
    isolate(shop, suspect, 1)
    processor = make_processor()
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 5}
    assert shop.outcome_of(suspect) is None
    report = processor.process_batch()
    assert (report.outcomes(), len(report.batch)) == ({Outcome.CREATED: 1}, 1)
    assert shop.count("outbox") == 0


def test_three_crashes_bury_without_another_try(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid()
    isolate(shop, event, 3)
    assert drain_all(processor) == {Outcome.DEAD: 1}
    letter = shop.letter_of(event)
    assert (letter.reason, letter.attempts, letter.payment_id) == ("crashed_worker", 1, payment.id)
    assert shop.count("purchases") == shop.count("processed_events") == 0


def test_the_accusation_stands_in_the_database_while_the_work_goes_on(
    shop: Shop, processor: ProbedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the event is due later, so that no other worker takes it."""
    shop.pay_many(3)
    processor.isolate_next(2)
    seen: list[list[Any]] = []
    insert = processor.repository.insert_clean

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(shop.rows("SELECT crashes, due_at > now() + interval '20 seconds' FROM outbox ORDER BY id"))
        return insert(*given, **named)

    monkeypatch.setattr(processor.repository, "insert_clean", watched)
    assert [len(processor.process_batch().batch) for _ in range(3)] == [1, 1, 1]
    assert seen[0] == [(1, True), (0, False), (0, False)]
    assert seen[1] == [(1, True), (0, False)]
    assert seen[2] == [(0, False)], "two were to be taken carefully; the third is a batch"


def test_an_event_that_survives_alone_is_acquitted_whatever_its_outcome(shop: Shop, processor: ProbedProcessor) -> None:
    _, pending = shop.paid(status="pending", due_in="-1 hour")
    isolate(shop, pending, 2)
    assert drain_all(processor) == {Outcome.RETRIED: 1}
    assert shop.rows("SELECT crashes, attempts FROM outbox") == [(0, 1)]


def test_trouble_of_the_database_is_no_crash(shop: Shop, processor: ProbedProcessor) -> None:
    """The process lives: it does the work again, and the event is as it was."""
    _, event = shop.paid()
    due = shop.scalar("SELECT due_at FROM outbox")
    processor.isolate_next(1)
    shop.rows("ALTER TABLE processed_events RENAME TO elsewhere")
    for _ in range(4):
        with pytest.raises(DBAPIError, match="processed_events"):
            processor.process_batch()
    assert crashes(shop) == [1]
    shop.rows("ALTER TABLE elsewhere RENAME TO processed_events")
    shop.rows("UPDATE payments SET status = 'pending'")
    assert processor.process_batch().outcomes() == {Outcome.RETRIED: 1}
    assert crashes(shop) == [0]
    assert shop.scalar("SELECT due_at FROM outbox") > due + timedelta(seconds=20)
    assert shop.outcome_of(event) is None


def test_an_accused_event_that_somebody_holds_is_waited_for(
    shop: Shop, connect: Any, make_processor: MakeProcessor, make_database: Any
) -> None:
    """Skipped, it would keep a crash that never was."""
    shop.paid()
    processor = make_processor(database=make_database(deadline_seconds=1))
    processor.isolate_next(1)
    holder: psycopg.Connection[Any] = connect()
    claim = processor.outbox.claim_isolated

    def held(session: Any, isolated: Any) -> Any:
        holder.execute("SELECT FROM outbox FOR UPDATE")
        return claim(session, isolated)

    processor.outbox.claim_isolated = held  # type: ignore[method-assign]
    with pytest.raises(DBAPIError, match="lock timeout"):
        processor.process_batch()
    holder.rollback()
    processor.outbox.claim_isolated = claim  # type: ignore[method-assign]
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 1}
    assert shop.count("outbox") == 0
