"""Expressions and questions that several doors share: two rows of one pair, a payment's status, the database's time."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, FromClause, Text, and_, cast, func, select
from sqlalchemy.orm import Session

from outbox_worker.model import PaymentStatus


def database_time(session: Session) -> datetime:
    """The time by the database's clock, which alone decides what is due."""
    now: datetime = session.scalars(select(func.clock_timestamp())).one()
    return now


def same_pair(one: FromClause, other: FromClause) -> ColumnElement[bool]:
    """Both rows are of the same student and the same course."""
    return and_(one.c.student_id == other.c.student_id, one.c.course_id == other.c.course_id)


def has_status(payments: FromClause, status: PaymentStatus) -> ColumnElement[bool]:
    """The payment has this status; the column may be an enum, so it is compared as text."""
    return cast(payments.c.status, Text) == status.value


def is_succeeded(payments: FromClause) -> ColumnElement[bool]:
    """The payment succeeded and is not refunded: it is *standing*."""
    return has_status(payments, PaymentStatus.SUCCEEDED)
