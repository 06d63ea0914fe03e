"""How statements find claimed events again: by id, and by the due times between which they lie."""

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
    """The due time is in the window of the batch: parameters ``window_first`` and ``window_last``.

    Every statement that finds an event by its id names the window, too. If the queue was empty when its statistics were
    gathered, the planner takes all indexes for equally good, and may search the whole index ``(due_at, id)`` for an id.
    """
    first, last = (cast(bindparam(f"window_{end}", type_=Text), DateTime(timezone=True)) for end in DueWindow._fields)
    return due_at.between(first, last)


def event_of(keys: FromClause, outbox: Table) -> FromClause:
    """The row of each event, found by the ``id`` of ``keys``; join it ON true.

    OFFSET 0 keeps the planner from starting the join at the outbox, which it may take for empty.
    """
    row = select(outbox).where(outbox.c.id == keys.c.id, within(outbox.c.due_at))
    return row.offset(literal_column("0")).lateral("event")


def window_of(batch: Batch) -> dict[str, str]:
    """The parameters of ``within``."""
    return {f"window_{end}": due_at for end, due_at in batch.window._asdict().items()}
