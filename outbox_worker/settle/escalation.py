"""Decides what to try next after the database refused a part of a batch. This module does no I/O.

The worker halves a part with several events. The worker tries a single event again without a write
that the database may have refused. The omitted write is the deletion of the event's row, or the
purchase of the next payment of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto


class Step(Enum):
    """The step of an attempt at which the database refused a part."""

    HANDLE = auto()
    """A handler writes purchases."""
    GRANT_NEXT = auto()
    """After a refund, the handler creates a purchase for the next payment of the pair."""
    RECORD = auto()
    """The worker writes marks, dead letters or later due times."""
    REMOVE = auto()
    """The worker deletes the rows of the events from the outbox."""
    CHECK = auto()
    """The worker checks the deferred constraints. Any other step can cause a failed check."""


class Concession(Enum):
    """A write that the worker omits when it tries a single event again.

    The database possibly refuses only the omitted write.
    """

    ROW = auto()
    """The event's row stays in the outbox, although the event is settled."""
    NEXT_PAYMENT = auto()
    """The next payment of the pair gets no purchase, although the worker writes the refund."""


Concessions = frozenset[Concession]

NONE: Concessions = frozenset()

_IN_ORDER: Sequence[Concessions] = (
    NONE,
    frozenset({Concession.ROW}),
    frozenset({Concession.NEXT_PAYMENT}),
    frozenset({Concession.ROW, Concession.NEXT_PAYMENT}),
)
"""The writes to omit in the four attempts to settle an event whose deferred constraints fail."""


class PartRefused(Exception):
    """Raised if the database refuses a part of a batch, and an event of the part may be the cause."""

    def __init__(self, step: Step, error: Exception) -> None:
        super().__init__(step, error)
        self.step, self.error = step, error


class TrialPassed(Exception):
    """Raised if a trial of a single event succeeds. The error rolls back the writes of the trial.

    The success proves that the database refuses only the deletion of the event's row.
    """


def next_concessions(step: Step, made: Concessions, *, is_refund: bool) -> Concessions | None:
    """Return the writes that the next attempt to settle a single event omits.

    Return None if no further attempt can help. The last attempt omitted the writes ``made``. The
    database refused this attempt at ``step``. The next payment of the pair gets a purchase only
    after a refund.
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
