"""One batch: claim, settle, record, commit. The only owner of the transaction grain.

The fast way settles a whole batch in one savepoint. What fails there is repeated carefully: pairs locked first, then
halves in savepoints of their own, until the events that the database refuses stand alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Literal

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database import INDEX_PLANS, Database, repeat, savepoint
from outbox_worker.decision import CRASHES_MAX, RetryPolicy, decide, refused, retry_delay
from outbox_worker.errors import CommitLost, Failure, Inconsistent, classify, describe, sqlstate
from outbox_worker.guard import GuardWatch
from outbox_worker.handlers import Footing, Handlers, OutOfOrder, judge_unhandled
from outbox_worker.model import GRANTS, Batch, Event, Facts, Guard, Outcome, Reason, Verdict, Verdicts, by_outcome
from outbox_worker.outbox import Accused, Claim, Outbox, Postponement
from outbox_worker.pacing import Pacing
from outbox_worker.purchases import PurchaseRepository
from outbox_worker.telemetry import BatchReport, Telemetry

MAX_SAVEPOINTS = 32
"""In one transaction; beyond 64 subtransactions PostgreSQL's look-ups spill."""

BATCHES_TO_LOOK_AT = 100
"""After a marked event was met among those taken for new: so many batches have their marks looked at first."""

_UNIQUE_VIOLATION = "23505"
_NO_ARBITER = ("42P10", "55000")
_NO_EVENTS_FAULT = (Failure.RETRY, Failure.RECONNECT, Failure.PAUSE, Failure.BUG)

# what: makes deferred constraints speak now, inside the savepoint, not at COMMIT · lock: none
_CHECK_DEFERRED = text("SET CONSTRAINTS ALL IMMEDIATE")


class RefusedAtCommit(Exception):
    """A constraint that is checked at COMMIT failed: some event of the batch is at fault."""


@dataclass
class _Savepoints:
    """The savepoints that one transaction may still take."""

    session: Session
    left: int = MAX_SAVEPOINTS

    @contextmanager
    def take(self) -> Iterator[None]:
        self.left -= 1
        with savepoint(self.session):
            yield


@dataclass
class _Bisection:
    """What halving a batch found: verdicts, and the errors of the events that the database refuses."""

    verdicts: Verdicts = field(default_factory=dict)
    refusals: dict[int, DBAPIError] = field(default_factory=dict)
    complete: bool = True


class Processor:
    """Settles batches on one connection at a time; one processor per claim loop."""

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        purchases: PurchaseRepository,
        handlers: Handlers,
        guard: GuardWatch,
        telemetry: Telemetry,
        policy: RetryPolicy,
        pacing: Pacing,
    ) -> None:
        self._database = database
        self._outbox = outbox
        self._purchases = purchases
        self._handlers = handlers
        self._guard = guard
        self._telemetry = telemetry
        self._policy = policy
        self._pacing = pacing
        self._batches_to_look_at = 0
        self._carefully = 0
        self._suspects: list[int] = []
        self._accused: Accused | None = None

    def go_carefully(self, events: int) -> None:
        """A worker died, and nobody knows of what: take so many events one by one, each written down before."""
        self._carefully = events

    def process_batch(self, until: datetime | None = None) -> BatchReport:
        """Claim and settle up to one batch of events due by ``until`` (None: now), all in one transaction.

        Raises what the database raises when it is in trouble; then nothing was changed and no event charged.
        """
        if self._accused or self._suspects or self._carefully:
            return self._process_alone(until)
        return self._process(until)

    def _process_alone(self, until: datetime | None) -> BatchReport:
        """One event by itself. Its crash is committed before the work, and crossed out with it.

        What fails otherwise is no crash: the event stays accused, and its work is done again by the next call.
        """
        if self._accused is None:
            key = self._suspects.pop() if self._suspects else None
            with self._database.transaction(**self._plans()) as session:
                self._accused = self._outbox.accuse(session, key, until, self._policy.base)
            if self._accused is None:
                self._carefully = 0 if key is None else self._carefully
                return BatchReport(batch=Batch(), verdicts={}, limit=1, guard=self._guard.state.guard)
            self._carefully = max(0, self._carefully - 1)
        report = self._process(until)
        self._accused = None
        return report

    def _process(self, until: datetime | None) -> BatchReport:
        attempts = self._pacing.batch_size.bit_length() + 2
        try:
            return repeat(partial(self._try, until, False), attempts=attempts)
        except RefusedAtCommit:
            return repeat(partial(self._try, until, True), attempts=attempts)

    def _try(self, until: datetime | None, careful: bool, failed: int) -> BatchReport:
        try:
            makes_way = failed and self._pacing.is_alone and self._accused is None
            return self._make_way(until) if makes_way else self._transact(until, careful)
        except DBAPIError as error:
            if classify(error) is Failure.RETRY:
                self._pacing.failed()
            raise

    def _transact(self, until: datetime | None, careful: bool) -> BatchReport:
        """One transaction: claim, settle, commit."""
        claim, limit, accused = Claim(), self._claim_size(), self._accused
        try:
            with self._database.transaction(**self._plans()) as session:
                claim = self._outbox.claim_accused(session, accused) if accused else self._claim(session, limit, until)
                if len(claim.batch) >= limit and not accused:
                    self._pacing.claimed(claim.end)
                claimed_at = time.monotonic()
                verdicts = self._settle(session, claim, careful) if claim.batch else {}
                result = self._commit(session, claim.transaction_id)
        except Exception as error:
            self._pacing.interrupted()
            self._telemetry.transaction_failed(error, bool(claim.batch))
            raise
        report = BatchReport(
            batch=claim.batch,
            verdicts=verdicts,
            limit=1 if accused else limit,
            guard=self._guard.state.guard,
            seconds=time.monotonic() - claimed_at,
            transaction=result,
        )
        if not accused:
            self._suspects += claim.suspects
            self._pacing.committed(
                claimed=len(claim.batch), settled=len(verdicts), is_full=report.is_full, seconds=report.seconds
            )
        self._telemetry.batch_committed(report)
        return report

    def _claim(self, session: Session, limit: int, until: datetime | None) -> Claim:
        """From where the last one ended, or from the beginning; nothing is only said after a look from there."""
        began = time.monotonic()
        start = self._pacing.start(began)
        if start is not None and (claim := self._outbox.claim(session, limit, until, start)).batch:
            return claim
        began = time.monotonic()
        claim = self._outbox.claim(session, limit, until)
        self._pacing.swept(began, time.monotonic())
        return claim

    def _claim_size(self) -> int:
        """Under the guard ``lock`` no more events than one transaction may lock."""
        guard = self._guard.state
        return min(self._pacing.limit, guard.lock_capacity) if guard.guard is Guard.LOCK else self._pacing.limit

    def _plans(self) -> Mapping[str, str]:
        return INDEX_PLANS if self._guard.state.has_index_paths else {}

    def _commit(self, session: Session, transaction_id: str | None) -> Literal["commit", "unknown"]:
        """COMMIT, and where its answer is lost ask what became of it: committed and cut off look the same."""
        try:
            session.commit()
        except DBAPIError as error:
            failure = classify(error)
            if failure is Failure.RECONNECT and transaction_id is not None:
                session.close()
                with suppress(DBAPIError):  # nobody there to ask, or a promoted standby that never heard of it
                    if self._database.was_committed(transaction_id):
                        return "unknown"
                raise CommitLost("The answer to COMMIT was lost; the batch is settled again.") from error
            if failure in (Failure.EVENT, Failure.GUARD, Failure.UNCLEAR):
                raise RefusedAtCommit(describe(error)) from error
            raise
        return "commit"

    def _settle(self, session: Session, claim: Claim, careful: bool) -> Verdicts:
        accused = self._accused
        batch = claim.batch if accused else claim.batch.without(claim.suspects)
        if accused and accused.crashes >= CRASHES_MAX:
            verdicts = dict.fromkeys(batch, decide(Facts(crashes=accused.crashes)))
            self._record(session, batch, verdicts)
            return verdicts
        if not batch:
            return {}
        if self._pacing.is_stuck and not accused:
            self._outbox.postpone(session, batch, {key: self._uncharged() for key in batch})
            return {}
        savepoints = _Savepoints(session)
        settled = None if careful else self._settle_fast(session, batch, savepoints)
        return self._settle_carefully(session, batch, savepoints) if settled is None else settled

    def _settle_fast(self, session: Session, batch: Batch, savepoints: _Savepoints) -> Verdicts | None:
        """All in one savepoint, by the guard in force; None where an event of the batch makes that impossible."""
        try:
            if self._guard.state.guard is Guard.INDEX:
                return self._attempt_as_new(session, batch, Footing(self._guard.state), savepoints)
        except (DBAPIError, Inconsistent, OutOfOrder) as error:
            self._raise_if_no_events_fault(error)
            if sqlstate(error) not in _NO_ARBITER:
                return None
            self._guard.fall_back()
        return self._settle_by_lock(session, batch, savepoints)

    def _settle_by_lock(self, session: Session, batch: Batch, savepoints: _Savepoints) -> Verdicts | None:
        guard = self._guard.state
        locks = self._purchases.lock_pairs(session, batch, guard.lock_capacity)
        free = batch.without(locks.contended)
        try:
            return self._attempt_as_new(session, free, Footing(guard, locks), savepoints)
        except (DBAPIError, Inconsistent, OutOfOrder) as error:
            self._raise_if_no_events_fault(error)
            return None

    def _settle_carefully(self, session: Session, batch: Batch, savepoints: _Savepoints) -> Verdicts:
        """Every event judged under its pair's lock, in halves, until those that the database refuses stand alone."""
        locks = self._purchases.lock_pairs(session, batch, self._guard.state.lock_capacity)
        free = batch.only(key for key in locks.order if key not in locks.contended)
        found = self._bisect(session, free, Footing(self._guard.state, locks, careful=True), savepoints)
        unclear = [error for error in found.refusals.values() if classify(error) is Failure.UNCLEAR]
        if unclear and not any(verdict.outcome in GRANTS for verdict in found.verdicts.values()):
            raise unclear[0]  # no purchase could be written at all: that is the database's trouble
        verdicts = {key: self._refuse(batch[key], error) for key, error in found.refusals.items()}
        self._record(session, batch, verdicts)
        if not found.complete:
            self._pacing.ran_out()
        return found.verdicts | verdicts

    def _bisect(self, session: Session, batch: Batch, footing: Footing, savepoints: _Savepoints) -> _Bisection:
        found = _Bisection()
        looked_again: set[int] = set()
        parts = [batch] if batch else []
        while parts and savepoints.left:
            part = parts.pop()
            try:
                found.verdicts |= self._attempt(session, part, footing, savepoints)
            except DBAPIError as error:
                self._raise_if_no_events_fault(error)
                if sqlstate(error) in _NO_ARBITER and footing.guard.guard is Guard.INDEX:
                    footing = replace(footing, guard=self._guard.fall_back())
                    parts.append(part)
                elif len(part) > 1:
                    parts += reversed(_halves(part))
                elif sqlstate(error) == _UNIQUE_VIOLATION and not looked_again & part.keys():
                    looked_again |= part.keys()
                    parts.append(part)  # somebody else was first: read back
                else:
                    found.refusals |= dict.fromkeys(part, error)
        found.complete = not parts
        return found

    def _raise_if_no_events_fault(self, error: Exception) -> None:
        if isinstance(error, DBAPIError) and classify(error) in _NO_EVENTS_FAULT:
            raise error

    def _attempt(self, session: Session, batch: Batch, footing: Footing, savepoints: _Savepoints) -> Verdicts:
        """Handle and record a batch in one savepoint, so that all of it stands or none."""
        with savepoints.take():
            verdicts = self._handle(session, batch, footing)
            self._record(session, batch, verdicts)
            if footing.careful:
                session.execute(_CHECK_DEFERRED)
        return verdicts

    def _attempt_as_new(self, session: Session, batch: Batch, footing: Footing, savepoints: _Savepoints) -> Verdicts:
        """Marks are not looked at, since nearly all events come once; one that is there shows when it is written."""
        if not self._batches_to_look_at:
            try:
                return self._attempt(session, batch, replace(footing, looks_at_marks=False), savepoints)
            except DBAPIError as error:
                if sqlstate(error) != _UNIQUE_VIOLATION:
                    raise
                self._batches_to_look_at = BATCHES_TO_LOOK_AT
        self._batches_to_look_at -= 1
        return self._attempt(session, batch, footing, savepoints)

    def _handle(self, session: Session, batch: Batch, footing: Footing) -> Verdicts:
        verdicts: Verdicts = {}
        for event_type, events in batch.by_type().items():
            handler = self._handlers.get(event_type)
            verdicts |= handler.apply(session, events, footing) if handler else judge_unhandled(events)
        return verdicts

    def _record(self, session: Session, batch: Batch, verdicts: Mapping[int, Verdict]) -> None:
        """Write what the verdicts mean for mark, event and dead letter."""
        keys = by_outcome(verdicts)
        retried, dead = keys.pop(Outcome.RETRIED, []), keys.pop(Outcome.DEAD, [])
        for outcome, settled in keys.items():
            judged = [key for key in settled if not verdicts[key].clean]
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
            self._outbox.bury(session, batch, {key: _epitaph(verdicts[key]) for key in dead})

    def _refuse(self, event: Event, error: DBAPIError) -> Verdict:
        return refused(describe(error), self._policy.is_last(event.attempts))

    def _later(self, event: Event, verdict: Verdict) -> Postponement:
        delay = retry_delay(event.attempts + 1, self._policy, random.random())  # noqa: S311 - spread, not secrecy
        return Postponement(delay, charged=True, error=f"{verdict.reason}: {verdict.detail}")

    def _uncharged(self) -> Postponement:
        return Postponement(self._policy.base, charged=False)

    def _make_way(self, until: datetime | None) -> BatchReport:
        """The event at the head waits, alone, for a foreign transaction: postpone it, uncharged."""
        with self._database.transaction(**self._plans()) as session:
            batch = self._outbox.claim(session, 1, until).batch
            if batch:
                self._outbox.postpone(session, batch, {key: self._uncharged() for key in batch})
        self._pacing.made_way()
        report = BatchReport(batch=batch, verdicts={}, limit=1, guard=self._guard.state.guard)
        self._telemetry.batch_committed(report)
        return report


def _epitaph(verdict: Verdict) -> tuple[Reason, str]:
    if verdict.reason is None:
        raise Inconsistent(f"a dead event without a reason: {verdict}")
    return verdict.reason, verdict.detail


def _halves(batch: Batch) -> list[Batch]:
    middle = len(batch) // 2
    return [batch.only(batch.ids[:middle]), batch.only(batch.ids[middle:])]
