"""Small expressions and queries that several modules of ``store`` use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Text,
    and_,
    case,
    cast,
    false,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from outbox_worker.keys import KeyKind
from outbox_worker.model import IGNORED, PaymentStatus
from outbox_worker.schema.ids import KEY_TYPES
from outbox_worker.schema.tables import STATUS_VALUES, TYPE_NAMES

NEVER: ColumnElement[datetime] = literal_column("CAST('9999-01-01' AS timestamptz)")
"""The worker never claims an event that is due at this time or later, for example at ``infinity``.

The payment of such an event is not in flight.
"""


def database_time(session: Session) -> datetime:
    """Return the time of the database's clock. Only this clock decides which events are due."""
    now: datetime = session.scalars(select(func.clock_timestamp())).one()
    return now


def read_key(key: ColumnElement[Any]) -> ColumnElement[Any]:
    """Build the id of a payment or event for the result of a ``Statement``.

    An integer becomes a text. A ``Statement`` returns values as psycopg does. In the results of
    other queries, integer ids are texts, too.
    """
    return cast(key, Text) if key.type is KEY_TYPES[KeyKind.INTEGER] else key


def currency_code(currency: ColumnElement[Any]) -> ColumnElement[str]:
    """Build the code of a currency in upper case and without blanks around it.

    The collation C converts only ASCII letters. A Turkish collation would not convert i to I.
    """
    written = cast(currency, Text).op("COLLATE", precedence=15, return_type=Text())(literal_column('"C"'))
    return func.upper(func.btrim(written), type_=Text)


def has_status(payments: FromClause, status: PaymentStatus) -> ColumnElement[bool]:
    """Build the condition that the payment has this status.

    The table can use another name for the status. The condition compares the status as text,
    because the column can be an enum.
    """
    return or_(*(cast(payments.c.status, Text) == text for text in _texts(payments, status)))


def status_of(payments: FromClause) -> ColumnElement[str]:
    """Build the worker's name of the payment's status.

    If the status is unknown, the result is its text in the table.
    """
    other_names = [each for each in PaymentStatus if _texts(payments, each) != [each.value]]
    written: ColumnElement[str] = cast(payments.c.status, Text)
    whens = [(has_status(payments, each), literal_column(f"'{each}'", Text)) for each in other_names]
    return case(*whens, else_=written) if whens else written


def _texts(payments: FromClause, status: PaymentStatus) -> list[str]:
    """Return the texts in the table that mean this status. An ignored status means *pending*."""
    (column,) = payments.c.status.base_columns
    values = column.info[STATUS_VALUES]
    return [*values[status], *(values[IGNORED] if status is PaymentStatus.PENDING else ())]


def is_succeeded(payments: FromClause) -> ColumnElement[bool]:
    """Build the condition that the payment succeeded and is not refunded. Such a payment is called *standing*."""
    return has_status(payments, PaymentStatus.SUCCEEDED)


def type_of(events: FromClause) -> ColumnElement[str]:
    """Build the worker's name of the event's type.

    If the type is unknown, the result is its name in the table.
    """
    written, names = events.c.event_type, _type_names(events)
    whens = [(written == name, literal_column(f"'{event_type}'", Text)) for name, event_type in names.items()]
    return case(*whens, else_=written) if whens else written


def has_type(events: FromClause, event_types: Collection[str]) -> ColumnElement[bool]:
    """Build the condition that the event has one of these types.

    The table can use other names for the types.
    """
    others = [name for name, event_type in _type_names(events).items() if event_type in event_types]
    names = sorted({*event_types, *others})
    return events.c.event_type == (names[0] if len(names) == 1 else func.any(literal(names, ARRAY(Text))))


def _type_names(events: FromClause) -> Mapping[str, str]:
    (column,) = events.c.event_type.base_columns
    names: Mapping[str, str] = column.info[TYPE_NAMES]
    return names


def is_claimable(outbox: FromClause) -> ColumnElement[bool]:
    """Build the condition that a worker can claim the event, now or later.

    Adopted tables can contain NULL. An event without a due time is never due. The worker cannot
    mark an event without an id. The worker has no handler for an event without a type. The CASE
    prevents the planner from reading the whole index on the due time. Reading the index would be
    slow, because nearly all events meet the condition.
    """
    is_complete = and_(outbox.c.due_at < NEVER, outbox.c.event_id.is_not(None), outbox.c.event_type.is_not(None))
    return case((is_complete, true()), else_=false())
