"""Settles the events of one careful transaction, and records their outcomes.

First, the worker locks the pairs (student, course) of the events. Then the worker settles the whole
batch in one savepoint. If the database refuses the batch, the worker tries each half in a separate
savepoint. The worker halves refused parts until each refused event is alone in a part.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.failures import (
    NO_EVENTS_FAULT,
    UNIQUE_VIOLATION,
    Failure,
    classify,
    describe,
    is_arbiter_lost,
    is_trouble,
    sqlstate,
)
from outbox_worker.decision import RetryPolicy, refused
from outbox_worker.errors import NothingRecorded, Swallowed
from outbox_worker.model import FINAL, GRANTS, Batch, Event, Guard, Outcome, Verdict, Verdicts, by_outcome
from outbox_worker.settle.bisection import Bisection, Found, UnprovenRefusals, final
from outbox_worker.settle.escalation import Concession, PartRefused, Step, TrialPassed
from outbox_worker.settle.handlers import AttemptPlan, Handlers, judge_unhandled
from outbox_worker.settle.recording import Recorded, Recording
from outbox_worker.settle.savepoints import Savepoints
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.outbox import Outbox
from outbox_worker.store.purchases import PurchaseRepository
from outbox_worker.store.set_aside import MOST, SetAside

FOR_RECORDING = 1
"""The number of savepoints that remain for the records of retried and dead events."""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The result of settling a batch."""

    verdicts: Verdicts = field(default_factory=dict)
    """The events whose outcome is recorded. All other events of the batch stay in the outbox."""
    postponed: dict[int, str] = field(default_factory=dict)
    """Events that were only postponed, each with the error that prevented the recording of its outcome."""
    set_aside: dict[int, str] = field(default_factory=dict)
    """Events that no claim takes from now on.

    Each value says why the row was not deleted or postponed.
    """
    is_through: bool = True
    """False if some events were not tried, because no savepoint was left."""


class Settlement:
    """Settles claimed events inside the session's transaction. Each claim loop has its own settlement."""

    def __init__(
        self,
        outbox: Outbox,
        purchases: PurchaseRepository,
        handlers: Handlers,
        guard: GuardWatch,
        policy: RetryPolicy,
        set_aside: SetAside,
    ) -> None:
        self._outbox = outbox
        self._purchases = purchases
        self._handlers = handlers
        self._guard = guard
        self._policy = policy
        self._set_aside = set_aside
        self._recording = Recording(outbox, policy)
        self._unproven = UnprovenRefusals()
        self._unrecorded = UnprovenRefusals()

    def settle(self, session: Session, batch: Batch, *, is_last: bool = False) -> Settled:
        """Settle and record the batch.

        If the database refuses for the first time to delete the row of an event, do not settle the
        event yet. But if the process ends soon (``is_last``), settle the event at once. Raises the
        database's error if no event is known to be the cause.
        """
        savepoints = Savepoints(session)
        bisection = Bisection(*self._arrange(session, batch), stuck=None if is_last else self._set_aside.known)
        self._bisect(session, batch, savepoints, bisection)
        found = replace(bisection.found, refusals=self._faults(bisection), is_through=not bisection.parts)
        faults = {key: error for key, error in found.refusals.items() if not is_trouble(error)}
        refusals = {key: self._refuse(batch[key], error) for key, error in faults.items()}
        return self._record(session, batch, replace(found, verdicts=found.verdicts | refusals), savepoints)

    def record(self, session: Session, batch: Batch, verdicts: Verdicts) -> Settled:
        """Record events that are retried or dead, without settling them first."""
        return self._record(session, batch, Found(verdicts), Savepoints(session))

    def postpone(self, session: Session, batch: Batch) -> Settled:
        """Postpone events by the base delay without counting a try.

        Then other events can be settled.
        """
        recorded = self._recording.postpone(session, batch, Savepoints(session))
        return self._conclude(session, Found(), recorded)

    def committed(self, settled: Settled) -> None:
        """Record that the batch was committed.

        If the batch wrote a purchase, the database accepts purchases. Events whose purchases were
        refused before are then the cause of their refusals. If the batch deleted or postponed a
        row, the database accepts changes of the outbox. Events whose rows could not change before
        are then the cause of their refusals.
        """
        verdicts = settled.verdicts
        self._unproven.committed(verdicts, is_proof=_wrote_purchase(verdicts))
        changed = verdicts.keys() - settled.set_aside.keys() | settled.postponed.keys()
        self._unrecorded.committed(changed, is_proof=bool(changed))
        self._unrecorded.prove(settled.set_aside)

    def succeeded(self) -> None:
        """Record that the fast statement settled events.

        The success proves that the database works. Events that were refused before have therefore
        caused their own refusals.
        """
        self._unproven.committed((), is_proof=True)
        self._unrecorded.committed((), is_proof=True)

    def _faults(self, bisection: Bisection) -> dict[int, Exception]:
        """Return the refusals that the events themselves caused.

        If the cause is unclear, raise the database's error.
        """
        refusals = bisection.found.refusals
        unclear = {
            key: error
            for key, error in refusals.items()
            if classify(error) is Failure.UNCLEAR or key in bisection.foreign
        }
        if not unclear or _wrote_purchase(bisection.found.verdicts):
            return refusals
        proven = self._unproven.proven(unclear)
        self._unproven.add(unclear.keys() - proven)
        if not proven:
            raise _as_unclear(next(iter(unclear.values())))
        return {key: error for key, error in refusals.items() if key in proven or key not in unclear}

    def _bisect(self, session: Session, batch: Batch, savepoints: Savepoints, found: Bisection) -> None:
        """Halve the batch until each event that the database refuses is alone in a part."""
        while found.parts and savepoints.left > FOR_RECORDING:
            part = found.parts.pop()
            plan = _share(found.plan, len(part) / len(batch))
            try:
                verdicts = self._attempt(session, part, plan, savepoints, found)
            except TrialPassed:
                found.hold(part)
            except PartRefused as refusal:
                if is_arbiter_lost(refusal.error) and plan.guard.guard is Guard.INDEX:
                    self._guard.fall_back()
                    found.plan, found.parts = self._arrange(session, found.rest(batch, part))
                else:
                    self._look_at_key(session, part, refusal.error, found)
                    found.failed(part, refusal)
            else:
                found.succeeded(part, verdicts)

    def _look_at_key(self, session: Session, part: Batch, error: Exception, found: Bisection) -> None:
        """Record a single event that violated an unknown unique key.

        The unique keys of pair, payment and mark are known.
        """
        is_unique = len(part) == 1 and sqlstate(error) == UNIQUE_VIOLATION
        if is_unique and not self._purchases.is_own_key(session, error):
            found.foreign.update(part)

    def _arrange(self, session: Session, batch: Batch) -> tuple[AttemptPlan, list[Batch]]:
        """Lock the pairs of a batch, and sort its events in the order that all workers use.

        Leave out an event if another transaction has locked its pair.
        """
        guard = self._guard.state
        locks = self._purchases.lock_pairs(session, batch, guard.lock_capacity)
        free = batch.only(key for key in locks.order if key not in locks.contended)
        return AttemptPlan(guard, locks), [free] if free else []

    def _attempt(
        self, session: Session, batch: Batch, plan: AttemptPlan, savepoints: Savepoints, found: Bisection
    ) -> Verdicts:
        """Handle a part of a batch, mark and delete its settled events, and check the deferred constraints.

        One savepoint contains all of these writes. Omit the writes that the concessions of the part
        name. Raises PartRefused if an event may be the cause of an error. If the attempt is a trial
        and succeeds, raises TrialPassed. All writes of the trial are then rolled back.
        """
        step, omitted = Step.HANDLE, found.concessions(batch)
        try:
            with savepoints.take():
                plan = replace(plan, grants_next=Concession.NEXT_PAYMENT not in omitted)
                verdicts = self._handle(session, batch, plan)
                step = Step.RECORD
                outcomes = by_outcome(verdicts)
                settled = {outcome: outcomes[outcome] for outcome in FINAL & outcomes.keys()}
                verdicts = self._mark(session, batch, verdicts, settled)
                if Concession.ROW not in omitted and settled:
                    step = Step.REMOVE
                    self._outbox.remove(session, batch, [key for keys in settled.values() for key in keys])
                step = Step.CHECK
                savepoints.check_deferred()
                if plan.guard.triggers_on:
                    step = Step.HANDLE
                    self._read_back(session, batch, verdicts)
                    step = Step.GRANT_NEXT
                    self._read_back_next(session, verdicts)
                if found.is_trial(batch):
                    raise TrialPassed
        except (DBAPIError, Swallowed) as error:
            if classify(error) in NO_EVENTS_FAULT:
                raise
            raise PartRefused(step, error) from error
        return verdicts

    def _read_back(self, session: Session, batch: Batch, verdicts: Verdicts) -> None:
        """Raise an error if a trigger of the database changed a purchase of these events."""
        for outcomes, is_active in ((GRANTS, True), ({Outcome.REVOKED}, False)):
            written = [key for key, verdict in verdicts.items() if verdict.writes and verdict.outcome in outcomes]
            self._purchases.read_back(session, batch.among(written).payment_ids, is_active=is_active)

    def _read_back_next(self, session: Session, verdicts: Verdicts) -> None:
        """Raise an error if a trigger changed the purchase of a pair's next payment."""
        passed = [verdict.passed_to for verdict in verdicts.values() if verdict.passed_to]
        self._purchases.read_back(session, passed, is_active=True)

    def _handle(self, session: Session, batch: Batch, plan: AttemptPlan) -> Verdicts:
        verdicts: Verdicts = {}
        for event_type, events in batch.by_type().items():
            handler = self._handlers.get(event_type)
            verdicts |= handler.apply(session, events, plan) if handler else judge_unhandled(events)
        return verdicts

    def _mark(
        self, session: Session, batch: Batch, verdicts: Verdicts, settled: Mapping[Outcome, list[int]]
    ) -> Verdicts:
        """Write the marks of settled events, and close their dead letters.

        Return the verdicts. A verdict that is logged individually now contains the traceparent of its event.
        """
        logged = [key for keys in settled.values() for key in keys if verdicts[key].logged_individually]
        traces = self._outbox.traceparents(session, batch, logged) if logged else {}
        for outcome, keys in settled.items():
            self._purchases.mark(session, batch.among(keys), outcome)
            self._outbox.close_letters(session, batch.among(keys).event_ids)
        return verdicts | {key: replace(verdicts[key], traceparent=trace) for key, trace in traces.items()}

    def _record(self, session: Session, batch: Batch, found: Found, savepoints: Savepoints) -> Settled:
        """Record the events that are retried or dead.

        If the error of an event shows trouble of the database, postpone the event without counting
        a try.
        """
        troubles = {key: error for key, error in found.refusals.items() if is_trouble(error)}
        recorded = self._recording.record(session, batch, found.verdicts, savepoints, troubles=troubles)
        return self._conclude(session, found, recorded)

    def _conclude(self, session: Session, found: Found, recorded: Recorded) -> Settled:
        """Build the result. Set aside the events whose rows the database refused to delete or to postpone."""
        settled = final(found.verdicts)
        undeletable = {**found.kept, **found.held, **recorded.kept}
        stuck = {**undeletable, **recorded.refused}
        refusals: dict[int, str] = {}
        if stuck:
            commands = dict.fromkeys(stuck, "UPDATE") | dict.fromkeys(undeletable, "DELETE")
            refusals = {key: self._outbox.explain(session, commands[key], stuck[key]) for key in stuck}
            self._check_alike(stuck, refusals, others=(settled - found.kept.keys()) | recorded.written)
        return Settled(
            verdicts={key: found.verdicts[key] for key in settled} | recorded.verdicts,
            postponed={key: describe(error) for key, error in recorded.postponed.items()},
            set_aside=refusals,
            is_through=found.is_through and recorded.is_through,
        )

    def _check_alike(
        self, stuck: Mapping[int, Exception], refusals: Mapping[int, str], others: Collection[int]
    ) -> None:
        """Raise an error if the database itself seems to be the cause of the refusals.

        The database seems to be the cause if no row of the batch could be deleted or postponed. The
        database also seems to be the cause if too many events are set aside.
        """
        key, error = next(iter(stuck.items()))
        is_plain = isinstance(error, Swallowed) or classify(error) is not Failure.UNCLEAR
        if not others and not (is_plain and len(stuck) == 1) and not self._unrecorded.proven(stuck):
            self._unrecorded.add(stuck)
            raise error if not is_plain else NothingRecorded(f"the database refuses every event alike: {refusals[key]}")
        if not self._set_aside.has_room(stuck):
            raise NothingRecorded(f"more than {MOST:,} events cannot be removed or postponed: {refusals[key]}")

    def _refuse(self, event: Event, error: Exception) -> Verdict:
        return refused(describe(error), self._policy.is_last(event.attempts))


def _as_unclear(error: Exception) -> Exception:
    """Return an error of the class ``unclear``.

    The processor then tests whether other events succeed.
    """
    if classify(error) is Failure.UNCLEAR:
        return error
    unclear = NothingRecorded(f"the database refuses every event alike: {describe(error)}")
    unclear.__cause__ = error
    return unclear


def _wrote_purchase(verdicts: Verdicts) -> bool:
    return any(verdict.writes for verdict in verdicts.values())


def _share(plan: AttemptPlan, share: float) -> AttemptPlan:
    """Reduce the lock capacity for a part of a batch.

    All parts together must not lock too many pairs.
    """
    capacity = max(1, int(plan.guard.lock_capacity * share))
    return replace(plan, guard=replace(plan.guard, lock_capacity=capacity))
