"""What operators see of ``dead_letters``. Burying and settling are the outbox's; this is the reading side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from outbox_worker.model import DeadLetterState
from outbox_worker.schema import Tables


@dataclass(frozen=True, slots=True)
class DeadLetter:
    event_id: UUID
    event_type: str
    payment_id: UUID | None
    attempts: int
    reason: str
    detail: str
    created_at: datetime
    dead_at: datetime
    state: str


def count_open(session: Session, tables: Tables) -> int:
    """How many dead letters wait for a person."""
    letters = tables.dead_letters
    counted = select(func.count()).select_from(letters).where(letters.c.state == DeadLetterState.OPEN.value)
    return session.scalars(counted).one()


def list_letters(
    session: Session,
    tables: Tables,
    *,
    state: DeadLetterState = DeadLetterState.OPEN,
    reason: str | None = None,
    after: tuple[datetime, UUID] | None = None,
    limit: int = 100,
) -> Sequence[DeadLetter]:
    """Dead letters in a state, oldest first; ``after`` is the ``(dead_at, event_id)`` of the page before."""
    letters = tables.dead_letters
    columns = [letters.c[key] for key in DeadLetter.__dataclass_fields__]
    query = select(*columns).where(letters.c.state == state.value)
    if reason is not None:
        query = query.where(letters.c.reason == reason)
    if after is not None:
        query = query.where(tuple_(letters.c.dead_at, letters.c.event_id) > after)
    rows = session.execute(query.order_by(letters.c.dead_at, letters.c.event_id).limit(limit))
    return [DeadLetter(*row) for row in rows]
