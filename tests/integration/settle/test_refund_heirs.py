"""Refunds: which payment gets the pair after a refund."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from outbox_worker.model import PURCHASE_REFUNDED, Guard, Outcome
from tests.support.factories import Payment, ProbedProcessor, Shop
from tests.support.makers import MakeProcessor
from tests.support.settling import bought, holder, metric, settle

pytestmark = pytest.mark.usefixtures("both_guards")

PAIR_INDEX = "purchases_active_student_course_key"


# --- which payment gets the pair


def test_the_oldest_other_payment_gets_the_pair(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    """The mark of its event still says "duplicate". An event delivered again finds the purchase."""
    first, _ = bought(shop)
    others = [paid_too(shop, first) for _ in range(3)]
    oldest, its_event = others[1]
    shop.rows("UPDATE payments SET created_at = created_at - interval '1 hour' WHERE id = %s", oldest.id)
    assert set(settle(processor).values()) == {Outcome.DUPLICATE_PAYMENT}
    event = shop.refund(first)
    assert settle(processor) == {event: Outcome.REVOKED}
    assert holder(shop, first) == oldest.id
    (passed,) = (each for each in records if each.get("event") == "purchase_passed_on")
    told = {"event_id": str(event), "payment_id": str(first.id), "passed_to": str(oldest.id)}
    assert told.items() <= passed.items()
    assert shop.outcome_of(its_event) == "duplicate_payment"
    shop.confirm(oldest, its_event)
    assert settle(processor) == {its_event: Outcome.ALREADY_EXISTS}
    assert len(shop.purchases(first.pair)) == 2


def test_nobody_is_told_of_who_gets_nothing(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    payment, _ = bought(shop)
    shop.refund(payment)
    settle(processor)
    assert [each for each in records if each.get("event") == "purchase_passed_on"] == []


@pytest.mark.parametrize("status", ["pending", "failed", "refunded"])
def test_only_a_standing_payment_gets_it(shop: Shop, processor: ProbedProcessor, status: str) -> None:
    first, _ = bought(shop)
    shop.payment(status, *first.pair)
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) is None


@pytest.mark.parametrize("kind", ["taken back", "contradicted", "reused", "waived"])
def test_who_has_a_story_of_its_own_does_not(shop: Shop, processor: ProbedProcessor, kind: str) -> None:
    """A revoked purchase is never activated again.

    An event in a person's hands is left to that person.
    """
    first, _ = bought(shop)
    other, free = shop.payment("succeeded", *first.pair), shop.payment("succeeded", *first.pair)
    match kind:
        case "taken back":
            shop.purchase(other, active=False)
        case "contradicted" | "reused":
            shop.dead_letter(other, reason="payment_mismatch" if kind == "contradicted" else "event_id_reused")
        case "waived":
            shop.dead_letter(other, state="discarded", reason="rejected_by_database")
            shop.rows("UPDATE dead_letters SET note = 'paid out in cash'")
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) == free.id


def test_a_dead_letter_for_another_reason_does_not_keep_it_from_a_payment(
    shop: Shop, processor: ProbedProcessor
) -> None:
    first, _ = bought(shop)
    other = shop.payment("succeeded", *first.pair)
    shop.dead_letter(other, reason="payment_not_found")
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) == other.id


def test_who_is_on_its_way_is_left_to_its_own_event(shop: Shop, processor: ProbedProcessor) -> None:
    """The event and its payment can contradict each other. No worker has judged that yet."""
    first, _ = bought(shop)
    late, its_event = paid_too(shop, first, due_in="1 hour", payload={"payment_id": None})
    shop.rows(
        "UPDATE outbox SET payload = jsonb_build_object('payment_id', upper(%s)) WHERE event_id = %s",
        *(str(late.id), its_event),
    )
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) is None
    shop.make_due()
    assert settle(processor) == {its_event: Outcome.CREATED}
    assert holder(shop, first) == late.id


def test_events_of_others_types_keep_nobody_waiting(shop: Shop, make_processor: MakeProcessor) -> None:
    first, _ = bought(shop)
    other = shop.payment("succeeded", *first.pair)
    shop.confirm(other, event_type="RECEIPT_SENT")
    shop.refund(first)
    settle(make_processor(unknown_types="ignore"))
    assert holder(shop, first) == other.id


def test_the_pair_that_a_refund_frees_goes_to_who_waits_longest_though_another_is_on_its_way(
    shop: Shop, processor: ProbedProcessor
) -> None:
    first, _ = bought(shop)
    waiting, _ = paid_too(shop, first)
    settle(processor)
    _, on_its_way = paid_too(shop, first, due_in="1 hour")
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) == waiting.id
    shop.make_due()
    assert settle(processor) == {on_its_way: Outcome.DUPLICATE_PAYMENT}


@pytest.mark.parametrize("by", ["hand", "an earlier delivery"])
def test_who_is_owed_gets_it_though_the_purchase_was_taken_back_before(
    shop: Shop, processor: ProbedProcessor, by: str
) -> None:
    """The shop deactivated the purchase itself, and did not look for other payments.

    In the other case, the payment became a successful one later.
    """
    first, _ = bought(shop)
    if by == "hand":
        shop.rows("UPDATE purchases SET is_active = false, deactivated_at = now()")
    else:
        shop.refund(first)
        settle(processor)
    other = shop.payment("succeeded", *first.pair)
    event = shop.refund(first)
    assert settle(processor) == {event: Outcome.REVOKED}
    assert holder(shop, first) == other.id


def test_of_several_refunds_of_a_pair_one_passes_it_on(shop: Shop, processor: ProbedProcessor) -> None:
    """The refund of the duplicate comes first, then that of the purchase.

    A third payment is successful and gets the pair.
    """
    first, _ = bought(shop)
    second, _ = paid_too(shop, first)
    third, _ = paid_too(shop, first)
    fourth, _ = paid_too(shop, first)
    settle(processor)
    events = [shop.refund(second, due_in="-3 minutes"), shop.refund(first, due_in="-2 minutes")]
    events.append(shop.refund(first, due_in="-1 minute"))
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)
    assert holder(shop, first) == third.id
    assert shop.purchases(fourth) == []


def test_an_archived_payment_passes_its_pair_on(shop: Shop, processor: ProbedProcessor) -> None:
    first, _ = bought(shop)
    shop.rows("UPDATE purchases SET is_active = false")
    shop.rows("DELETE FROM payments")
    other = shop.payment("succeeded", *first.pair)
    shop.confirm(first, event_type=PURCHASE_REFUNDED)
    assert set(settle(processor).values()) == {Outcome.REVOKED}
    assert holder(shop, first) == other.id


@pytest.mark.parametrize("both_guards", ["index"], indirect=True)
@pytest.mark.parametrize("has_heirs", [True, False])
def test_the_index_vanishes_before_a_pair_is_passed_on(shop: Shop, processor: ProbedProcessor, has_heirs: bool) -> None:
    """The grant fails with 42P10, and the same batch is settled by the guard ``lock``.

    Deactivating a purchase needs no guard.
    """
    refunded = [bought(shop)[0] for _ in range(5)]
    next_payments = [shop.payment("succeeded", *payment.pair) for payment in refunded] if has_heirs else []
    events = [shop.refund(payment) for payment in refunded]
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)
    assert processor.watch.state.guard is (Guard.LOCK if has_heirs else Guard.INDEX)
    assert metric(processor, "outbox_constraint_fallback_total") == has_heirs
    assert {row.payment_id for row in shop.rows("SELECT payment_id FROM purchases WHERE is_active")} == {
        heir.id for heir in next_payments
    }


# --- helpers


def paid_too(shop: Shop, like: Payment, **more: Any) -> tuple[Payment, UUID]:
    """Write another payment of the pair, with its event."""
    return shop.paid(student=like.student_id, course=like.course_id, **more)
