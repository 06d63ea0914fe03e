"""Events taken alone after a crash: the worker accuses them first and clears them with its work."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from outbox_worker.model import Outcome
from tests.support.factories import ProbedProcessor, Shop, drain_all
from tests.support.makers import MakeProcessor

ACCUSED = "SELECT isolated_event, crashes FROM workers LEFT JOIN outbox o ON o.id = isolated_event"


def crashes(shop: Shop) -> list[int]:
    return [count for (count,) in shop.rows("SELECT crashes FROM outbox ORDER BY id")]


def charge(shop: Shop, event: Any, times: int) -> None:
    shop.rows("UPDATE outbox SET crashes = %s WHERE event_id = %s", times, event)


def watch(processor: ProbedProcessor, monkeypatch: pytest.MonkeyPatch, look: Any) -> list[Any]:
    """Record what ``look`` finds each time a purchase is about to be written."""
    seen: list[Any] = []
    insert = processor.repository.insert_granted

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(look())
        return insert(*given, **named)

    monkeypatch.setattr(processor.repository, "insert_granted", watched)
    processor.is_careful = True
    return seen


def test_a_suspect_is_left_out_of_the_batch_and_then_taken_alone(shop: Shop, make_processor: MakeProcessor) -> None:
    _, suspect = shop.paid(due_in="-1 hour")
    shop.pay_many(5)
    charge(shop, suspect, 1)
    processor = make_processor()
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 5}
    assert shop.outcome_of(suspect) is None
    report = processor.process_batch()
    assert (report.outcomes(), len(report.batch)) == ({Outcome.CREATED: 1}, 1)
    assert shop.count("outbox") == 0


def test_three_crashes_bury_without_another_try(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid()
    charge(shop, event, 3)
    assert drain_all(processor) == {Outcome.DEAD: 1}
    letter = shop.letter_of(event)
    assert (letter.reason, letter.attempts, letter.payment_id) == ("crashed_worker", 1, payment.id)
    assert shop.count("purchases") == shop.count("processed_events") == 0


def test_the_accusation_stands_in_the_makers_row_while_the_work_goes_on(
    shop: Shop, processor: ProbedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of the event is not changed: neither its count of crashes nor its due time."""
    shop.pay_many(3)
    first, second, _ = (key for (key,) in shop.rows("SELECT id FROM outbox ORDER BY due_at, id"))
    before = shop.rows("SELECT id, crashes, due_at FROM outbox ORDER BY id")
    processor.isolate_next(2)
    outbox = "SELECT id, crashes, due_at FROM outbox ORDER BY id"
    seen = watch(processor, monkeypatch, lambda: (shop.rows(ACCUSED), shop.rows(outbox)))
    assert [len(processor.process_batch().batch) for _ in range(3)] == [1, 1, 1]
    assert [accused for accused, _ in seen] == [[(first, 0)], [(second, 0)], [(None, None)]]
    assert seen[0][1] == before
    assert shop.rows("SELECT isolated_event, isolated_at, isolated_timeline FROM workers") == [(None, None, None)]


def test_an_accusation_tells_since_when_and_on_which_timeline(
    shop: Shop, processor: ProbedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.paid()
    processor.isolate_next(1)
    told = "SELECT isolated_at BETWEEN now() - interval '1 minute' AND seen_at, isolated_timeline FROM workers"
    seen = watch(processor, monkeypatch, lambda: shop.rows(told))
    drain_all(processor)
    assert seen == [[(True, "00000001")]]


def test_a_count_stays_until_the_event_is_settled(shop: Shop, processor: ProbedProcessor) -> None:
    """Only a proven crash changes the count.

    An event that waits for its payment is still taken alone.
    """
    payment, pending = shop.paid(status="pending", due_in="-1 hour")
    charge(shop, pending, 2)
    assert drain_all(processor) == {Outcome.RETRIED: 1}
    assert shop.rows("SELECT crashes, attempts FROM outbox") == [(2, 1)]
    assert shop.rows("SELECT isolated_event FROM workers") == [(None,)]
    shop.set_status(payment, "succeeded")
    shop.make_due()
    assert drain_all(processor) == {Outcome.CREATED: 1}


def test_trouble_of_the_database_is_no_crash(shop: Shop, processor: ProbedProcessor) -> None:
    """The worker lives and withdraws its accusation.

    It repeats the work, and the event stays unchanged.
    """
    _, event = shop.paid()
    due = shop.scalar("SELECT due_at FROM outbox")
    processor.isolate_next(1)
    shop.rows("ALTER TABLE processed_events RENAME TO elsewhere")
    for _ in range(4):
        with pytest.raises(DBAPIError, match="processed_events"):
            processor.process_batch()
        assert shop.rows("SELECT isolated_event, isolated_at, isolated_timeline FROM workers") == [(None, None, None)]
    assert shop.rows("SELECT crashes, due_at FROM outbox") == [(0, due)]
    shop.rows("ALTER TABLE elsewhere RENAME TO processed_events")
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 1}
    assert shop.outcome_of(event) == "created"


@pytest.mark.parametrize("meanwhile", ["locked", "settled", "postponed"])
def test_an_accused_event_that_another_worker_takes_is_let_go(
    shop: Shop, connect: Any, processor: ProbedProcessor, meanwhile: str
) -> None:
    """Nothing protects the event between the accusation and the claim.

    Nobody waits or takes it twice.
    """
    _, event = shop.paid()
    processor.isolate_next(1)
    other: psycopg.Connection[Any] = connect()
    claim = processor.outbox.claim_isolated
    taken = {
        "locked": "SELECT FROM outbox FOR UPDATE",
        "settled": "DELETE FROM outbox",
        "postponed": "UPDATE outbox SET due_at = now() + interval '1 hour'",
    }

    def taking(*given: Any) -> Any:
        other.execute(taken[meanwhile])
        if meanwhile != "locked":
            other.commit()
        return claim(*given)

    processor.outbox.claim_isolated = taking  # type: ignore[assignment,method-assign]
    report = processor.process_batch()
    assert (len(report.batch), dict(report.verdicts)) == (0, {})
    assert shop.rows("SELECT isolated_event FROM workers") == [(None,)]
    other.rollback()
    assert shop.outcome_of(event) is None
    processor.outbox.claim_isolated = claim  # type: ignore[method-assign]
    assert processor.process_batch().outcomes() == ({Outcome.CREATED: 1} if meanwhile == "locked" else {})


def test_while_one_loop_works_alone_the_others_stand_still(
    shop: Shop,
    make_processor: MakeProcessor,
    monkeypatch: pytest.MonkeyPatch,
    pool: ThreadPoolExecutor,
) -> None:
    """A crash ends the whole process.

    The batch of another loop must not cause it during the accusation.
    """
    _, suspect = shop.paid(due_in="-1 hour")
    charge(shop, suspect, 1)
    one = make_processor()
    other = make_processor(isolation=one.isolation)
    assert not one.process_batch().verdicts, "the suspect was left out, to be taken alone next"
    at_work, done = threading.Event(), threading.Event()

    def slow() -> None:
        at_work.set()
        assert done.wait(20)

    watch(one, monkeypatch, slow)
    alone = pool.submit(one.process_batch)
    assert at_work.wait(20)
    shop.pay_many(3)
    waited = threading.Event()
    other._on_failed_try = waited.set
    batch = pool.submit(other.process_batch)
    assert waited.wait(20), "it tells that it lives while it waits"
    assert shop.count("purchases") == 0
    assert not batch.done()
    done.set()
    assert alone.result(20).outcomes() == {Outcome.CREATED: 1}
    assert batch.result(20).outcomes() == {Outcome.CREATED: 3}


def test_a_loop_waits_for_the_batches_of_the_others_before_it_accuses(
    shop: Shop,
    make_processor: MakeProcessor,
    monkeypatch: pytest.MonkeyPatch,
    pool: ThreadPoolExecutor,
) -> None:
    shop.pay_many(3)
    one = make_processor()
    other = make_processor(isolation=one.isolation)
    at_work, done, waited = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        at_work.set()
        assert done.wait(20)

    watch(one, monkeypatch, slow)
    batch = pool.submit(one.process_batch)
    assert at_work.wait(20)
    shop.paid()
    one.isolate_next(1)
    other._on_failed_try = waited.set
    alone = pool.submit(other.process_batch)
    assert waited.wait(20)
    assert shop.count("workers") == 0, "nobody is accused while a batch could kill the process"
    done.set()
    assert batch.result(20).outcomes() == {Outcome.CREATED: 3}
    assert alone.result(20).outcomes() == {Outcome.CREATED: 1}
