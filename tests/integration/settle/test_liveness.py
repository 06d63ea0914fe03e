"""No event waits longer than the backlog before it explains, whatever events come before it.

A good event is one whose purchase can be written. The events that come before it here never
succeed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import Failure, classify
from outbox_worker.decision import RetryPolicy
from outbox_worker.model import Outcome
from outbox_worker.settle.pacing import FEW_IN_DOUBT, STUCK_PASSES_MAX
from outbox_worker.settle.savepoints import MAX_SAVEPOINTS
from tests.support.factories import Payment, ProbedProcessor, Shop, drain_all, hold_pair
from tests.support.makers import Connect, MakeProcessor
from tests.support.refusals import BAD, GOOD, NO_TRIGGER, REFUSALS, pay, pay_many, raising, run, trigger
from tests.support.trips import RoundTrips

AT_ONCE = timedelta(milliseconds=1)
FOR_EVER = RetryPolicy(max_attempts=10**6, base=AT_ONCE, maximum=AT_ONCE)
"""An event that fails is due again before the next claim, and never buried."""
FEW = 10


# --- events that are charged: each batch before a good event costs one batch


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("why", ["refused", "refused at COMMIT", "its payment is not there"])
def test_events_that_come_back_at_once_are_passed_in_their_turn(
    shop: Shop, make_processor: MakeProcessor, why: str
) -> None:
    """A good event behind n others is settled by batch n / b + 1.

    Retried events queue up behind it.
    """
    never_succeed(shop, 30, why)
    waiting = [pay(shop, GOOD)[1] for _ in range(40)]
    processor = make_processor(batch_size=FEW, policy=FOR_EVER)
    for batch in range(3 + 4):
        assert processor.process_batch().settled == FEW
        assert settled(shop, waiting) == FEW * max(0, batch - 2)
    for _ in range(3):
        _, late = pay(shop, GOOD)
        assert any(shop.outcome_of(late) for _ in batches(processor, 30 // FEW + 1))
    assert shop.scalar("SELECT min(attempts) FROM outbox") >= 3, "they came back all the time"


def test_many_refused_that_come_back_at_once_hold_nobody_up(shop: Shop, make_processor: MakeProcessor) -> None:
    """Refused events use up the savepoints of each transaction.

    A good event behind n of them is settled within 6 + n / 15 batches.
    """
    never_succeed(shop, 60, "refused")
    processor = make_processor(policy=FOR_EVER)
    for _ in range(3):
        late = [pay(shop, GOOD)[1] for _ in range(5)]
        assert any(settled(shop, late) == 5 for _ in batches(processor, 6 + 60 // FEW_IN_DOUBT))
    assert shop.scalar("SELECT min(attempts) FROM outbox") >= 3, "they came back all the time"


# --- events that are not charged: they let others pass


@pytest.mark.usefixtures("both_guards")
def test_pairs_that_somebody_holds_for_ever_make_way(
    shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """A full claim of events with locked pairs costs the patience and one more batch.

    Batches behind such a claim are as full as possible.
    """
    holder = connect()
    held = [shop.paid() for _ in range(25)]
    for payment, event in held:
        shop.mark(event, "created", payment.id)
        hold_pair(holder, payment)
    waiting = [pay(shop, GOOD)[1] for _ in range(20)]
    processor = make_processor(batch_size=FEW)
    made_way = 2 * (STUCK_PASSES_MAX + 1)
    assert any(settled(shop, waiting) == 20 for _ in batches(processor, made_way + 4))
    assert shop.rows("SELECT DISTINCT attempts, last_error FROM outbox") == [(0, None)]
    holder.rollback()
    shop.make_due()
    assert drain_all(processor) == {Outcome.RECOVERED: 25}


# --- what may be the database's fault


@pytest.mark.parametrize("batch_size", [FEW, 1000])
def test_refusals_that_may_be_the_databases_fault_hold_nobody_up(
    shop: Shop, make_processor: MakeProcessor, batch_size: int
) -> None:
    """The worker pauses once for the batch, then once per set that the savepoints suffice for."""
    run(shop, raising("42883"))
    pay_many(shop, 100, BAD)
    pay_many(shop, 5, GOOD)
    waiting = [row.event_id for row in shop.rows("SELECT event_id FROM outbox ORDER BY id")[-5:]]
    processor = make_processor(batch_size=batch_size)
    pauses = 0
    while settled(shop, waiting) < 5:
        pauses += not passes(processor)
    few = min(batch_size, FEW_IN_DOUBT)
    assert 100 // FEW_IN_DOUBT <= pauses <= (batch_size > few) + 100 // few


def test_refusals_are_charged_once_another_purchase_was_written_meanwhile(
    shop: Shop, processor: ProbedProcessor
) -> None:
    """The purchase can be of any batch. Before it is written, the refused events do not change."""
    run(shop, raising("42883"))
    pay_many(shop, 40, BAD)
    was = shop.rows("SELECT * FROM outbox ORDER BY id")
    for _ in range(8):
        assert not passes(processor)
    assert shop.rows("SELECT * FROM outbox ORDER BY id") == was
    pay(shop, GOOD)
    refused = sum(not passes(processor) for _ in range(12))
    assert refused <= 1 + 40 // FEW_IN_DOUBT
    assert shop.rows("SELECT attempts, count(*) FROM outbox GROUP BY 1") == [(1, 40)]
    shop.rows("UPDATE outbox SET due_at = clock_timestamp() WHERE id % 2 = 0")
    assert not passes(processor)
    assert shop.scalar("SELECT max(attempts) FROM outbox") == 1, "each time anew"


def test_beside_one_in_doubt_what_is_an_events_own_fault_is_charged(shop: Shop, processor: ProbedProcessor) -> None:
    """If an earlier batch proved that the database can write, this batch need not prove it."""
    bad, own = f"NEW.course_id = '{BAD}'", "NEW.amount = 13"
    raised = "RAISE EXCEPTION 'no' USING ERRCODE ="
    run(shop, trigger(f"IF {bad} THEN {raised} '42883'; ELSIF {own} THEN {raised} 'P0001'; END IF;"))
    _, doubted = pay(shop, BAD)
    assert not passes(processor)
    shop.rows("UPDATE outbox SET due_at = clock_timestamp() + interval '1 hour'")
    pay(shop, GOOD)
    assert passes(processor)
    shop.make_due()
    _, refused = shop.paid(amount="13.00")
    assert passes(processor)
    assert [shop.event(event).attempts for event in (doubted, refused)] == [1, 1]


def test_a_database_that_stops_writing_purchases_charges_nobody(shop: Shop, processor: ProbedProcessor) -> None:
    """No event is charged, however many purchases were written before."""
    pay_many(shop, 20, GOOD)
    assert passes(processor)
    run(shop, raising("42883", only_bad=False))
    pay_many(shop, 40, GOOD)
    was = shop.rows("SELECT * FROM outbox ORDER BY id")
    for _ in range(12):
        assert not passes(processor)
    assert shop.rows("SELECT * FROM outbox ORDER BY id") == was
    run(shop, NO_TRIGGER)
    assert drain_all(processor) == {Outcome.CREATED: 40}


def test_savepoints_suffice_for_so_few_that_are_in_doubt(
    shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """Otherwise the worker could pass over a good event among them again and again."""
    run(shop, raising("42883", only_bad=False))
    pay_many(shop, FEW_IN_DOUBT, GOOD)
    processor = make_processor(batch_size=FEW_IN_DOUBT)
    trips = RoundTrips(database)
    assert not passes(processor)
    assert trips.savepoints() == [2 * FEW_IN_DOUBT - 1]
    assert 2 * FEW_IN_DOUBT - 1 < MAX_SAVEPOINTS


# --- what is taken alone


@pytest.mark.parametrize("state", ["42883", "40001"])
def test_what_is_taken_alone_in_vain_makes_way(shop: Shop, make_processor: MakeProcessor, state: str) -> None:
    """Nothing in its batch can show whose fault it is.

    The event is neither charged nor accused of a crash again.
    """
    run(shop, raising(state))
    _, bad = pay(shop, BAD)
    _, good = pay(shop, GOOD)
    processor = make_processor(batch_size=1)
    processor.isolate_next(2)
    assert any(shop.outcome_of(good) for _ in tries(processor, STUCK_PASSES_MAX + 2))
    left = shop.event(bad)
    assert (left.attempts, left.crashes, left.last_error) == (0, 0, None)
    assert shop.scalar("SELECT due_at > clock_timestamp() + interval '20 s' FROM outbox")
    run(shop, NO_TRIGGER)
    shop.make_due()
    assert drain_all(processor) == {Outcome.CREATED: 1}


# --- helpers


def never_succeed(shop: Shop, n: int, why: str) -> None:
    if why == "its payment is not there":
        for _ in range(n):
            shop.confirm(Payment(uuid4(), uuid4(), GOOD, "1.00", "EUR"))
        return
    run(shop, REFUSALS["check" if why == "refused" else "trigger at COMMIT"].schema)
    pay_many(shop, n, BAD)


def passes(processor: ProbedProcessor) -> bool:
    """Process one batch. Return False if it met what can be the database's fault."""
    try:
        processor.process_batch()
    except DBAPIError as error:
        if classify(error) is not Failure.UNCLEAR:
            raise
        return False
    return True


def batches(processor: ProbedProcessor, most: int) -> Any:
    return (processor.process_batch() for _ in range(most))


def tries(processor: ProbedProcessor, most: int) -> Any:
    for _ in range(most):
        try:
            yield processor.process_batch()
        except DBAPIError:
            yield None


def settled(shop: Shop, events: list[UUID]) -> int:
    return int(shop.scalar("SELECT count(*) FROM processed_events WHERE event_id = ANY(%s)", events))
