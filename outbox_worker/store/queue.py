"""How statements find claimed events again: by id and by the window of their due times."""

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


def within(moment: ColumnElement[Any]) -> ColumnElement[bool]:
    """Inside the window of a batch: parameters ``window_first`` and ``window_last``.

    What names an event by its id names its window, too. Of a queue that was empty when its statistics were gathered
    the planner believes that every index finds one row: it may look an id up in the index ``(due_at, id)``, end to end.
    """
    first, last = (cast(bindparam(f"window_{end}", type_=Text), DateTime(timezone=True)) for end in DueWindow._fields)
    return moment.between(first, last)


def event_of(keys: FromClause, outbox: Table) -> FromClause:
    """The row of each event that ``keys`` name by their ``id``, for a join on nothing else.

    OFFSET 0 keeps the planner from turning the join round, with a queue in front that it believes to be empty.
    """
    row = select(outbox).where(outbox.c.id == keys.c.id, within(outbox.c.due_at))
    return row.offset(literal_column("0")).lateral("event")


def window_of(batch: Batch) -> dict[str, str]:
    """The values of the parameters of ``within``."""
    return {f"window_{end}": moment for end, moment in batch.window._asdict().items()}
