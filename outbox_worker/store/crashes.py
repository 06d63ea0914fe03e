"""Changes ``outbox.crashes``: how many workers provably died while they processed only this event.

Only this module changes the column. If another transaction has locked the event, the functions do
not wait. There are two reasons: the other transaction can settle the event, and the caller holds
the lock of a row of ``workers``.
"""

from __future__ import annotations

from enum import Enum, auto

from sqlalchemy import Table, func, select, update
from sqlalchemy.orm import Session


class Changed(Enum):
    """The result of an attempt to change the crash count of an event."""

    DONE = auto()
    NOTHING = auto()
    """The event is no longer in the outbox, or a trigger or rule of the outbox prevented the change."""
    LOCKED = auto()
    """Another transaction has locked the event. The count was not changed. Try again later."""


def add_crash(session: Session, outbox: Table, event: int) -> Changed:
    """Add one proven death to the crash count of an event."""
    return _change(session, outbox, event, by=1)


def take_back_crash(session: Session, outbox: Table, event: int) -> Changed:
    """Subtract one death from the crash count of an event.

    Call this function if the worker that was considered dead is alive.
    """
    return _change(session, outbox, event, by=-1)


def _change(session: Session, outbox: Table, event: int, by: int) -> Changed:
    """what: changes the crash count of one event · lock: FOR UPDATE SKIP LOCKED · index: primary key"""
    row = select(outbox.c.id).where(outbox.c.id == event)
    if session.scalar(row.with_for_update(skip_locked=True)) is None:
        return Changed.NOTHING if session.scalar(row) is None else Changed.LOCKED
    count = func.greatest(func.coalesce(outbox.c.crashes, 0) + by, 0)
    changed = session.execute(update(outbox).where(outbox.c.id == event).values({outbox.c.crashes: count}))
    return Changed.DONE if changed.rowcount == 1 else Changed.NOTHING  # type: ignore[attr-defined]
