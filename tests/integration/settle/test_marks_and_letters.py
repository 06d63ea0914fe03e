"""What is written about an event that was met before: its mark and its dead letter."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import pytest

from outbox_worker.model import PURCHASE_CONFIRMED, Outcome
from tests.support.factories import Payment, ProbedProcessor, Shop
from tests.support.settling import settle

pytestmark = pytest.mark.usefixtures("both_guards")

STRANGER = UUID("0f0f0f0f-1111-4222-8333-444455556666")
LAST = 9
WITHOUT_PURCHASE = ["duplicate_payment", "suppressed", "revoked"]
WITH_PURCHASE = ["created", "recovered", "already_exists", "handled_by_the_old_worker"]


# --- marks


def test_a_new_mark_says_what_when_and_for_which_payment(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid()
    started = db_now(shop)
    assert settle(processor) == {event: Outcome.CREATED}
    mark = shop.mark_of(event)
    assert (mark.event_type, mark.outcome, mark.payment_id) == (PURCHASE_CONFIRMED, "created", payment.id)
    assert started <= mark.processed_at <= db_now(shop)
    assert mark.recovered_at is None


@pytest.mark.parametrize("named", [True, False])
def test_a_mark_without_purchase_becomes_created_when_the_pair_is_free(
    shop: Shop, processor: ProbedProcessor, named: bool
) -> None:
    """The event was a duplicate, then the pair was given up: the event is owed a purchase.

    The first outcome was no mistake and is not "recovered".
    """
    paid = [shop.paid() for _ in WITHOUT_PURCHASE]
    marks = mark_each(shop, paid, WITHOUT_PURCHASE, named)
    assert settle(processor) == {event: Outcome.CREATED for _, event in paid}
    for (payment, event), was in zip(paid, marks, strict=True):
        assert shop.mark_of(event) == was._replace(outcome="created", payment_id=payment.id)
        assert [row.is_active for row in shop.purchases(payment)] == [True]


@pytest.mark.parametrize("named", [True, False])
def test_a_mark_without_the_purchase_it_claims_becomes_recovered(
    shop: Shop, processor: ProbedProcessor, named: bool
) -> None:
    paid = [shop.paid() for _ in WITH_PURCHASE]
    marks, started = mark_each(shop, paid, WITH_PURCHASE, named), db_now(shop)
    assert settle(processor) == {event: Outcome.RECOVERED for _, event in paid}
    for (payment, event), was in zip(paid, marks, strict=True):
        now = shop.mark_of(event)
        assert started <= now.recovered_at <= db_now(shop)
        assert now == was._replace(outcome="recovered", payment_id=payment.id, recovered_at=now.recovered_at)
        assert [row.is_active for row in shop.purchases(payment)] == [True]


def test_a_purchase_that_vanished_twice_is_recovered_twice(shop: Shop, processor: ProbedProcessor) -> None:
    """The mark tells of the later recovery. An ordinary replay afterwards does not change it."""
    payment, event = shop.paid()
    shop.mark(event, "created")
    assert settle(processor) == {event: Outcome.RECOVERED}
    first = shop.mark_of(event)
    shop.rows("DELETE FROM purchases")
    shop.confirm(payment, event)
    assert settle(processor) == {event: Outcome.RECOVERED}
    second = shop.mark_of(event)
    assert first.recovered_at < second.recovered_at
    shop.confirm(payment, event)
    assert settle(processor) == {event: Outcome.ALREADY_EXISTS}
    assert shop.mark_of(event) == second


@pytest.mark.parametrize(
    ("found", "settled_as"),
    [
        ("active", Outcome.ALREADY_EXISTS),
        ("inactive", Outcome.SUPPRESSED),
        ("held", Outcome.DUPLICATE_PAYMENT),
        ("refunded", Outcome.SUPPRESSED),
    ],
)
def test_a_mark_keeps_its_outcome_where_nothing_is_granted(
    shop: Shop, processor: ProbedProcessor, found: str, settled_as: Outcome
) -> None:
    """If the mark had no payment, it gets the payment of the event."""
    outcomes = [*WITH_PURCHASE, *WITHOUT_PURCHASE]
    paid = [shop.paid() for _ in outcomes]
    for payment, _ in paid:
        if found in ("active", "inactive"):
            shop.purchase(payment, active=found == "active")
        if found == "held":
            shop.purchase(None, *payment.pair)
        if found == "refunded":
            shop.set_status(payment, "refunded")
    marks, purchases = mark_each(shop, paid, outcomes, named=False), shop.purchases()
    assert settle(processor) == {event: settled_as for _, event in paid}
    for (payment, event), was in zip(paid, marks, strict=True):
        assert shop.mark_of(event) == was._replace(payment_id=payment.id)
    assert shop.purchases() == purchases


def test_a_mark_is_left_alone_by_an_event_that_is_not_settled(shop: Shop, processor: ProbedProcessor) -> None:
    """A retry and a dead letter are no outcomes.

    A reused event id does not change the mark of its first use.
    """
    missing = Payment(uuid4(), uuid4(), uuid4(), "1.00", "EUR")
    waits, dies = shop.confirm(missing), shop.confirm(missing, attempts=LAST)
    reused = shop.paid()[1]
    marks = [
        shop.mark_of(shop.mark(waits, "created")),
        shop.mark_of(shop.mark(dies, "duplicate_payment")),
        shop.mark_of(shop.mark(reused, "created", STRANGER)),
    ]
    assert settle(processor) == {waits: Outcome.RETRIED, dies: Outcome.DEAD, reused: Outcome.DEAD}
    assert [shop.mark_of(event) for event in (waits, dies, reused)] == marks


def test_an_event_that_the_producer_inserts_again_changes_nothing(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid()
    assert settle(processor) == {event: Outcome.CREATED}
    was = shop.mark_of(event), shop.purchases()
    for _ in range(3):
        shop.confirm(payment, event)
        assert settle(processor) == {event: Outcome.ALREADY_EXISTS}
        assert (shop.mark_of(event), shop.purchases()) == was
        assert shop.count("outbox") == 0


def test_a_settled_event_id_with_another_payment_is_for_a_person(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid()
    assert settle(processor) == {event: Outcome.CREATED}
    was = shop.mark_of(event), shop.purchases()
    other = shop.payment()
    shop.confirm(other, event)
    assert settle(processor) == {event: Outcome.DEAD}
    letter = shop.letter_of(event)
    assert (letter.reason, letter.payment_id, letter.state) == ("event_id_reused", other.id, "open")
    assert str(payment.id) in letter.detail
    assert (shop.mark_of(event), shop.purchases()) == was


def test_a_duplicate_becomes_a_purchase_when_the_pair_is_given_up(shop: Shop, processor: ProbedProcessor) -> None:
    """Two payments make one purchase.

    The first payment is refunded, and the second event is delivered again.
    """
    first, one = shop.paid()
    second = shop.payment("succeeded", *first.pair)
    two = shop.confirm(second)
    assert settle(processor) == {one: Outcome.CREATED, two: Outcome.DUPLICATE_PAYMENT}
    shop.rows("UPDATE purchases SET is_active = false, deactivated_at = clock_timestamp()")
    shop.set_status(first, "refunded")
    for payment, event in ((first, one), (second, two)):
        shop.confirm(payment, event)
    assert settle(processor) == {one: Outcome.SUPPRESSED, two: Outcome.CREATED}
    assert (shop.outcome_of(one), shop.outcome_of(two)) == ("created", "created")
    assert [row.is_active for row in shop.purchases(first)] == [False]
    assert [row.is_active for row in shop.purchases(second)] == [True]


# --- dead letters


@pytest.mark.parametrize("state", ["open", "requeued", "discarded", "settled"])
def test_burying_again_opens_the_letter_anew(shop: Shop, processor: ProbedProcessor, state: str) -> None:
    """The dead letter opens again with the new reason, whatever a person did with it before."""
    payment, event = shop.paid(payload={"currency": "USD"}, attempts=3)
    shop.dead_letter(payment, event, "payment_not_found", state, event_type="OLD", payload="[]", detail="old")
    shop.rows("UPDATE dead_letters SET actor = 'ann', note = 'why', headers = '{}', payment_id = NULL")
    was, row = shop.letter_of(event), shop.event(event)
    assert settle(processor) == {event: Outcome.DEAD}
    now = shop.letter_of(event)
    assert (now.state, now.resolved_at, now.actor, now.note) == ("open", None, "ann", "why")
    assert (now.reason, now.attempts, now.payment_id) == ("payment_mismatch", 4, payment.id)
    assert now.detail == "differs from the payment row: currency"
    assert (now.event_type, now.payload, now.headers, now.created_at) == (
        *(PURCHASE_CONFIRMED, row.payload, None, row.created_at),
    )
    assert now.dead_at > was.dead_at
    assert shop.count("dead_letters") == 1


def test_a_letter_keeps_the_whole_event(shop: Shop, processor: ProbedProcessor) -> None:
    event = shop.confirm(None, payload='{"note": "ä", "deep": [1, {"two": null}]}', due_in="-1 day")
    shop.rows("UPDATE outbox SET headers = '{\"trace\": \"7\"}', created_at = created_at - interval '1 day'")
    row, started = shop.event(event), db_now(shop)
    assert settle(processor) == {event: Outcome.DEAD}
    letter = shop.letter_of(event)
    assert (letter.event_type, letter.payload, letter.headers, letter.created_at) == (
        *(row.event_type, row.payload, row.headers, row.created_at),
    )
    assert started <= letter.dead_at <= db_now(shop)
    assert letter.payment_id is None


SETTLED_AFTER_ALL: dict[str, dict[str, Any]] = {
    "created": {},
    "recovered": {"mark": "created"},
    "already_exists": {"purchase": True},
    "suppressed": {"purchase": False},
    "duplicate_payment": {"gift": True},
}


@pytest.mark.parametrize("outcome", SETTLED_AFTER_ALL)
def test_settling_closes_the_open_letter(shop: Shop, processor: ProbedProcessor, outcome: str) -> None:
    """Nobody has to work on an event that was settled.

    Dead letters of other events do not change.
    """
    facts = SETTLED_AFTER_ALL[outcome]
    payment, event = shop.paid()
    if "mark" in facts:
        shop.mark(event, facts["mark"], payment.id)
    if "purchase" in facts:
        shop.purchase(payment, active=facts["purchase"])
    if "gift" in facts:
        shop.purchase(None, *payment.pair)
    was = shop.letter_of(shop.dead_letter(payment, event, detail="kept"))
    bystander = shop.letter_of(shop.dead_letter(payment))
    started = db_now(shop)
    assert settle(processor) == {event: Outcome(outcome)}
    now = shop.letter_of(event)
    assert started <= now.resolved_at <= db_now(shop)
    assert now == was._replace(state="settled", resolved_at=now.resolved_at)
    assert shop.letter_of(bystander.event_id) == bystander


@pytest.mark.parametrize("is_judged", [False, True], ids=["by the fast statement", "one by one"])
def test_settling_leaves_a_closed_letter_as_it_was(shop: Shop, processor: ProbedProcessor, is_judged: bool) -> None:
    paid = {state: shop.paid() for state in ("requeued", "discarded", "settled")}
    for _, event in paid.values():
        if is_judged:
            shop.mark(event)
    was = [shop.letter_of(shop.dead_letter(*paid[state], state=state)) for state in paid]
    outcome = Outcome.RECOVERED if is_judged else Outcome.CREATED
    assert settle(processor) == {event: outcome for _, event in paid.values()}
    assert [shop.letter_of(event) for _, event in paid.values()] == was


def test_a_retry_leaves_the_letter_open(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid(status="pending")
    was = shop.letter_of(shop.dead_letter(payment, event))
    assert settle(processor) == {event: Outcome.RETRIED}
    assert shop.letter_of(event) == was


def test_one_letter_through_the_life_of_an_event_that_comes_back_twice(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid(status="pending", attempts=LAST)
    assert settle(processor) == {event: Outcome.DEAD}
    assert (shop.letter_of(event).state, shop.letter_of(event).reason) == ("open", "payment_not_succeeded")
    shop.set_status(payment, "succeeded")
    shop.confirm(payment, event)
    assert settle(processor) == {event: Outcome.CREATED}
    assert shop.letter_of(event).state == "settled"
    shop.rows("DELETE FROM purchases")
    shop.confirm(payment, event, payload={"amount": "1.00"})
    assert settle(processor) == {event: Outcome.DEAD}
    assert (shop.letter_of(event).state, shop.letter_of(event).reason) == ("open", "payment_mismatch")
    assert (shop.count("dead_letters"), shop.count("processed_events"), shop.count("outbox")) == (1, 1, 0)


# --- helpers


def mark_each(shop: Shop, paid: list[tuple[Payment, UUID]], outcomes: list[str], named: bool) -> list[Any]:
    """Mark each event with an outcome, for its payment if ``named``.

    Return the marks as they are now.
    """
    return [
        shop.mark_of(shop.mark(event, outcome, payment.id if named else None))
        for (payment, event), outcome in zip(paid, outcomes, strict=True)
    ]


def db_now(shop: Shop) -> datetime:
    now: datetime = shop.scalar("SELECT clock_timestamp()")
    return now
