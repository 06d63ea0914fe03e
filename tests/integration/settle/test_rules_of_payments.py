"""Rules 6 to 9 of one event, end to end under both guards: what its payment and its pair say.

The numbers are those of ``decide``. In a test named ``…_comes_before_…`` two rules apply, and the
first must win.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from outbox_worker.model import PURCHASE_CONFIRMED, Outcome, Reason
from tests.support.factories import ABSENT, ProbedProcessor, Shop, payload_text
from tests.support.makers import MakeProcessor
from tests.support.settling import STRANGER, assert_buried, assert_marked, assert_one_purchase, metric, settle

pytestmark = pytest.mark.usefixtures("both_guards")

CLAIMING_MARKS = ["created", "recovered", "already_exists", "handled_by_the_old_worker"]

OTHER_MARKS = ["duplicate_payment", "suppressed", "revoked"]


# --- 6: event and payment contradict each other


DIFFERENT: dict[str, Mapping[str, Any]] = {
    "student": {"student_id": STRANGER},
    "student not a string": {"student_id": 7},
    "student in braces": {"student_id": f"{{{STRANGER}}}"},
    "student empty": {"student_id": ""},
    "course": {"course_id": STRANGER},
    "amount": {"amount": "49.91"},
    "amount a number": {"amount": 49.91},
    "amount by little": {"amount": "49.900000001"},
    "amount negative": {"amount": "-49.90"},
    "amount with a comma": {"amount": "49,90"},
    "amount not a number": {"amount": "NaN"},
    "amount endless": {"amount": "Infinity"},
    "amount empty": {"amount": ""},
    "amount true": {"amount": True},
    "amount an object": {"amount": {"value": "49.90"}},
    "amount with a huge exponent": {"amount": "1e999999"},
    "amount of many digits": {"amount": "49.90" + "0" * 500 + "1"},
    "currency": {"currency": "USD"},
    "currency too long": {"currency": "EURO"},
    "currency a number": {"currency": 978},
}


def test_rule_6_each_contradiction_is_buried(shop: Shop, processor: ProbedProcessor) -> None:
    paid = {name: shop.paid(payload=payload) for name, payload in DIFFERENT.items()}
    assert settle(processor) == {event: Outcome.DEAD for _, event in paid.values()}
    for name, (payment, event) in paid.items():
        text = payload_text(payment, DIFFERENT[name])
        letter = assert_buried(shop, event, Reason.PAYMENT_MISMATCH, text)
        assert letter.payment_id == payment.id
        assert letter.detail == f"differs from the payment row: {', '.join(DIFFERENT[name])}", name
    assert shop.purchases() == []


def test_rule_6_names_every_key_that_differs_and_no_value(shop: Shop, processor: ProbedProcessor) -> None:
    _, event = shop.paid(payload={"student_id": STRANGER, "course_id": STRANGER, "amount": "1", "currency": "XTS"})
    assert settle(processor) == {event: Outcome.DEAD}
    detail = shop.letter_of(event).detail
    assert detail == "differs from the payment row: student_id, course_id, amount, currency"


def test_rule_6_comes_before_7(shop: Shop, processor: ProbedProcessor) -> None:
    other = {"amount": "1.00"}
    paid = [shop.paid(status=status, payload=other) for status in ("pending", "failed", "refunded")]
    assert settle(processor) == {event: Outcome.DEAD for _, event in paid}
    for payment, event in paid:
        assert_buried(shop, event, Reason.PAYMENT_MISMATCH, payload_text(payment, other))


def test_rule_6_comes_before_8_and_9(shop: Shop, processor: ProbedProcessor) -> None:
    """A mark that claims a purchase does not help an event that contradicts its payment."""
    payment, held = shop.paid(payload={"currency": "USD"})
    shop.purchase(student=payment.student_id, course=payment.course_id)
    other, marked = shop.paid(payload={"currency": "USD"})
    shop.mark(marked, "created", other.id)
    assert settle(processor) == {held: Outcome.DEAD, marked: Outcome.DEAD}
    assert shop.letter_of(held).reason == shop.letter_of(marked).reason == "payment_mismatch"
    assert len(shop.purchases()) == 1


SAME: dict[str, Mapping[str, Any]] = {
    "only the payment": dict.fromkeys(["student_id", "course_id", "amount", "currency"], ABSENT),
    "nulls": dict.fromkeys(["student_id", "course_id", "amount", "currency"]),
    "amount short": {"amount": "49.9"},
    "amount long": {"amount": "49.900"},
    "amount with a sign": {"amount": "+49.90"},
    "amount with zeros in front": {"amount": "0049.90"},
    "amount as exponent": {"amount": "4.99e1"},
    "amount as large exponent": {"amount": "4990E-2"},
    "keys we do not read": {"note": "x" * 10_000, "student": STRANGER, "nested": {"payment_id": STRANGER}},
}

SAME_AS_NUMBER = ["49.9", "49.90", "49.900", "4.99e1", "4990e-2"]


def test_rule_6_the_same_said_otherwise_is_no_contradiction(shop: Shop, processor: ProbedProcessor) -> None:
    paid = [shop.paid(payload=payload) for payload in SAME.values()]
    for number in SAME_AS_NUMBER:
        payment = shop.payment()
        paid.append((payment, shop.confirm(payment, payload=f'{{"payment_id": "{payment.id}", "amount": {number}}}')))
    assert settle(processor) == {event: Outcome.CREATED for _, event in paid}
    for payment, _ in paid:
        assert_one_purchase(shop, payment)


def test_rule_6_upper_case_ids_are_the_same(shop: Shop, processor: ProbedProcessor) -> None:
    payment = shop.payment()
    upper = {key: str(getattr(payment, key)).upper() for key in ("student_id", "course_id")}
    event = shop.confirm(payment, payload=upper | {"payment_id": str(payment.id).upper()})
    again = shop.confirm(payment, payload=upper | {"payment_id": str(payment.id).upper()}, due_in="-1 hour")
    assert settle(processor) == {again: Outcome.CREATED, event: Outcome.ALREADY_EXISTS}
    assert_one_purchase(shop, payment)


# --- 7: refunded


def test_rule_7_a_refunded_payment_comes_before_8_and_9(shop: Shop, processor: ProbedProcessor) -> None:
    free, held = shop.paid(status="refunded"), shop.paid(status="refunded")
    shop.purchase(None, *held[0].pair)
    before = shop.purchases()
    assert settle(processor) == {free[1]: Outcome.SUPPRESSED, held[1]: Outcome.SUPPRESSED}
    for payment, event in (free, held):
        assert_marked(shop, event, Outcome.SUPPRESSED, payment)
    assert shop.purchases() == before


# --- 8: the pair is held


@pytest.mark.parametrize("holder", ["another payment", "a gift"])
def test_rule_8_a_held_pair_is_a_duplicate_payment(shop: Shop, processor: ProbedProcessor, holder: str) -> None:
    """The mark can have any outcome. The mark does not change."""
    marks = [None, *CLAIMING_MARKS, *OTHER_MARKS]
    paid = [shop.paid() for _ in marks]
    for (payment, event), marked in zip(paid, marks, strict=True):
        shop.purchase(shop.payment("succeeded", *payment.pair) if holder == "another payment" else None, *payment.pair)
        if marked:
            shop.mark(event, marked, payment.id)
    before = shop.purchases()
    assert settle(processor) == {event: Outcome.DUPLICATE_PAYMENT for _, event in paid}
    assert_marked(shop, paid[0][1], Outcome.DUPLICATE_PAYMENT, paid[0][0])
    for (_, event), marked in zip(paid[1:], marks[1:], strict=True):
        assert (shop.event(event), shop.letter_of(event)) == (None, None)
        assert (shop.mark_of(event).outcome, shop.mark_of(event).recovered_at) == (marked, None)
    assert shop.purchases() == before
    counted = metric(processor, "outbox_events_total", event_type=PURCHASE_CONFIRMED, outcome="duplicate_payment")
    assert counted == len(paid)


def test_rule_8_an_inactive_purchase_holds_nothing(shop: Shop, processor: ProbedProcessor) -> None:
    (first, one), (second, other) = shop.paid(), shop.paid()
    shop.purchase(shop.payment("refunded", *first.pair), active=False)
    shop.purchase(None, *second.pair, active=False)
    assert settle(processor) == {one: Outcome.CREATED, other: Outcome.CREATED}
    assert_one_purchase(shop, first)
    assert_one_purchase(shop, second)


@pytest.mark.parametrize("gap", ["0 seconds", "-1 hour"])
def test_rule_8_of_two_payments_in_one_batch_the_older_event_wins(
    shop: Shop, processor: ProbedProcessor, gap: str
) -> None:
    payment, event = shop.paid()
    other = shop.payment("succeeded", *payment.pair)
    second = shop.confirm(other, due_in=gap)
    winner, loser = (event, second) if gap == "0 seconds" else (second, event)
    assert settle(processor) == {winner: Outcome.CREATED, loser: Outcome.DUPLICATE_PAYMENT}
    assert_marked(shop, loser, Outcome.DUPLICATE_PAYMENT, other if loser == second else payment)
    assert len(shop.purchases(payment.pair)) == 1


# --- 9: the purchase is inserted


@pytest.mark.parametrize(("marks", "outcome"), [(CLAIMING_MARKS, Outcome.RECOVERED), (OTHER_MARKS, Outcome.CREATED)])
def test_rule_9_what_a_mark_claimed_tells_recovered_from_created(
    shop: Shop, processor: ProbedProcessor, marks: list[str], outcome: Outcome
) -> None:
    paid = [shop.paid() for _ in range(2 * len(marks))]
    for (payment, event), marked in zip(paid, marks * 2, strict=True):
        named = (payment, event) in paid[: len(marks)]
        shop.mark(event, marked, payment.id if named else None)
    assert settle(processor) == {event: outcome for _, event in paid}
    for payment, event in paid:
        assert_marked(shop, event, outcome, payment)
        assert_one_purchase(shop, payment)


def test_rule_9_counts_what_it_did(shop: Shop, processor: ProbedProcessor, both_guards: str) -> None:
    shop.pay_many(7)
    payment, event = shop.paid()
    shop.mark(event, "created", payment.id)
    settle(processor)
    assert metric(processor, "outbox_events_total", event_type=PURCHASE_CONFIRMED, outcome="created") == 7
    assert metric(processor, "outbox_events_total", event_type=PURCHASE_CONFIRMED, outcome="recovered") == 1
    assert metric(processor, "outbox_transactions_total", result="commit") == 2, "one fast, one careful"
    assert metric(processor, "outbox_settle_latency_seconds_count") == 8
    assert metric(processor, "outbox_batch_size_sum") == 8 + 1
    assert metric(processor, "outbox_constraint_fallback_total") == 2 * (both_guards == "lock")


def test_an_empty_outbox_leaves_no_trace(shop: Shop, processor: ProbedProcessor) -> None:
    shop.paid(due_in="1 minute")
    assert settle(processor) == {}
    assert metric(processor, "outbox_transactions_total", result="commit") == 0
    assert metric(processor, "outbox_constraint_fallback_total") == 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_takes_the_oldest_first(shop: Shop, make_processor: MakeProcessor, batch_size: int) -> None:
    events = [shop.paid(due_in=f"-{minutes} minutes")[1] for minutes in (1, 3, 2, 5, 4)]
    oldest_first = [events[place] for place in (3, 4, 1, 2, 0)]
    assert {*settle(make_processor(batch_size=batch_size))} == {*oldest_first[:batch_size]}
