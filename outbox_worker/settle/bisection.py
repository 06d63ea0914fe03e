"""Keeps the state of a batch that the worker settles in parts.

The state consists of the parts that are not tried yet, and of the results so far. This module does
no I/O.
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
    next_concessions,
)
from outbox_worker.settle.handlers import AttemptPlan


@dataclass
class Found:
    """The results of all attempts to settle a batch.

    ``refusals`` contains the error of each event that the database refused.
    """

    verdicts: Verdicts = field(default_factory=dict)
    refusals: dict[int, Exception] = field(default_factory=dict)
    kept: dict[int, Exception] = field(default_factory=dict)
    """Settled events whose outbox rows the database refused to delete, each with the error."""
    held: dict[int, Exception] = field(default_factory=dict)
    """Events whose row the database refused to delete for the first time, each with the error.

    The worker does not settle these events yet. A later attempt to delete the rows can succeed.
    """
    is_through: bool = True


class Bisection:
    """The state of one batch.

    The worker halves the batch until each refused event is alone in a part.
    """

    def __init__(self, plan: AttemptPlan, parts: list[Batch], stuck: Collection[int] | None) -> None:
        self.plan = plan
        self.parts = parts
        """The parts that are not tried yet. The last part of the list is tried next."""
        self.found = Found()
        self.foreign: set[int] = set()
        """Events that violated an unknown unique key, so that the cause is unclear.

        The unique keys of pair, payment and mark are known.
        """
        self._stuck = stuck
        self._looked_again: set[int] = set()
        self._made: dict[int, Concessions] = {}
        self._causes: dict[int, dict[Concession, Exception]] = {}

    def concessions(self, part: Batch) -> Concessions:
        """Return the writes that the next attempt to settle a part omits."""
        return self._made.get(next(iter(part)), NONE) if len(part) == 1 else NONE

    def is_trial(self, part: Batch) -> bool:
        """Return whether the next attempt is a trial.

        A trial settles one event without deleting its row, and then rolls back all writes. If a
        trial succeeds, the database refuses only the deletion. The worker then sets the event aside
        until a later try.
        """
        return Concession.ROW in self.concessions(part) and self._is_new(next(iter(part)))

    def _is_new(self, key: int) -> bool:
        return self._stuck is not None and key not in self._stuck

    def hold(self, part: Batch) -> None:
        """Do not settle a single event yet. The database refuses only the deletion of its row."""
        (key,) = part
        self.found.held[key] = self._causes[key][Concession.ROW]

    def failed(self, part: Batch, refusal: PartRefused) -> None:
        """Halve a part that failed.

        If the part is a single event, try the event with fewer writes, or record the refusal.
        """
        error = refusal.error
        if len(part) > 1:
            self.parts += reversed(part.halves())
            return
        (key,) = part
        if sqlstate(error) == UNIQUE_VIOLATION and key not in self._looked_again:
            self._looked_again.add(key)
            self.parts.append(part)  # another transaction wrote this key: read again
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
        """Add the verdicts of a settled part.

        For each write that the attempt omitted, add the error that this write caused before.
        """
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
    """A record of refused events whose batch contained no event that succeeded.

    The cause of the refusal is either the event or the database. If another event succeeds later,
    the database works, and the refused event is the cause.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._proven: set[int] = set()

    def add(self, keys: Iterable[int]) -> None:
        self._recent.update(keys)

    def proven(self, keys: Iterable[int]) -> set[int]:
        """Return the events of ``keys`` that are known to have caused their own refusal."""
        return self._proven.intersection(keys)

    def prove(self, keys: Iterable[int]) -> None:
        """Record that these events caused their own refusal."""
        self._recent.difference_update(keys)
        self._proven.update(keys)

    def committed(self, done: Collection[int], *, is_proof: bool) -> None:
        """Forget the events ``done``.

        If ``is_proof`` is true, another event has succeeded, and each remaining event caused its
        own refusal.
        """
        if self._recent or self._proven:
            self._recent.difference_update(done)
            self._proven.difference_update(done)
            if is_proof:
                self._proven |= self._recent
                self._recent.clear()


def final(verdicts: Verdicts) -> set[int]:
    """Return the events whose outcome is final."""
    return {key for key, verdict in verdicts.items() if verdict.outcome in FINAL}
