"""Confirms and refunds payments of pairs (student, course). A small model predicts the active
purchases."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from uuid import UUID, uuid4

from outbox_worker.model import PURCHASE_CONFIRMED, PURCHASE_REFUNDED
from tests.support.factories import Payment, Shop, payload_text


class Op(NamedTuple):
    """An operation of the payments service: it confirms or refunds a payment, and writes the
    event."""

    event_type: str
    payment: str


CONFIRM_A, CONFIRM_B = Op(PURCHASE_CONFIRMED, "A"), Op(PURCHASE_CONFIRMED, "B")
REFUND_A, REFUND_B = Op(PURCHASE_REFUNDED, "A"), Op(PURCHASE_REFUNDED, "B")
OPS = (CONFIRM_A, CONFIRM_B, REFUND_A, REFUND_B)


def standing(told: Iterable[Op]) -> set[str]:
    """Return the payments of a pair that were confirmed and not refunded. One of them must have the
    active purchase."""
    told = set(told)
    return {name for name in "AB" if Op(PURCHASE_CONFIRMED, name) in told and Op(PURCHASE_REFUNDED, name) not in told}


class Pair:
    """Two payments of one student for one course, and the operations on them so far."""

    def __init__(self) -> None:
        self.key = (uuid4(), uuid4())
        self.payments = {name: Payment(uuid4(), *self.key, "49.90", "EUR") for name in "AB"}
        self.events = {op: uuid4() for op in OPS}
        self.told: list[Op] = []


Telling = tuple[Pair, Op]


def tell(shop: Shop, tellings: Sequence[Telling]) -> None:
    """Write the payment and the event of each operation, in this order. Do not write an event that
    is still in the outbox.

    If the first operation on a payment is a refund, the payment begins as refunded.
    """
    payments, events = [], []
    for pair, op in tellings:
        payment = pair.payments[op.payment]
        payments.append((*payment, "refunded" if op.event_type == PURCHASE_REFUNDED else "succeeded"))
        events.append((pair.events[op], op.event_type, payload_text(payment)))
        pair.told.append(op)
    with shop.connection.transaction(), shop.connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO payments (id, student_id, course_id, amount, currency, status) VALUES (%s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (id) DO UPDATE SET status = 'refunded' WHERE excluded.status = 'refunded'",
            payments,
        )
        cursor.executemany(
            "INSERT INTO outbox (event_id, event_type, payload) VALUES (%s, %s, %s) ON CONFLICT (event_id) DO NOTHING",
            events,
        )


def tell_at_random(shop: Shop, pairs: list[Pair], chance: random.Random, tellings_max: int) -> None:
    """Add new pairs. Run random operations on some pairs, and repeat some of these operations."""
    pairs += [Pair() for _ in range(10)]
    some = chance.sample(pairs[-200:], min(len(pairs), tellings_max, 200))
    tellings = [(pair, chance.choice(OPS)) for pair in some]
    tell(shop, tellings + chance.sample(tellings, len(tellings) // 5))


def check(shop: Shop, pairs: Iterable[Pair], why: object = "") -> None:
    """Assert that exactly the pairs of the model are active, each by a payment that ``standing``
    returns. Assert that the purchases of refunded payments are inactive."""
    rows = shop.rows("SELECT student_id, course_id, payment_id, is_active, deactivated_at FROM purchases")
    active: dict[tuple[UUID, UUID], list[UUID]] = {}
    for row in rows:
        assert row.is_active == (row.deactivated_at is None)
        if row.is_active:
            active.setdefault((row.student_id, row.course_id), []).append(row.payment_id)
    taken_back = {row.payment_id for row in rows if not row.is_active}
    for pair in pairs:
        holders, expected = active.pop(pair.key, []), {pair.payments[name].id for name in standing(pair.told)}
        assert len(holders) == bool(expected), (pair.told, why)
        assert set(holders) <= expected, (pair.told, why)
        refunded = {pair.payments[op.payment].id for op in pair.told if op.event_type == PURCHASE_REFUNDED}
        assert refunded <= taken_back, (pair.told, why)
    assert active == {}
    assert (shop.owed(), shop.count("dead_letters")) == (0, 0)
