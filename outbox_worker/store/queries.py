"""Small expressions and queries that several modules of ``store`` use."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, FromClause, Text, and_, case, cast, false, func, literal_column, select, true
from sqlalchemy.orm import Session

from outbox_worker.model import PaymentStatus

NEVER: ColumnElement[datetime] = literal_column("CAST('9999-01-01' AS timestamptz)")
"""An event that is due then or later, for example at ``infinity``, is never claimed; its payment is not in flight."""


def database_time(session: Session) -> datetime:
    """Return the time of the database's clock. Only this clock decides which events are due."""
    now: datetime = session.scalars(select(func.clock_timestamp())).one()
    return now


def currency_code(currency: ColumnElement[Any]) -> ColumnElement[str]:
    """Build the code of a currency in upper case and without blanks around it.

    The collation C converts only ASCII letters. A Turkish collation would convert an i to another letter than I.
    """
    written = cast(currency, Text).op("COLLATE", precedence=15, return_type=Text())(literal_column('"C"'))
    return func.upper(func.btrim(written), type_=Text)


def has_status(payments: FromClause, status: PaymentStatus) -> ColumnElement[bool]:
    """Build the condition that the payment has this status.

    The status is compared as text, because it may be an enum.
    """
    return cast(payments.c.status, Text) == status.value


def is_succeeded(payments: FromClause) -> ColumnElement[bool]:
    """Build the condition that the payment succeeded and is not refunded. Such a payment is called *standing*."""
    return has_status(payments, PaymentStatus.SUCCEEDED)


def is_claimable(outbox: FromClause) -> ColumnElement[bool]:
    """Build the condition that a worker can claim the event, now or later. Adopted tables may contain NULL.

    Without a due time, an event is never due. Without an id, an event cannot be marked. Without a type, an event has no
    handler. The CASE prevents the planner from reading the whole index on the due time. That would be slow, because the
    condition holds for nearly all events.
    """
    is_complete = and_(outbox.c.due_at < NEVER, outbox.c.event_id.is_not(None), outbox.c.event_type.is_not(None))
    return case((is_complete, true()), else_=false())
