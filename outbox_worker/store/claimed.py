"""Builds the part of a statement that finds the rows of claimed events by their ids and due times."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    DateTime,
    FromClause,
    Table,
    Text,
    bindparam,
    cast,
    literal_column,
    select,
)

from outbox_worker.model import Batch, DueWindow


def within(due_at: ColumnElement[Any]) -> ColumnElement[bool]:
    """Build the condition that the due time is between the parameters ``window_first`` and ``window_last``.

    Every statement that finds events by id also needs this condition. If ANALYZE ran while the queue was empty, the
    planner may search for an id in the index ``(due_at, id)``. Without this condition, the search would read the whole
    index.
    """
    first, last = (_end_of_window(end) for end in DueWindow._fields)
    return due_at.between(first, last)


def window_start() -> ColumnElement[Any]:
    """Build the earliest due time of the claimed events: the parameter ``window_first``."""
    return _end_of_window("first")


def _end_of_window(end: str) -> ColumnElement[Any]:
    return cast(bindparam(f"window_{end}", type_=Text), DateTime(timezone=True))


def event_of(keys: FromClause, outbox: Table) -> FromClause:
    """Build a lateral subquery that finds the outbox row of each ``id`` in ``keys``. Join the subquery ON true.

    OFFSET 0 forces the planner to start the join at ``keys``. Without OFFSET 0, the planner may start at the outbox if
    the outbox was empty when ANALYZE ran.
    """
    row = select(outbox).where(outbox.c.id == keys.c.id, within(outbox.c.due_at))
    return row.offset(literal_column("0")).lateral("event")


def window_of(batch: Batch) -> dict[str, str]:
    """Return the parameters of ``within``."""
    return {f"window_{end}": due_at for end, due_at in batch.window._asdict().items()}
