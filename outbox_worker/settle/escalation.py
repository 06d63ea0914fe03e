"""Decides what to try next after the database refused a part of a batch. This module does no I/O.

A part with several events is halved. A part with a single event is tried again with less: without the purchase of the
next payer, or without the removal of its row, if these may be what the database refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from outbox_worker.model import Batch


class Step(Enum):
    """The step of an attempt at which the database refused a part."""

    HANDLE = auto()
    """A handler wrote purchases."""
    GRANT_NEXT = auto()
    """A refund was written, and the next payment of the pair was to get a purchase."""
    RECORD = auto()
    """Marks, dead letters or later due times were written."""
    REMOVE = auto()
    """The rows of the events were deleted from the outbox."""
    CHECK = auto()
    """The deferred constraints were checked, so each of the other steps may be the cause."""


class Concession(Enum):
    """A write that an attempt at a single event omits, because the database may refuse only this write."""

    ROW = auto()
    """The event's row stays in the outbox, although the event is settled."""
    NEXT_PAYMENT = auto()
    """The next payment of the pair gets no purchase, although the refund is written."""


Concessions = frozenset[Concession]

NONE: Concessions = frozenset()

_IN_ORDER: Sequence[Concessions] = (
    NONE,
    frozenset({Concession.ROW}),
    frozenset({Concession.NEXT_PAYMENT}),
    frozenset({Concession.ROW, Concession.NEXT_PAYMENT}),
)
"""The order in which an event is tried if its deferred constraints fail. Each event begins with the first one."""


class PartRefused(Exception):
    """Raised if the database refuses a part of a batch, and an event of the part may be the cause."""

    def __init__(self, step: Step, error: Exception) -> None:
        super().__init__(step, error)
        self.step, self.error = step, error


class TrialPassed(Exception):
    """Raised after a trial of a single event, so that its writes are rolled back: only the removal is refused."""


def halves(batch: Batch) -> list[Batch]:
    """Return both halves of a batch. The first half of a single event is empty."""
    keys = list(batch)
    middle = len(keys) // 2
    return [batch.only(keys[:middle]), batch.only(keys[middle:])]


def next_concessions(step: Step, made: Concessions, *, is_refund: bool) -> Concessions | None:
    """Return what the next attempt at a single event omits, or None if the event itself is refused.

    The last attempt made the concessions ``made`` and was refused at ``step``. Only a refund has a next payment.
    """
    match step:
        case Step.REMOVE:
            return made | {Concession.ROW}
        case Step.GRANT_NEXT:
            return made | {Concession.NEXT_PAYMENT}
        case Step.CHECK:
            later = _IN_ORDER[_IN_ORDER.index(made) + 1 :]
            return next((each for each in later if is_refund or Concession.NEXT_PAYMENT not in each), None)
        case _:
            return None
