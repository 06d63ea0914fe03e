"""Settles one batch, and checks the outcomes of its events."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import text

from outbox_worker.model import PURCHASE_CONFIRMED, Outcome, Reason, Verdict
from tests.support.factories import Payment, ProbedProcessor, Shop

STRANGER = UUID("0f0f0f0f-1111-4222-8333-444455556666")
VIA_FAST_PATH = Verdict(Outcome.CREATED, writes=True)
"""The verdict of the fast statement on every event that it settles."""
LAST = 9
"""After this number of tries, an event has one try left."""


def settle(processor: ProbedProcessor) -> dict[UUID, Outcome]:
    """Settle one batch. Return the outcome of each event that has one."""
    return {event: verdict.outcome for event, verdict in judge(processor).items()}


def judge(processor: ProbedProcessor) -> dict[UUID, Verdict]:
    """Settle one batch from the start of the queue. Return the verdict on each event that has one.

    The report contains only the ids of events that a careful transaction judged.
    """
    before = marked(processor)
    processor.judged.clear()
    processor._pacing.frontier.go_back()
    report = processor.process_batch()
    created = dict.fromkeys(marked(processor) - before - processor.judged.keys(), VIA_FAST_PATH)
    assert len(created) == report.created
    return created | processor.judged


def marked(processor: ProbedProcessor) -> set[UUID]:
    """Return the ids of the events that have a mark (row of ``processed_events``)."""
    with processor.database.transaction() as session:
        return set(session.scalars(text("SELECT event_id FROM processed_events")))


def metric(processor: ProbedProcessor, name: str, **labels: str) -> float:
    return processor.telemetry.metrics.registry.get_sample_value(name, labels) or 0


def assert_marked(shop: Shop, event: UUID, outcome: Outcome, payment: Payment) -> None:
    """Assert that the event is settled: it has a mark for its payment, and no row in the outbox or
    in ``dead_letters``."""
    mark = shop.mark_of(event)
    assert (mark.event_type, mark.outcome, mark.payment_id) == (PURCHASE_CONFIRMED, outcome, payment.id)
    assert (mark.recovered_at is not None) == (outcome is Outcome.RECOVERED)
    assert (shop.event(event), shop.letter_of(event)) == (None, None)


def assert_one_purchase(shop: Shop, payment: Payment) -> None:
    """Assert that the payment has one purchase with its values, and that the pair has no other
    active purchase."""
    (made,) = shop.purchases(payment)
    assert (made.student_id, made.course_id) == payment.pair
    assert (str(made.amount), made.currency) == (payment.amount, payment.currency)
    assert (made.is_active, made.deactivated_at) == (True, None)
    assert shop.active_pairs()[payment.pair] == 1


def assert_buried(
    shop: Shop, event: UUID, reason: Reason, payload: str, attempts: int = 1, marked: bool = False
) -> Any:
    """Assert that the event is an open dead letter with its whole payload, and no longer in the
    outbox."""
    letter = shop.letter_of(event)
    assert (letter.reason, letter.attempts, letter.state) == (reason, attempts, "open")
    assert (letter.resolved_at, letter.actor, letter.note) == (None, None, None)
    kept = "SELECT payload = CAST(%s AS jsonb) FROM dead_letters WHERE event_id = %s"
    assert shop.scalar(kept, payload, event), "the payload was not kept as it was"
    assert letter.detail
    assert letter.created_at < letter.dead_at
    assert shop.event(event) is None
    assert (shop.mark_of(event) is not None) == marked
    return letter


def bought(shop: Shop, **of_payment: Any) -> tuple[Payment, UUID]:
    """Write a payment and its active purchase."""
    payment = shop.payment(**of_payment)
    return payment, shop.purchase(payment)


def holder(shop: Shop, payment: Payment) -> UUID | None:
    """Return the payment whose purchase is the active purchase of the pair."""
    held = [row.payment_id for row in shop.purchases(payment.pair) if row.is_active]
    assert len(held) <= 1
    return held[0] if held else None
