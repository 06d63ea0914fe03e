"""Defines the statements that claim events, and reads their results.

A claim locks the rows of due events.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from psycopg.types.numeric import Int8
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    FromClause,
    Row,
    Select,
    Table,
    Text,
    bindparam,
    case,
    cast,
    func,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import array

from outbox_worker.database.arrays import ArrayText, Keys
from outbox_worker.database.expressions import seconds_since
from outbox_worker.model import Batch, DueWindow, Position, Repeated
from outbox_worker.schema.tables import Tables
from outbox_worker.store import payload
from outbox_worker.store.claimed import within_any
from outbox_worker.store.queries import has_type, type_of

_LONGEST_TYPE = 200
_BEFORE_ALL = Position("-infinity", -(2**63))
"""The position before all events: the earliest time and the smallest id."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The events that a claim has locked in this transaction, in the order ``(due_at, id)``."""

    batch: Batch = field(default_factory=Batch)
    transaction_id: str | None = None
    """The id of the transaction.

    If the answer to COMMIT is lost, the worker passes this id to ``pg_xact_status`` and learns
    whether the transaction was committed.
    """
    end: Position | None = None
    """The position of the last event; None if no event was claimed."""
    crash_suspects: Sequence[int] = ()
    """The events of the batch whose crash count is above 0.

    The worker later processes each of these events alone.
    """


@dataclass(frozen=True, slots=True)
class IsolatedEvent:
    """An event that is processed alone."""

    id: int
    crashes: int
    """The number of processes that are proven to have died while they processed only this event."""


def claim_of(tables: Tables, row: Row[Any]) -> Claim:
    """Read the claim from the row that a claim statement returned.

    If the statement found no event, the claim is empty.
    """
    if row.ids is None:
        return Claim()
    types = row.event_types if len(row.event_types) == len(row.ids) else row.event_types * len(row.ids)
    payment_ids, repeated = _read(tables, row)
    window = DueWindow(row.first_due_at, row.end_due_at)
    event_ids, attempts = ArrayText(row.event_ids), ArrayText(row.attempts)
    batch = Batch(row.ids, event_ids, types, payment_ids, attempts, row.lateness, repeated, window)
    return Claim(batch, row.transaction_id, Position(row.end_due_at, row.ids[-1]), row.crash_suspects or ())


def _read(tables: Tables, row: Row[Any]) -> tuple[Sequence[str | None], Sequence[Repeated]]:
    """Return the payment ids in the payloads. If payloads are json or text, also return their other fields."""
    if "documents" not in row._fields:
        return payload.usable_payment_ids(row.candidates, tables.payment_key), ()
    found = [payload.read_document(tables, document) for document in row.documents]
    return [payment_id for payment_id, _ in found], [repeated for _, repeated in found]


def claim_statement(tables: Tables, ours: list[ColumnElement[bool]]) -> Select[Any]:
    """what: claims due events after a position, oldest first; returns one row of arrays with all values to settle them
    lock: FOR UPDATE SKIP LOCKED (settling deletes the row) · index: (due_at, id)
    """
    return _gathered(due_events(tables.outbox, _keys(tables), ours))


def due_events(outbox: Table, columns: Sequence[ColumnElement[Any]], ours: list[ColumnElement[bool]]) -> Select[Any]:
    """Select due events after the position (``start_due_at``, ``start_id``), oldest first, and lock their rows."""
    return (
        select(*columns)
        .where(outbox.c.due_at <= _due_by(), _is_after_start(outbox), *complete(outbox), *ours)
        .order_by(outbox.c.due_at, outbox.c.id)
        .limit(bindparam("limit", type_=BigInteger))
        .with_for_update(skip_locked=True)
    )


def _is_after_start(outbox: Table) -> ColumnElement[bool]:
    return tuple_(outbox.c.due_at, outbox.c.id) > tuple_(start_due_at(), bindparam("start_id", type_=BigInteger))


def start_of(start: Position | None) -> dict[str, Any]:
    """Return the parameters of the position at which a claim begins.

    None means the start of the queue. The id is an ``Int8``, because psycopg sends small numbers as
    other types. PostgreSQL would plan the statement again for each type. No parameter is None,
    because None would also have another type.
    """
    due_at, key = start or _BEFORE_ALL
    return {"start_due_at": due_at, "start_id": Int8(key)}


def start_due_at() -> ColumnElement[Any]:
    """Build the parameter ``start_due_at``: the due time at which a claim begins."""
    return cast(bindparam("start_due_at", type_=Text), DateTime(timezone=True))


def claim_isolated_statement(tables: Tables) -> Select[Any]:
    """what: claims one due event by its id · lock: FOR UPDATE SKIP LOCKED · index: primary key"""
    outbox = tables.outbox
    one = outbox.c.id == bindparam("id", type_=BigInteger)
    return _gathered(select(*_keys(tables)).where(one, outbox.c.due_at <= _due_by()).with_for_update(skip_locked=True))


def claim_these_statement(tables: Tables) -> Select[Any]:
    """what: claims due events by their ids · lock: FOR UPDATE SKIP LOCKED · index: primary key or (due_at, id)"""
    outbox = tables.outbox
    these = outbox.c.id == func.any(bindparam("ids", type_=Keys("bigint")))
    due = (these, within_any(outbox.c.due_at), outbox.c.due_at <= _due_by(), *complete(outbox))
    found = select(*_keys(tables)).where(*due).order_by(outbox.c.due_at, outbox.c.id)
    return _gathered(found.with_for_update(skip_locked=True))


def of_types(outbox: Table, event_types: Collection[str] | None) -> list[ColumnElement[bool]]:
    """Build the condition that an event has one of these types. None means all types."""
    if event_types is None:
        return []
    return [has_type(outbox, event_types)]


def complete(outbox: FromClause) -> list[ColumnElement[bool]]:
    """Build the conditions that the event has an id and a type.

    An adopted table of the shop can allow NULL in these columns. The worker cannot mark an event
    without an id. The worker has no handler for an event without a type. Therefore the worker never
    claims these events. The commands ``doctor`` and ``status`` report these events.
    """
    return [outbox.c.event_id.is_not(None), outbox.c.event_type.is_not(None)]


def counted(column: ColumnElement[int]) -> ColumnElement[int]:
    """Build the value of a counter. NULL counts as 0."""
    return func.coalesce(column, 0)


def is_other(outbox: Table) -> ColumnElement[bool]:
    """Build the condition that an event is not in the parameter ``set_aside``."""
    return outbox.c.id != func.all(bindparam("set_aside", type_=Keys("bigint")))


def _due_by() -> ColumnElement[Any]:
    return func.coalesce(bindparam("until", type_=DateTime(timezone=True)), func.statement_timestamp())


def _keys(tables: Tables) -> list[ColumnElement[Any]]:
    """Return the columns of an event that the worker needs to settle the event."""
    outbox = tables.outbox
    return [
        outbox.c.id,
        outbox.c.event_id,
        func.left(type_of(outbox), _LONGEST_TYPE).label("event_type"),
        payload.claim_columns(tables, outbox),
        counted(outbox.c.attempts).label("attempts"),
        counted(outbox.c.crashes).label("crashes"),
        seconds_since(outbox.c.due_at).label("lateness"),
        outbox.c.due_at.label("due_at"),
    ]


def _gathered(keys: Select[Any]) -> Select[Any]:
    """Aggregate the locked rows into one row of arrays."""
    claimed = keys.cte("claimed").prefix_with("MATERIALIZED")
    first, last = func.min(claimed.c.event_type), func.max(claimed.c.event_type)
    one_for_all = case((first == last, array([first])), else_=func.array_agg(claimed.c.event_type))
    gathered: list[ColumnElement[Any]] = [
        func.array_agg(claimed.c.id).label("ids"),
        _text_of_all(claimed.c.event_id).label("event_ids"),
        one_for_all.label("event_types"),
        func.array_agg(claimed.c.document).label("documents")
        if "document" in claimed.c
        else _text_of_all(claimed.c.candidate).label("candidates"),
        _text_of_all(claimed.c.attempts).label("attempts"),
        func.array_agg(claimed.c.lateness).label("lateness"),
        func.array_agg(claimed.c.id).filter(claimed.c.crashes > 0).label("crash_suspects"),
    ]
    gathered.append(cast(func.min(claimed.c.due_at), Text).label("first_due_at"))
    end = cast(func.max(claimed.c.due_at), Text).label("end_due_at")
    return select(
        *gathered, end, cast(func.pg_current_xact_id_if_assigned(), Text).label("transaction_id")
    ).select_from(claimed)


def _text_of_all(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Aggregate a column into an array in text form. The worker parses the array only if it needs a single value."""
    return cast(func.array_agg(column), Text)


def isolate_statement(outbox: Table, ours: list[ColumnElement[bool]]) -> Select[Any]:
    """what: chooses the first due event · lock: FOR UPDATE SKIP LOCKED, until the choice is committed
    index: (due_at, id), or the primary key if a condition in ``ours`` gives the event's id
    """
    return (
        select(outbox.c.id, counted(outbox.c.crashes).label("crashes"))
        .where(outbox.c.due_at <= _due_by(), *complete(outbox), *ours)
        .order_by(outbox.c.due_at, outbox.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def next_due_statement(outbox: Table, ours: list[ColumnElement[bool]]) -> Select[Any]:
    """what: the seconds since the first event after a position became due; negative if due later
    lock: none · index: (due_at, id)
    """
    first = select(outbox.c.due_at).where(_is_after_start(outbox), *complete(outbox), *ours)
    first = first.order_by(outbox.c.due_at, outbox.c.id).limit(1)
    return select(seconds_since(first.scalar_subquery()).label("late_seconds"))


def due_statement(outbox: Table, ours: list[ColumnElement[bool]]) -> Select[Any]:
    """what: whether any event is due · lock: none · index: (due_at, id)"""
    due = outbox.c.due_at <= bindparam("until", type_=DateTime(timezone=True))
    return select(select(outbox.c.id).where(due, *complete(outbox), *ours).exists())
