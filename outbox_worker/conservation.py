"""The conservation equation: every standing payment is exactly one of seven things.

One SQL CASE, used wherever the question is asked: what is owed, what is proved, why.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, and_, case, cast, exists, select
from sqlalchemy.dialects.postgresql import UUID

from outbox_worker import payload
from outbox_worker.model import CONTRADICTIONS, PURCHASE_CONFIRMED, DeadLetterState, PaymentStatus
from outbox_worker.schema import Tables


class PaymentClass(StrEnum):
    """What explains a standing payment; the first that holds."""

    ACTIVE = "active"
    REVOKED = "revoked"
    DUPLICATE = "duplicate"
    IN_FLIGHT = "in_flight"
    DEAD = "dead"
    WAIVED = "waived"
    UNEXPLAINED = "unexplained"


def is_standing(tables: Tables) -> ColumnElement[bool]:
    """Succeeded and not refunded."""
    return cast(tables.payments.c.status, Text) == PaymentStatus.SUCCEEDED.value


def payment_class(tables: Tables) -> ColumnElement[str]:
    """The class of a row of ``payments``. what: one CASE · lock: none · index: payment_id, the pair's, event ids"""
    payments, purchases = tables.payments, tables.purchases
    own = exists().where(purchases.c.payment_id == payments.c.id)
    return case(
        (own.where(purchases.c.is_active), PaymentClass.ACTIVE.value),
        (own, PaymentClass.REVOKED.value),
        (_pair_is_held(tables), PaymentClass.DUPLICATE.value),
        (payments.c.id.in_(_in_flight(tables)), PaymentClass.IN_FLIGHT.value),
        (payments.c.id.in_(_contradicted(tables)), PaymentClass.DEAD.value),
        (payments.c.id.in_(_waived(tables)), PaymentClass.WAIVED.value),
        else_=PaymentClass.UNEXPLAINED.value,
    )


def _pair_is_held(tables: Tables) -> ColumnElement[bool]:
    payments, held = tables.payments, tables.purchases.alias("held")
    return exists().where(
        held.c.student_id == payments.c.student_id, held.c.course_id == payments.c.course_id, held.c.is_active
    )


def _in_flight(tables: Tables) -> Select[Any]:
    """Payments whose confirmation waits in the outbox; events of other types grant nothing and explain nothing."""
    outbox = tables.outbox
    payment_id = cast(payload.payment_id_text(outbox), UUID(as_uuid=True))
    return select(payment_id).where(outbox.c.event_type == PURCHASE_CONFIRMED, payment_id.is_not(None))


def _contradicted(tables: Tables) -> Select[Any]:
    letters = tables.dead_letters
    reasons = [reason.value for reason in sorted(CONTRADICTIONS)]
    is_open = and_(letters.c.state == DeadLetterState.OPEN.value, letters.c.reason.in_(reasons))
    return select(letters.c.payment_id).where(is_open, letters.c.payment_id.is_not(None))


def _waived(tables: Tables) -> Select[Any]:
    letters = tables.dead_letters
    by_a_person = and_(letters.c.state == DeadLetterState.DISCARDED.value, letters.c.note.is_not(None))
    return select(letters.c.payment_id).where(by_a_person, letters.c.payment_id.is_not(None))
