"""Counts the events that stay in the outbox for other consumers, because no handler settles their type."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, Text, cast, func, select
from sqlalchemy.orm import Session

from outbox_worker.schema.tables import Tables
from outbox_worker.store.queries import has_type

BOUND = 100_000
"""Only this many of the oldest events are examined, so that counting is cheap in an outbox of any length."""
TYPES_MAX = 5
NAME_MAX = 100
"""The name of an event type is cut to this length, because producers can write names of any length."""


@dataclass(frozen=True, slots=True)
class IgnoredType:
    event_type: str
    events: int


@dataclass(frozen=True, slots=True)
class IgnoredEvents:
    """The events of ignored types among the ``BOUND`` oldest events, and the most frequent of these types."""

    events: int = 0
    types: tuple[IgnoredType, ...] = ()

    def listed(self) -> str:
        """Return the most frequent types, each with the number of its events."""
        return ", ".join(f"{each.event_type} ({each.events:,})" for each in self.types)


def count_ignored(session: Session, tables: Tables, event_types: Collection[str] | None) -> IgnoredEvents:
    """Count the events that the worker never claims, because their type is not one of ``event_types``.

    None means that the worker claims events of all types. The count is then 0.
    """
    if event_types is None:
        return IgnoredEvents()
    rows = session.execute(_ignored_statement(tables, event_types)).all()
    types = tuple(IgnoredType(row.event_type, row.events) for row in rows)
    return IgnoredEvents(int(rows[0].total) if rows else 0, types)


def _ignored_statement(tables: Tables, event_types: Collection[str]) -> Select[Any, int, int]:
    """what: the most frequent event types that no handler settles, and the number of all such events
    lock: none · index: (due_at, id) of the outbox, at most ``BOUND`` entries
    """
    outbox = tables.outbox
    oldest = select(outbox.c.event_type).order_by(outbox.c.due_at, outbox.c.id).limit(BOUND).subquery("oldest")
    handled = has_type(oldest, event_types)
    name = func.coalesce(func.left(cast(oldest.c.event_type, Text), NAME_MAX), "NULL").label("event_type")
    events = func.count().label("events")
    return (
        select(name, events, func.sum(func.count()).over().label("total"))
        .where(handled.is_not(True))
        .group_by(name)
        .order_by(events.desc(), name)
        .limit(TYPES_MAX)
    )
