"""Reads the records of a payment: its row, events, dead letters, marks and purchases.

``look_up`` finds these records by the id of an event, payment, purchase or student. Call
``look_up`` in a snapshot. Then the records of all tables are from the same moment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, Table, Text, cast, func, or_, select, true
from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

from outbox_worker.database.engine import savepoint
from outbox_worker.database.expressions import readable
from outbox_worker.keys import Key
from outbox_worker.schema.ids import IdColumn
from outbox_worker.schema.tables import Tables
from outbox_worker.store import payload
from outbox_worker.store.dead_letters import DeadLetter, read_letters
from outbox_worker.store.identity import folded_pair, is_bought_id, is_id, same_pair
from outbox_worker.store.queries import is_claimable, status_of, type_of

_Row = TypeVar("_Row")

PAYMENTS_MAX = 100
"""Read at most this many payments of one student. If the student has more payments, read the
oldest."""


@dataclass(frozen=True, slots=True)
class PaymentRow:
    id: Key
    student_id: Any
    course_id: Any
    amount: Decimal | None
    currency: str | None
    status: str | None
    created_at: datetime | None
    """Is None if Python cannot represent the time, for example ``-infinity``. This rule applies to
    all times in this module."""
    pair: tuple[str, str] = field(repr=False)
    """Two texts that identify student and course. A purchase of the same student and course has the same texts."""


@dataclass(frozen=True, slots=True)
class PurchaseRow:
    id: Any
    student_id: Any
    course_id: Any
    payment_id: Key | None
    """The payment that paid for the purchase. None means that the purchase is a gift."""
    is_active: bool
    created_at: datetime | None
    deactivated_at: datetime | None
    pair: tuple[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class WaitingEvent:
    """A row of the outbox."""

    event_id: Key | None
    """None means that the column is NULL. In an adopted table (our migrations did not create it),
    ``event_id`` and ``event_type`` can be NULL."""
    event_type: str | None
    created_at: datetime | None
    due_at: datetime | None
    attempts: int
    crashes: int
    last_error: str | None
    is_due: bool
    is_claimable: bool
    """Whether a worker can claim the event, now or later."""
    payment_id: Key | None
    """The payment that the payload names."""


@dataclass(frozen=True, slots=True)
class MarkRow:
    event_id: Key | None
    event_type: str | None
    outcome: str | None
    payment_id: Key | None
    processed_at: datetime | None
    recovered_at: datetime | None


@dataclass(frozen=True, slots=True)
class Records:
    payments: Sequence[PaymentRow] = ()
    purchases: Sequence[PurchaseRow] = ()
    """The purchases of ``payments``, and the active purchases of the same students and courses."""
    waiting: Sequence[WaitingEvent] = ()
    letters: Sequence[DeadLetter] = ()
    marks: Sequence[MarkRow] = ()

    @property
    def traces(self) -> Sequence[WaitingEvent | DeadLetter | MarkRow]:
        """Return the records of events: waiting events, dead letters and marks."""
        return [*self.waiting, *self.letters, *self.marks]

    @property
    def event_ids(self) -> list[Key]:
        """Return the ids of all events that have a record."""
        return list(dict.fromkeys(each.event_id for each in self.traces if each.event_id is not None))

    @property
    def nameless(self) -> list[WaitingEvent | DeadLetter | MarkRow]:
        """Return the records of events whose payment is unknown.

        No record of such an event names a payment.
        """
        named = {each.event_id for each in self.traces if each.payment_id is not None}
        return [each for each in self.traces if each.event_id not in named]

    @property
    def payment_ids(self) -> list[Key]:
        """Return the ids of payments.

        Payments that have a row come first. Payments that only an event, mark or purchase names
        come last.
        """
        named = [each.payment_id for each in (*self.traces, *self.purchases)]
        known = [each for each in named if each is not None]
        return list(dict.fromkeys([*(each.id for each in self.payments), *known]))


@dataclass(frozen=True, slots=True)
class Found:
    """The kinds of things that have a given id, and their records."""

    kinds: Sequence[str]
    """Any of ``event``, ``payment``, ``purchase``, ``student``. Usually, the list contains one
    kind. If nothing has the id, the list is empty."""
    payment_ids: Sequence[Key]
    records: Records
    gifts: Sequence[PurchaseRow]
    """Gifts (purchases without a payment) that belong to the student or have the given id."""
    has_more: bool
    """Whether the student has more payments than ``PAYMENTS_MAX``."""


def look_up(session: Session, tables: Tables, asked: str) -> Found:
    """Find everything that has this id.

    If an event, mark or purchase names a payment, the payment is found even if it has no row.
    """
    event, payment = tables.event_key.parse(asked), tables.payment_key.parse(asked)
    of_event = _read_events(session, tables, events=[event]) if event else Records()
    own = tables.purchases.c
    bought = _ask(session, lambda: _read_purchases(session, tables, is_id(IdColumn(), own.id, asked)))
    of_student = _ask(session, lambda: session.scalars(_payments_of(tables, asked)).all())
    same = tables.ids.student_id
    is_gift = is_bought_id(same, own.student_id, asked), own.payment_id.is_(None)
    gifts = _ask(session, lambda: _read_purchases(session, tables, *is_gift))
    of_purchase = [each.payment_id for each in bought if each.payment_id]
    concerned = [*of_student[:PAYMENTS_MAX], *of_event.payment_ids, *of_purchase, *([payment] if payment else [])]
    records = read(session, tables, of_event.event_ids, dict.fromkeys(concerned))
    known = set(records.payment_ids)
    is_known = payment in known
    kinds = {"event": of_event.event_ids, "payment": is_known, "purchase": bought, "student": of_student or gifts}
    return Found(
        [kind for kind, found in kinds.items() if found],
        [each for each in dict.fromkeys(concerned) if each in known],
        records,
        [*gifts, *(each for each in bought if each.payment_id is None)],
        len(of_student) > PAYMENTS_MAX,
    )


def _ask(session: Session, read: Callable[[], Sequence[_Row]]) -> Sequence[_Row]:
    """Return the rows that the function ``read`` finds.

    Return no rows if the id is not valid for the type of the column.
    """
    try:
        with savepoint(session):
            return read()
    except DataError:
        return ()


def read(session: Session, tables: Tables, events: Collection[Key], payments: Iterable[Key]) -> Records:
    """Read the records of these events and payments."""
    ids = list(payments)
    of_events = _read_events(session, tables, events, ids)
    return Records(
        _read_payments(session, tables, ids),
        _read_purchases(session, tables, _is_of_or_holds_pair_of(tables, ids)),
        of_events.waiting,
        of_events.letters,
        of_events.marks,
    )


def _payments_of(tables: Tables, student: str) -> Select[Any]:
    """what: a student's payments, from payments and purchases · lock: none · index: the pair's"""
    paid, own, same = tables.payments, tables.purchases, tables.ids.student_id
    of_rows = select(paid.c.id, paid.c.created_at).where(is_id(same.paid, paid.c.student_id, student))
    of_purchases = select(own.c.payment_id, own.c.created_at).where(is_bought_id(same, own.c.student_id, student))
    both = of_rows.union_all(of_purchases.where(own.c.payment_id.is_not(None))).subquery("both")
    return (
        select(both.c.id).group_by(both.c.id).order_by(func.min(both.c.created_at), both.c.id).limit(PAYMENTS_MAX + 1)
    )


def _read_payments(session: Session, tables: Tables, ids: Collection[Key]) -> list[PaymentRow]:
    """what: payments, the oldest first · lock: none · index: primary key"""
    paid = tables.payments
    texts = [cast(paid.c.currency, Text).label("currency"), status_of(paid).label("status")]
    columns = [
        *(paid.c[key] for key in ("id", "student_id", "course_id", "amount")),
        *texts,
        readable(paid.c.created_at),
    ]
    columns += folded_pair(tables.ids, paid)
    found = select(*columns).where(paid.c.id.in_(ids)).order_by(paid.c.created_at, paid.c.id)
    return [PaymentRow(*_with_pair(row)) for row in session.execute(found)]


def _read_purchases(session: Session, tables: Tables, *conditions: ColumnElement[bool]) -> list[PurchaseRow]:
    own = tables.purchases
    columns = [own.c[key] for key in ("id", "student_id", "course_id", "payment_id", "is_active")]
    times = [readable(own.c[key]) for key in ("created_at", "deactivated_at")]
    read = select(*columns, *times, *folded_pair(tables.ids, own))
    rows = session.execute(read.where(*conditions).order_by(own.c.created_at, own.c.id))
    return [PurchaseRow(*_with_pair(row)) for row in rows]


def _with_pair(row: Sequence[Any]) -> tuple[Any, ...]:
    """Combine the last two values of a row (the texts from ``folded_pair``) into one tuple."""
    *values, student, course = row
    return *values, (student, course)


def _is_of_or_holds_pair_of(tables: Tables, ids: Collection[Key]) -> ColumnElement[bool]:
    """what: purchases of payments, and active purchases of the pairs of these payments
    lock: none · index: payment_id, the pair's
    """
    own, paid = tables.purchases.alias("own"), tables.payments
    rows = own.join(paid, same_pair(tables.ids, own, paid))
    holding = select(own.c.id).select_from(rows).where(paid.c.id.in_(ids), own.c.is_active)
    return tables.purchases.c.id.in_(select(own.c.id).where(own.c.payment_id.in_(ids)).union(holding))


def _read_events(session: Session, tables: Tables, events: Collection[Key], payments: Collection[Key] = ()) -> Records:
    """Read the records of events that have one of these event ids or one of these payment ids."""
    letters = tables.dead_letters
    of_them = or_(letters.c.event_id.in_(events), letters.c.payment_id.in_(payments))
    return Records(
        waiting=_read_waiting(session, tables, events, payments),
        letters=read_letters(session, tables, of_them),
        marks=_read_marks(session, tables.processed_events, events, payments),
    )


def _read_waiting(
    session: Session, tables: Tables, events: Collection[Key], payments: Collection[Key]
) -> list[WaitingEvent]:
    """what: events in the outbox · lock: none · index: event_id; a search by payment reads all events"""
    outbox, named = tables.outbox, payload.payment_id_text(tables, tables.outbox)
    of_them = or_(outbox.c.event_id.in_(events), named.in_([str(each) for each in payments]))
    columns = [
        outbox.c.event_id.label("event_id"),
        type_of(outbox).label("event_type"),
        *(readable(outbox.c[key]) for key in ("created_at", "due_at")),
        *(func.coalesce(outbox.c[key], 0).label(key) for key in ("attempts", "crashes")),
        outbox.c.last_error.label("last_error"),
        (outbox.c.due_at <= func.statement_timestamp()).is_(true()).label("is_due"),
        is_claimable(outbox).is_(true()).label("is_claimable"),
        named.label("payment_id"),
    ]
    rows = session.execute(select(*columns).where(of_them).order_by(outbox.c.created_at, outbox.c.id))
    parse = tables.payment_key.parse
    return [WaitingEvent(**row._asdict() | {"payment_id": parse(row.payment_id or "")}) for row in rows]


def _read_marks(session: Session, marks: Table, events: Collection[Key], payments: Collection[Key]) -> list[MarkRow]:
    """what: marks · lock: none · index: event_id; a search by payment reads all marks"""
    columns = [marks.c[key] for key in ("event_id", "event_type", "outcome", "payment_id")]
    times = [readable(marks.c[key]) for key in ("processed_at", "recovered_at")]
    of_them = or_(marks.c.event_id.in_(events), marks.c.payment_id.in_(payments))
    rows = session.execute(select(*columns, *times).where(of_them).order_by(marks.c.processed_at, marks.c.event_id))
    return [MarkRow(*row) for row in rows]
