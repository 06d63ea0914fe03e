"""Builds parts of statements that find claimed events by their ids and due times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    DateTime,
    FromClause,
    Table,
    Text,
    bindparam,
    cast,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY

from outbox_worker.model import Batch, DueWindow


def within(due_at: ColumnElement[Any]) -> ColumnElement[bool]:
    """Build the condition that the due time is between ``window_first`` and ``window_last``.

    These two parameters are the first and the last due time of the claimed events. Every statement
    that finds events by id also needs this condition on the due time. If ANALYZE ran while the
    queue was empty, the planner can search for an id in the index ``(due_at, id)``. Without this
    condition, that search would read the whole index.
    """
    first, last = (_end_of_window(end) for end in DueWindow._fields)
    return due_at.between(first, last)


def within_any(due_at: ColumnElement[Any]) -> ColumnElement[bool]:
    """Build the condition that the due time lies in the time range of several claims.

    The range goes from the first time in ``window_firsts`` to the last time in ``window_lasts``.
    These parameters contain the windows of the claims, in any order.
    """
    firsts, lasts = (_times(f"window_{end}s") for end in DueWindow._fields)
    earliest = select(func.min(firsts.c.due_at)).scalar_subquery()
    return due_at.between(earliest, select(func.max(lasts.c.due_at)).scalar_subquery())


def _times(parameter: str) -> FromClause:
    times = cast(bindparam(parameter, type_=ARRAY(Text)), ARRAY(DateTime(timezone=True)))
    return func.unnest(times).table_valued("due_at").render_derived(name=parameter)


def windows_of(windows: Sequence[DueWindow]) -> dict[str, list[str]]:
    """Return the parameters of ``within_any``."""
    return {f"window_{end}s": [getattr(window, end) for window in windows] for end in DueWindow._fields}


def window_start() -> ColumnElement[Any]:
    """Build the parameter ``window_first``: the earliest due time of the claimed events."""
    return _end_of_window("first")


def _end_of_window(end: str) -> ColumnElement[Any]:
    return cast(bindparam(f"window_{end}", type_=Text), DateTime(timezone=True))


def event_of(keys: FromClause, outbox: Table) -> FromClause:
    """Build a lateral subquery that finds the outbox row of each ``id`` in ``keys``.

    Join the subquery ON true. OFFSET 0 forces the planner to start the join at ``keys``. Without
    OFFSET 0, the planner can start at the outbox if the outbox was empty when ANALYZE ran. The
    condition on ``crashes`` is always true. The condition reads a column that the index ``(due_at,
    id)`` does not have. Without this condition, the planner can read all entries of the window in
    this index for each id.
    """
    always = func.coalesce(outbox.c.crashes, 0) >= literal_column("0")
    row = select(outbox).where(outbox.c.id == keys.c.id, within(outbox.c.due_at), always)
    return row.offset(literal_column("0")).lateral("event")


def window_of(batch: Batch) -> dict[str, str]:
    """Return the parameters of ``within``."""
    return {f"window_{end}": due_at for end, due_at in batch.window._asdict().items()}
