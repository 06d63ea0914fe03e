"""Settles a claimed batch, at once or in parts, and records the outcomes, before the processor commits.

The fast way settles the whole batch in one savepoint. If that fails, the batch is halved, and each half is tried in its
own savepoint. Halving goes on until each event that the database refuses is a part by itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.engine import savepoint
from outbox_worker.database.failures import NO_ARBITER, UNIQUE_VIOLATION, Failure, classify, describe, sqlstate
from outbox_worker.decision import RetryPolicy, refused, retry_delay
from outbox_worker.errors import Inconsistent
from outbox_worker.model import Batch, Event, Guard, Outcome, Reason, Verdict, Verdicts, by_outcome
from outbox_worker.settle.handlers import AttemptPlan, Handlers, OutOfOrder, judge_unhandled
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.outbox import Outbox, Postponement
from outbox_worker.store.purchases import PurchaseRepository

MAX_SAVEPOINTS = 32
"""The largest number of savepoints in one transaction.

There is a limit because a transaction with more than 64 subtransactions slows down all sessions.
"""

BATCHES_TO_LOOK_AT = 100
"""The number of batches that check for marks first, after a batch failed because one of its events had a mark."""

_NO_EVENTS_FAULT = (Failure.RETRY, Failure.RECONNECT, Failure.PAUSE, Failure.BUG)

# what: checks deferred constraints inside the savepoint instead of at COMMIT · lock: none
_CHECK_DEFERRED = text("SET CONSTRAINTS ALL IMMEDIATE")
# what: defers the constraints again, until the end of the next part · lock: none
_DEFER_AGAIN = text("SET CONSTRAINTS ALL DEFERRED")


class Settled(NamedTuple):
    """The result of settling a batch."""

    verdicts: Verdicts
    is_through: bool = True
    """Whether all events were tried. If no savepoint was left for some events, they have no verdict."""


@dataclass
class _Savepoints:
    """The number of savepoints that one transaction may still use."""

    session: Session
    left: int = MAX_SAVEPOINTS

    @contextmanager
    def take(self) -> Iterator[None]:
        self.left -= 1
        with savepoint(self.session):
            yield


@dataclass
class _Bisection:
    """The state of halving a batch: verdicts, and the errors of the events that the database refused."""

    plan: AttemptPlan
    parts: list[Batch]
    """The parts that are not tried yet. The last part of the list is tried next."""
    verdicts: Verdicts = field(default_factory=dict)
    refusals: dict[int, DBAPIError] = field(default_factory=dict)
    _looked_again: set[int] = field(default_factory=set)

    def failed(self, part: Batch, error: DBAPIError) -> None:
        """Halve the part that failed. If it is a single event, record the event as refused."""
        if len(part) > 1:
            self.parts += reversed(_halves(part))
        elif sqlstate(error) == UNIQUE_VIOLATION and not self._looked_again & part.keys():
            self._looked_again |= part.keys()
            self.parts.append(part)  # another transaction has written the same key: read the facts once more
        else:
            self.refusals |= dict.fromkeys(part, error)

    def rest(self, batch: Batch, part: Batch) -> Batch:
        """Return the events of this part and of all parts that are not tried yet."""
        return batch.only(key for each in (part, *reversed(self.parts)) for key in each)


class _UnprovenRefusals:
    """A record of the events that the database refused in a batch that wrote no purchase.

    The cause of such a refusal may be the event or the database. If the event is refused again after a purchase of
    another event was written, the event itself is the cause.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._proven: set[int] = set()

    def add(self, keys: Iterable[int]) -> None:
        self._recent.update(keys)

    def proven(self, keys: Iterable[int]) -> set[int]:
        """Return the events among ``keys`` that are known to be the cause of their own refusal."""
        return self._proven.intersection(keys)

    def committed(self, verdicts: Verdicts) -> None:
        if self._recent or self._proven:
            self._recent -= verdicts.keys()
            self._proven -= verdicts.keys()
            if _wrote_purchase(verdicts):
                self._proven |= self._recent
                self._recent.clear()


class Settlement:
    """Settles claimed events inside the session's transaction. Each claim loop has its own settlement."""

    def __init__(
        self,
        outbox: Outbox,
        purchases: PurchaseRepository,
        handlers: Handlers,
        guard: GuardWatch,
        policy: RetryPolicy,
    ) -> None:
        self._outbox = outbox
        self._purchases = purchases
        self._handlers = handlers
        self._guard = guard
        self._policy = policy
        self._batches_to_look_at = 0
        self._unproven = _UnprovenRefusals()

    def settle(self, session: Session, batch: Batch, *, careful: bool) -> Settled:
        """Settle and record the batch.

        If ``careful`` is true, settle in parts, and check deferred constraints in each part. Raises the database's
        error unless single events are known to be the cause of the error.
        """
        savepoints = _Savepoints(session)
        settled = None if careful else self._settle_fast(session, batch, savepoints)
        if isinstance(settled, dict):
            return Settled(settled)
        return self._settle_in_parts(session, batch, savepoints, isinstance(settled, Inconsistent | OutOfOrder))

    def committed(self, verdicts: Verdicts) -> None:
        """Record that the batch was committed.

        If the batch wrote a purchase, the database works, so earlier refusals were caused by the refused events.
        """
        self._unproven.committed(verdicts)

    def _settle_fast(self, session: Session, batch: Batch, savepoints: _Savepoints) -> Verdicts | Exception:
        """Settle the batch in one savepoint.

        If an event may be the cause of an error, return the error; else raise it.
        """
        if self._guard.state.guard is Guard.INDEX:
            settled = self._attempt_as_new(session, batch, AttemptPlan(self._guard.state), savepoints)
            if isinstance(settled, dict) or sqlstate(settled) not in NO_ARBITER:
                return settled
            self._guard.fall_back()
        guard = self._guard.state
        locks = self._purchases.lock_pairs(session, batch, guard.lock_capacity)
        return self._attempt_as_new(session, batch.without(locks.contended), AttemptPlan(guard, locks), savepoints)

    def _settle_in_parts(self, session: Session, batch: Batch, savepoints: _Savepoints, judges_all: bool) -> Settled:
        """Halve the batch until each event that the database refuses is a part by itself.

        Retry these events later, or move them to the dead letters.
        """
        found = self._bisect(session, batch, savepoints, judges_all)
        verdicts = {key: self._refuse(batch[key], error) for key, error in self._faults(found).items()}
        recorded = self.record(session, batch, verdicts)
        return Settled(found.verdicts | recorded, is_through=not found.parts)

    def _faults(self, found: _Bisection) -> dict[int, DBAPIError]:
        """Return the refusals that the events themselves caused.

        If the cause is unclear, raise the database's error.
        """
        unclear = {key: error for key, error in found.refusals.items() if classify(error) is Failure.UNCLEAR}
        if not unclear or _wrote_purchase(found.verdicts):
            return found.refusals
        proven = self._unproven.proven(unclear)
        self._unproven.add(unclear.keys() - proven)
        if not proven:
            raise next(iter(unclear.values()))
        return {key: error for key, error in found.refusals.items() if key in proven or key not in unclear}

    def _bisect(self, session: Session, batch: Batch, savepoints: _Savepoints, judges_all: bool) -> _Bisection:
        found = _Bisection(*self._rearrange(session, batch, judges_all))
        while found.parts and savepoints.left:
            part = found.parts.pop()
            plan = _share(found.plan, len(part) / len(batch))
            try:
                found.verdicts |= self._attempt(session, part, plan, savepoints, checks_deferred=True)
            except DBAPIError as error:
                self._raise_if_no_events_fault(error)
                if sqlstate(error) not in NO_ARBITER or plan.guard.guard is Guard.LOCK:
                    found.failed(part, error)
                    continue
                self._guard.fall_back()
                found.plan, found.parts = self._rearrange(session, found.rest(batch, part), plan.judges_all)
            except (Inconsistent, OutOfOrder):
                if plan.judges_all:
                    raise
                found.plan, found.parts = self._rearrange(session, found.rest(batch, part), judges_all=True)
        return found

    def _rearrange(self, session: Session, batch: Batch, judges_all: bool) -> tuple[AttemptPlan, list[Batch]]:
        """Prepare to settle a batch in parts: lock its pairs, and sort its events in the order that all workers use.

        Under the guard ``index``, this locks the pairs only if ``judges_all`` is true.
        """
        guard = self._guard.state
        needs_locks = judges_all or guard.guard is Guard.LOCK
        locks = self._purchases.lock_pairs(session, batch, guard.lock_capacity if needs_locks else 0)
        left_out = locks.contended if needs_locks else ()
        free = batch.only(key for key in locks.order if key not in left_out)
        return AttemptPlan(guard, locks if needs_locks else None, judges_all=judges_all), [free] if free else []

    def _raise_if_no_events_fault(self, error: Exception) -> None:
        if isinstance(error, DBAPIError) and classify(error) in _NO_EVENTS_FAULT:
            raise error

    def _attempt(
        self,
        session: Session,
        batch: Batch,
        plan: AttemptPlan,
        savepoints: _Savepoints,
        *,
        checks_deferred: bool = False,
    ) -> Verdicts:
        """Handle and record a batch in one savepoint, so that either all of its writes stay or none."""
        with savepoints.take():
            verdicts = self.record(session, batch, self._handle(session, batch, plan))
            if checks_deferred:
                session.execute(_CHECK_DEFERRED)
                session.execute(_DEFER_AGAIN)
        return verdicts

    def _attempt_as_new(
        self, session: Session, batch: Batch, plan: AttemptPlan, savepoints: _Savepoints
    ) -> Verdicts | Exception:
        """Settle the batch without a check for marks. If this fails because of a mark, try again with the check.

        The first attempt has no check because nearly all events are new and have no mark.
        """
        if not self._batches_to_look_at:
            settled = self._attempt_all(session, batch, replace(plan, looks_at_marks=False), savepoints)
            if isinstance(settled, dict) or sqlstate(settled) != UNIQUE_VIOLATION:
                return settled
            self._batches_to_look_at = BATCHES_TO_LOOK_AT
        self._batches_to_look_at -= 1
        return self._attempt_all(session, batch, plan, savepoints)

    def _attempt_all(
        self, session: Session, batch: Batch, plan: AttemptPlan, savepoints: _Savepoints
    ) -> Verdicts | Exception:
        try:
            return self._attempt(session, batch, plan, savepoints)
        except (DBAPIError, Inconsistent, OutOfOrder) as error:
            self._raise_if_no_events_fault(error)
            return error

    def _handle(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        verdicts: Verdicts = {}
        for event_type, events in batch.by_type().items():
            handler = self._handlers.get(event_type)
            verdicts |= handler.apply(session, events, plan) if handler else judge_unhandled(events)
        return verdicts

    def record(self, session: Session, batch: Batch, verdicts: Verdicts) -> Verdicts:
        """Write the marks, retries and dead letters that follow from the verdicts.

        Return the verdicts. Add the event's traceparent to each verdict that is logged individually.
        """
        logged = [key for key, verdict in verdicts.items() if not verdict.via_fast_path and verdict.logged_individually]
        traces = self._outbox.traceparents(session, batch, logged) if logged else {}
        keys = by_outcome(verdicts)
        retried, dead = keys.pop(Outcome.RETRIED, []), keys.pop(Outcome.DEAD, [])
        for outcome, settled in keys.items():
            judged = [key for key in settled if not verdicts[key].via_fast_path]
            if new := batch.among(settled).without(set(judged)):
                self._purchases.mark_first(session, new, outcome)
            if judged:
                self._purchases.mark(session, batch.among(judged), outcome)
                self._outbox.close_letters(session, batch.among(judged).event_ids)
        if keys:
            self._outbox.remove(session, batch, [key for settled in keys.values() for key in settled])
        if retried:
            self._outbox.postpone(session, batch, {key: self._later(batch[key], verdicts[key]) for key in retried})
        if dead:
            self._outbox.bury(session, batch, {key: _dead_letter_reason(verdicts[key]) for key in dead})
        return verdicts | {key: replace(verdicts[key], traceparent=trace) for key, trace in traces.items()}

    def _refuse(self, event: Event, error: DBAPIError) -> Verdict:
        return refused(describe(error), self._policy.is_last(event.attempts))

    def _later(self, event: Event, verdict: Verdict) -> Postponement:
        delay = retry_delay(event.attempts + 1, self._policy, random.random())  # noqa: S311 - spreads load, no secret
        return Postponement(delay, charged=True, error=f"{verdict.reason}: {verdict.detail}")


def _wrote_purchase(verdicts: Verdicts) -> bool:
    return any(verdict.writes for verdict in verdicts.values())


def _dead_letter_reason(verdict: Verdict) -> tuple[Reason, str]:
    if verdict.reason is None:
        raise Inconsistent(f"this verdict has the outcome dead, but no reason: {verdict}")
    return verdict.reason, verdict.detail


def _share(plan: AttemptPlan, share: float) -> AttemptPlan:
    """Give a part its share of the lock capacity, so that all parts together do not lock too many pairs."""
    capacity = max(1, int(plan.guard.lock_capacity * share))
    return replace(plan, guard=replace(plan.guard, lock_capacity=capacity))


def _halves(batch: Batch) -> list[Batch]:
    middle = len(batch) // 2
    return [batch.only(batch.ids[:middle]), batch.only(batch.ids[middle:])]
