"""Keeps the state of settling a batch in parts: the parts that are left, and what was found about each event.

This module does no I/O.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from outbox_worker.database.failures import UNIQUE_VIOLATION, describe, sqlstate
from outbox_worker.model import FINAL, PURCHASE_REFUNDED, Batch, Verdicts
from outbox_worker.settle.escalation import (
    NONE,
    Concession,
    Concessions,
    PartRefused,
    Step,
    halves,
    next_concessions,
)
from outbox_worker.settle.handlers import AttemptPlan


@dataclass
class Found:
    """What the attempts at a batch have found: verdicts, and the errors of the events that the database refused."""

    verdicts: Verdicts = field(default_factory=dict)
    refusals: dict[int, Exception] = field(default_factory=dict)
    kept: dict[int, Exception] = field(default_factory=dict)
    """Settled events whose rows the database does not let the worker remove."""
    held: dict[int, Exception] = field(default_factory=dict)
    """Events whose rows cannot be removed now. They are not settled yet, because the rows may be removable soon."""
    checks_deferred: bool = False
    is_through: bool = True
    is_recorded: bool = False
    """Whether every outcome is recorded already."""


class Bisection:
    """The state of halving a batch."""

    def __init__(self, plan: AttemptPlan, parts: list[Batch], stuck: Collection[int] | None) -> None:
        self.plan = plan
        self.parts = parts
        """The parts that are not tried yet. The last part of the list is tried next."""
        self.found = Found(checks_deferred=True)
        self.foreign: set[int] = set()
        """Refused events whose unique key is neither the pair nor a payment nor an event, so the cause is unclear."""
        self._stuck = stuck
        self._looked_again: set[int] = set()
        self._made: dict[int, Concessions] = {}
        self._causes: dict[int, dict[Concession, Exception]] = {}

    def concessions(self, part: Batch) -> Concessions:
        """Return what the next attempt at a part omits."""
        return self._made.get(next(iter(part)), NONE) if len(part) == 1 else NONE

    def is_trial(self, part: Batch) -> bool:
        """Return whether the next attempt only finds out whether the removal of the row is what the database refuses.

        Its writes are then rolled back, and the event is held back until the next try.
        """
        return Concession.ROW in self.concessions(part) and self._is_new(next(iter(part)))

    def _is_new(self, key: int) -> bool:
        return self._stuck is not None and key not in self._stuck

    def hold(self, part: Batch) -> None:
        """Hold a single event back, because the trial without the removal of its row has passed."""
        (key,) = part
        self.found.held[key] = self._causes[key][Concession.ROW]

    def failed(self, part: Batch, refusal: PartRefused) -> None:
        """Halve the part that failed. If it is a single event, try it with less, or record the event as refused."""
        error = refusal.error
        if len(part) > 1:
            self.parts += reversed(halves(part))
            return
        (key,) = part
        if sqlstate(error) == UNIQUE_VIOLATION and key not in self._looked_again:
            self._looked_again.add(key)
            self.parts.append(part)  # another transaction has written the same key: read the facts once more
            return
        if refusal.step is Step.REMOVE and self._is_new(key):
            self.found.held[key] = error
            return
        made = self._made.get(key, NONE)
        more = next_concessions(refusal.step, made, is_refund=part[key].event_type == PURCHASE_REFUNDED)
        if more is None:
            self.found.refusals[key] = error
            return
        self._causes.setdefault(key, {}).update(dict.fromkeys(more - made, error))
        self._made[key] = more
        self.parts.append(part)

    def succeeded(self, part: Batch, verdicts: Verdicts) -> None:
        """Add the verdicts of a part, with the refusals that the part's concessions avoided."""
        made, causes = self.concessions(part), self._causes.get(next(iter(part)), {})
        if Concession.ROW in made:
            self.found.kept |= dict.fromkeys(final(verdicts), causes[Concession.ROW])
        if Concession.NEXT_PAYMENT in made:
            detail = describe(causes[Concession.NEXT_PAYMENT])
            verdicts = {
                key: replace(verdict, detail=detail) if verdict.refused_next else verdict
                for key, verdict in verdicts.items()
            }
        self.found.verdicts |= verdicts

    def rest(self, batch: Batch, part: Batch) -> Batch:
        """Return the events of this part and of all parts that are not tried yet."""
        return batch.only(key for each in (part, *reversed(self.parts)) for key in each)


class UnprovenRefusals:
    """A record of the events that the database refused in a batch in which no other event succeeded.

    The cause of such a refusal may be the event or the database. If the event is refused again after another event
    succeeded, the event itself is the cause.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._proven: set[int] = set()

    def add(self, keys: Iterable[int]) -> None:
        self._recent.update(keys)

    def proven(self, keys: Iterable[int]) -> set[int]:
        """Return the events among ``keys`` that are known to be the cause of their own refusal."""
        return self._proven.intersection(keys)

    def prove(self, keys: Iterable[int]) -> None:
        """Record that these events are the cause of their own refusal."""
        self._recent.difference_update(keys)
        self._proven.update(keys)

    def committed(self, done: Collection[int], *, is_proof: bool) -> None:
        """Forget the events ``done``. If ``is_proof``, another event has succeeded since the earlier refusals."""
        if self._recent or self._proven:
            self._recent.difference_update(done)
            self._proven.difference_update(done)
            if is_proof:
                self._proven |= self._recent
                self._recent.clear()


def final(verdicts: Verdicts) -> set[int]:
    """Return the events that are settled."""
    return {key for key, verdict in verdicts.items() if verdict.outcome in FINAL}
