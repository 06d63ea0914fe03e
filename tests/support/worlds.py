"""Hypothesis strategies for worlds. A world has pairs (student, course), their payments and the
events of these payments.

A pair can already have an active purchase. An event can have a past: a mark or a dead letter.
Hypothesis draws a world without a database. ``write`` gives the world new ids each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from hypothesis import HealthCheck
from hypothesis import settings as examples
from hypothesis import strategies as st

from outbox_worker.model import (
    FINAL,
    PURCHASE_CONFIRMED,
    PURCHASE_REFUNDED,
    PaymentStatus,
)
from tests.support.factories import ABSENT, Payment, Shop

MAX_ATTEMPTS = 10


STRANGER = UUID("0f0f0f0f-1111-4222-8333-444455556666")


FEW = examples(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


OPTIONAL_KEYS = ("student_id", "course_id", "amount", "currency")


UNUSABLE: dict[str, Any] = {
    "an array": "[]",
    "a string": '"payment_id"',
    "no payment_id": {"payment_id": ABSENT},
    "payment_id null": {"payment_id": None},
    "payment_id a number": {"payment_id": 1},
    "payment_id without hyphens": {"payment_id": STRANGER.hex},
}


DIFFERENT: dict[str, Any] = {
    "another student": {"student_id": STRANGER},
    "another course": {"course_id": STRANGER},
    "another amount": {"amount": 49.91},
    "amount unreadable": {"amount": "dear"},
    "another currency": {"currency": "USD"},
    "all different": {"student_id": 1, "course_id": "", "amount": [], "currency": {}},
}


SAME: dict[str, Any] = {
    "all keys": {},
    "only payment_id": dict.fromkeys(OPTIONAL_KEYS, ABSENT),
    "nulls": dict.fromkeys(OPTIONAL_KEYS),
    "amount a number": {"amount": 49.9},
}


PAYLOADS = SAME | DIFFERENT | UNUSABLE


class EventCase(NamedTuple):
    event_type: str
    payload: str
    mark: tuple[str, str | None] | None
    """The outcome in the mark, and its payment: ``own``, ``stranger`` or None."""
    letter: str | None
    attempts: int
    due_in: str


class PaymentCase(NamedTuple):
    status: str | None
    purchase: bool | None
    """Whether the payment's purchase is active. None means that the payment has no purchase."""
    events: list[EventCase]


class PairCase(NamedTuple):
    holder: str | None
    payments: list[PaymentCase]


class Told(NamedTuple):
    """An event that ``write`` has written, with the drawn cases that belong to it."""

    event_id: UUID
    payment: Payment
    case: EventCase
    of: PaymentCase
    pair: PairCase


def worlds(
    pairs: int, payments: int, events: int, event_type: str = PURCHASE_CONFIRMED
) -> st.SearchStrategy[list[PairCase]]:
    """Draw worlds with at most these numbers of pairs, payments per pair and events per payment.
    Half of the worlds have no past."""
    return st.booleans().flatmap(
        lambda has_past: st.lists(a_pair(payments, events, has_past, event_type), min_size=1, max_size=pairs)
    )


def a_pair(payments: int, events: int, has_past: bool, event_type: str) -> st.SearchStrategy[PairCase]:
    """Draw common cases more often. If an event has a past, the fast statement does not settle
    it."""
    event = st.builds(
        EventCase,
        st.sampled_from([event_type] * 19 + ["LESSON_WATCHED"]),
        st.sampled_from([*SAME] * 8 + [*DIFFERENT] + [*UNUSABLE]),
        st.sampled_from([None] * 2 * len(MARKS) + MARKS if has_past else [None] * 8 + STRANGE_MARKS),
        st.sampled_from([None] * 6 + (["open", "discarded"] if has_past else ["discarded"])),
        st.sampled_from([0, 0, MAX_ATTEMPTS - 2, MAX_ATTEMPTS - 1, MAX_ATTEMPTS + 3]),
        st.sampled_from(["0 seconds", "-1 minute", "-2 minutes"]),
    )
    usual = "succeeded" if event_type == PURCHASE_CONFIRMED else "refunded"
    status = st.sampled_from([usual] * 15 + [*PaymentStatus, None])
    purchase = st.sampled_from([None] * 6 + [True, False])
    payment = st.builds(PaymentCase, status, purchase, st.lists(event, min_size=1, max_size=events))
    holder = st.sampled_from([None] * 4 + ["gift", "other"])
    return st.builds(PairCase, holder, st.lists(payment, min_size=1, max_size=payments)).map(with_one_active)


STRANGE_MARKS = [(outcome, "stranger") for outcome in ("created", "suppressed")]


MARKS = [
    *((outcome, "own") for outcome in (*FINAL, "handled_by_the_old_worker")),
    *((outcome, None) for outcome in ("created", "duplicate_payment", "handled_by_the_old_worker")),
    *STRANGE_MARKS,
]


ALONE = st.deferred(lambda: worlds(pairs=12, payments=1, events=1))


REFUNDS_ALONE = st.deferred(lambda: worlds(pairs=12, payments=1, events=1, event_type=PURCHASE_REFUNDED))


REFUNDS_TOGETHER = st.deferred(lambda: worlds(pairs=6, payments=1, events=3, event_type=PURCHASE_REFUNDED))


TOGETHER = st.deferred(lambda: worlds(pairs=4, payments=3, events=3))


# --- the world, written


def with_one_active(drawn: PairCase) -> PairCase:
    """Change the drawn pair so that it does not begin with two active purchases."""
    payments: list[PaymentCase] = []
    for payment in drawn.payments:
        taken = any(earlier.purchase for earlier in payments)
        payments.append(payment._replace(purchase=False) if payment.purchase and taken else payment)
    return PairCase(None if any(payment.purchase for payment in payments) else drawn.holder, payments)


def write(shop: Shop, world: Sequence[PairCase]) -> list[Told]:
    """Write a world into an empty outbox. First delete the events that an earlier world left
    there."""
    told = []
    with shop.connection.pipeline(), shop.connection.transaction():
        shop.rows("DELETE FROM outbox")
        for pair in world:
            student, course = uuid4(), uuid4()
            if pair.holder:
                other = Payment(uuid4(), student, course, "1.00", "EUR") if pair.holder == "other" else None
                shop.purchase(other, student, course)
            for paid in pair.payments:
                payment = Payment(uuid4(), student, course, "49.90", "EUR")
                if paid.status:
                    shop.payment(paid.status, student, course, id=payment.id)
                if paid.purchase is not None:
                    shop.purchase(payment, active=paid.purchase)
                told += [Told(write_event(shop, payment, case), payment, case, paid, pair) for case in paid.events]
    return told


def write_event(shop: Shop, payment: Payment, case: EventCase) -> UUID:
    event = shop.confirm(payment, None, case.event_type, PAYLOADS[case.payload], case.due_in, case.attempts)
    if case.mark:
        outcome, whose = case.mark
        shop.mark(event, outcome, {"own": payment.id, "stranger": STRANGER, None: None}[whose])
    if case.letter:
        shop.dead_letter(payment, event, reason="payment_not_found", state=case.letter, attempts=7)
    return event
