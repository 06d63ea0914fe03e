"""Counts the events that the worker leaves in the outbox for other consumers.

The worker has no handler for the types of these events.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, Text, cast, func, select
from sqlalchemy.orm import Session

from outbox_worker.schema.tables import Tables
from outbox_worker.store.queries import has_type

BOUND = 100_000
"""The number of the oldest events that are examined. The count is cheap even in a long outbox."""
TYPES_MAX = 5
NAME_MAX = 100
"""SQL cuts the name of an event type to this length. Producers can write names of any length."""


@dataclass(frozen=True, slots=True)
class IgnoredType:
    event_type: str
    events: int


@dataclass(frozen=True, slots=True)
class IgnoredEvents:
    """The number of ignored events among the ``BOUND`` oldest, and their most frequent types."""

    events: int = 0
    types: tuple[IgnoredType, ...] = ()

    def listed(self) -> str:
        """Return the most frequent types, each with the number of its events."""
        return ", ".join(f"{each.event_type} ({each.events:,})" for each in self.types)


def count_ignored(session: Session, tables: Tables, event_types: Collection[str] | None) -> IgnoredEvents:
    """Count the events that the worker never claims.

    The type of these events is not in ``event_types``. If ``event_types`` is None, the worker
    claims events of all types, and the count is 0.
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
