"""Records which events are retried and which are dead, even if the database refuses some of these writes.

The writes run in savepoints. If the database refuses a write, the worker writes less (a lower
*rung*). The first lower rung omits the text of the error. On the last rung, the worker only
postpones the event and counts no try. If the database refuses even the postponement, the caller
sets the event aside. No claim takes an event that is set aside. The worker still records all other
events of the batch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import IntEnum

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.failures import NO_EVENTS_FAULT, classify
from outbox_worker.decision import RetryPolicy, retry_delay
from outbox_worker.errors import Inconsistent, Swallowed
from outbox_worker.model import Batch, Outcome, Reason, Verdict, Verdicts
from outbox_worker.settle.escalation import PartRefused, Step
from outbox_worker.settle.savepoints import Savepoints
from outbox_worker.store.outbox import Outbox, Postponement


class Rung(IntEnum):
    """How much the worker records about an event, from everything to only a later due time."""

    FULL = 0
    """Count the try, or write the dead letter, with the text of the error."""
    BARE = 1
    """Count the try, or write the dead letter, without the text of the error."""
    KEEPING = 2
    """Write the dead letter without the text, and leave the event's row in the outbox."""
    UNCHARGED = 3
    """Only make the event due later."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Events that are recorded together, because they have the same outcome.

    If ``outcome`` is None, the worker only postpones the events.
    """

    batch: Batch
    outcome: Outcome | None
    rung: Rung

    def lower(self, step: Step) -> list[_Part]:
        """Return the parts to try after the database refused this part at ``step``.

        Return an empty list after the last rung.
        """
        if len(self.batch) > 1:
            if self.rung is Rung.FULL and step is not Step.REMOVE:
                return [replace(self, rung=Rung.BARE)]
            first = Rung.UNCHARGED if self.rung is Rung.UNCHARGED else Rung.FULL
            return [replace(self, batch=half, rung=first) for half in self.batch.halves()]
        rung = _next_rung(self.rung, step, is_dead=self.outcome is Outcome.DEAD)
        return [] if rung is None else [replace(self, rung=rung)]


def _next_rung(rung: Rung, step: Step, *, is_dead: bool) -> Rung | None:
    """Return the next lower rung for a single event, or None after the last rung.

    On the rung ``KEEPING``, the row stays in the outbox. Use this rung only for a dead event, and
    only if the database possibly refused to delete the row.
    """
    if rung is Rung.UNCHARGED:
        return None
    if is_dead and step is Step.REMOVE:
        return Rung.KEEPING
    lower = Rung(rung + 1)
    is_useless = lower is Rung.KEEPING and not (is_dead and step is Step.CHECK)
    return Rung.UNCHARGED if is_useless else lower


@dataclass
class Recorded:
    """The result of recording a batch."""

    verdicts: Verdicts = field(default_factory=dict)
    """The events whose outcome is recorded."""
    postponed: dict[int, Exception] = field(default_factory=dict)
    """The events that were only postponed, each with the error that prevented the recording of its outcome."""
    kept: dict[int, Exception] = field(default_factory=dict)
    """The events of ``verdicts`` whose rows the database refused to delete, each with the error."""
    refused: dict[int, Exception] = field(default_factory=dict)
    """The events that the database even refused to postpone, each with the error."""
    written: set[int] = field(default_factory=set)
    """The events whose rows were deleted or postponed."""
    is_through: bool = True
    """False if some events were not tried, because no savepoint was left."""


class Recording:
    """Writes retries and dead letters inside the session's transaction."""

    def __init__(self, outbox: Outbox, policy: RetryPolicy) -> None:
        self._outbox = outbox
        self._policy = policy

    def record(
        self,
        session: Session,
        batch: Batch,
        verdicts: Verdicts,
        savepoints: Savepoints,
        *,
        troubles: Mapping[int, Exception],
    ) -> Recorded:
        """Record the retried and the dead events among ``verdicts``.

        Only postpone the events in ``troubles``, because their errors do not prove that the events
        are wrong.

        Raises the database's error if no event can be the cause of the error.
        """
        parts = [
            _Part(batch.among(keys), outcome, Rung.FULL)
            for outcome in (Outcome.RETRIED, Outcome.DEAD)
            if (keys := {key for key, verdict in verdicts.items() if verdict.outcome is outcome})
        ]
        if troubles:
            parts.append(_Part(batch.among(troubles.keys()), Outcome.RETRIED, Rung.UNCHARGED))
        return self._write_all(session, parts, verdicts, savepoints, troubles)

    def postpone(self, session: Session, batch: Batch, savepoints: Savepoints) -> Recorded:
        """Postpone the events by the base delay, without counting a try."""
        parts = [_Part(batch, None, Rung.UNCHARGED)]
        return self._write_all(session, parts, {}, savepoints, troubles={})

    def _write_all(
        self,
        session: Session,
        parts: list[_Part],
        verdicts: Verdicts,
        savepoints: Savepoints,
        troubles: Mapping[int, Exception],
    ) -> Recorded:
        """Write all parts in one savepoint.

        If the database refuses one of the parts, write each part in a separate savepoint.
        """
        recorded, causes = Recorded(), dict(troubles)
        waiting = [parts] if parts else []
        while waiting and savepoints.left:
            together = waiting.pop()
            try:
                traces = self._attempt(session, together, verdicts, savepoints)
            except PartRefused as refusal:
                if len(together) > 1:
                    waiting += [[part] for part in reversed(together)]
                    continue
                (part,) = together
                causes |= dict.fromkeys(part.batch, refusal.error)
                lower = part.lower(refusal.step)
                waiting += [[each] for each in reversed(lower)]
                recorded.refused |= {} if lower else dict.fromkeys(part.batch, refusal.error)
            else:
                for part in together:
                    _add(recorded, part, verdicts, traces, causes)
        recorded.is_through = not waiting
        return recorded

    def _attempt(
        self,
        session: Session,
        parts: list[_Part],
        verdicts: Verdicts,
        savepoints: Savepoints,
    ) -> dict[int, str]:
        """Write parts in one savepoint, and return the traceparents of their events.

        Raises PartRefused if an event of the parts may be the cause of an error.
        """
        step, traces = Step.RECORD, dict[int, str]()
        try:
            with savepoints.take():
                for part in parts:
                    step = Step.RECORD
                    traces |= self._write(session, part, verdicts)
                    if part.outcome is Outcome.DEAD and part.rung in (Rung.FULL, Rung.BARE):
                        step = Step.REMOVE
                        self._outbox.remove(session, part.batch, part.batch.ids)
                step = Step.CHECK
                savepoints.check_deferred()
                step = Step.RECORD
                self._read_back(session, parts, verdicts)
        except (DBAPIError, Swallowed) as error:
            if classify(error) in NO_EVENTS_FAULT:
                raise
            raise PartRefused(step, error) from error
        return traces

    def _write(self, session: Session, part: _Part, verdicts: Verdicts) -> dict[int, str]:
        """Write as much of a part as its rung allows.

        Return the traceparents of the events whose outcome is recorded.
        """
        batch = part.batch
        if part.rung is Rung.UNCHARGED or part.outcome is None:
            later = {key: Postponement(self._delay(batch, key, part.outcome), charged=False) for key in batch}
            self._outbox.postpone(session, batch, later)
            return {}
        traces = self._outbox.traceparents(session, batch, batch.ids)
        has_text = part.rung is Rung.FULL
        if part.outcome is Outcome.DEAD:
            self._outbox.bury(session, batch, {key: _letter(verdicts[key], has_text) for key in batch})
        else:
            errors = {key: f"{verdicts[key].reason}: {verdicts[key].detail}" if has_text else None for key in batch}
            given = {key: Postponement(self._delay(batch, key, part.outcome), True, errors[key]) for key in batch}
            self._outbox.postpone(session, batch, given)
        return traces

    def _read_back(self, session: Session, parts: Sequence[_Part], verdicts: Verdicts) -> None:
        """Raise Swallowed if a trigger of the database deleted or changed a dead letter of these parts."""
        for part in parts:
            if part.outcome is Outcome.DEAD and part.rung is not Rung.UNCHARGED:
                reasons = {verdict.reason for key in part.batch if (verdict := verdicts[key]).reason}
                self._outbox.read_letters_back(session, part.batch.event_ids, reasons)

    def _delay(self, batch: Batch, key: int, outcome: Outcome | None) -> timedelta:
        """Return the delay until the next try. If ``outcome`` is None, return the base delay."""
        if outcome is None:
            return self._policy.base
        spread = random.random()  # noqa: S311 - spreads load, no secret
        return retry_delay(batch[key].attempts + 1, self._policy, spread)


def _add(
    recorded: Recorded,
    part: _Part,
    verdicts: Verdicts,
    traces: Mapping[int, str],
    causes: Mapping[int, Exception],
) -> None:
    """Add a part to the result after the part was written."""
    recorded.written |= set() if part.rung is Rung.KEEPING else part.batch.keys()
    if part.rung is Rung.UNCHARGED:
        recorded.postponed |= {key: causes[key] for key in part.batch if key in causes and part.outcome is not None}
        return
    recorded.verdicts |= {key: replace(verdicts[key], traceparent=traces.get(key)) for key in part.batch}
    if part.rung is Rung.KEEPING:
        recorded.kept |= {key: causes[key] for key in part.batch}


def _letter(verdict: Verdict, has_text: bool) -> tuple[Reason, str]:
    if verdict.reason is None:
        raise Inconsistent(f"this verdict has the outcome dead, but no reason: {verdict}")
    return verdict.reason, verdict.detail if has_text else ""
