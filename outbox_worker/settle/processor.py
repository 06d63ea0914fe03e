"""Settles one batch of due events.

First, one statement settles events fast. Then a careful transaction settles the events that this
statement left. A careful transaction first locks the pairs of the events. In the package
``settle``, only this module, ``fast`` and ``isolation`` begin and commit transactions. After a
transient failure, the processor tries again with half the batch. The processor postpones an event
that blocks other events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import QUERY_CANCELED, Failure, classify, sqlstate
from outbox_worker.database.planner import index_plans
from outbox_worker.database.retry import retry_transaction
from outbox_worker.decision import CRASHES_MAX, Limits, decide
from outbox_worker.errors import Again
from outbox_worker.model import Batch, Facts
from outbox_worker.settle.fast import FallenEvents, FastTransaction
from outbox_worker.settle.handlers import build_handlers
from outbox_worker.settle.isolation import Isolation, LoneEvents
from outbox_worker.settle.pacing import Pacing
from outbox_worker.settle.settlement import Settled, Settlement
from outbox_worker.store.claims import Claim, IsolatedEvent
from outbox_worker.store.doors import Doors
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.queries import database_time
from outbox_worker.telemetry.reporter import BatchReport, Telemetry


class Processor:
    """Settles batches on one connection. Each claim loop has its own processor.

    The processor calls ``on_failed_try`` after each failed transaction that ``process_batch`` tries again.
    """

    def __init__(
        self,
        database: Database,
        doors: Doors,
        guard: GuardWatch,
        telemetry: Telemetry,
        pacing: Pacing,
        isolation: Isolation,
        on_failed_try: Callable[[], None],
    ) -> None:
        self._database = database
        _, self._outbox, self._purchases = doors
        self._isolation = isolation
        self._guard = guard
        self._telemetry = telemetry
        self._pacing = pacing
        self._on_failed_try = on_failed_try
        self._lone = LoneEvents(isolation, self._outbox)
        self._fallen = FallenEvents()
        self._fast = FastTransaction(database, doors, guard, telemetry, pacing)
        self._use(pacing.limits)

    def process_batch(self, until: datetime | None = None, limits: Limits | None = None) -> BatchReport:
        """Claim one batch, and settle it in a fast transaction, a careful transaction, or both.

        Claim events that are due by ``until``. If ``until`` is None, claim events that are due now.
        If ``limits`` is None, use the limits of the last batch. If the limits change, the processor
        forgets which events were refused for an unclear cause. The processor still knows which
        events must be processed alone.

        Raises the database's error if no event is known to be the cause of the error. The worker
        then rolls back the batch and counts no try.
        """
        if limits is not None and limits != self._pacing.limits:
            self._use(limits)
        if self._lone.is_next:
            with self._isolation.alone(self._on_failed_try):
                return self._process_alone(until)
        with self._isolation.together(self._on_failed_try):
            report = self._process(until)
        self._reach_further()
        return report

    def _use(self, limits: Limits) -> None:
        self._pacing.use(limits)
        self._handlers = build_handlers(self._purchases, limits.policy)
        doors = self._outbox, self._purchases
        self._settlement = Settlement(*doors, self._handlers, self._guard, limits.policy, self._pacing.set_aside)

    def seconds_until_due(self) -> float:
        """Return the seconds until the first event is due.

        If an event is due now, return 0 or less. The query takes one round trip. Like a claim, the
        query begins where the last claim ended, or sometimes at the start of the queue. Raises the
        errors of psycopg.
        """
        began, set_aside = time.monotonic(), self._pacing.set_aside.ids
        start = self._pacing.start(began)
        front = self._pacing.frontier.start if start is None else start
        try:
            with self._database.look(**self._plans()) as transaction:
                seconds = self._outbox.seconds_until_due(transaction.fetch, front, set_aside=set_aside)
        except psycopg.Error as error:
            self._reach_less(error)
            raise
        if start is None:
            self._pacing.claimed_from_start(began, time.monotonic(), has_found=seconds <= 0)
        self._telemetry.looked()
        self._reach_further()
        return seconds

    def _reach_less(self, error: BaseException | None) -> None:
        """If a statement timed out, let claims from the start of the queue look less far back."""
        if error is not None and sqlstate(error) == QUERY_CANCELED:
            with suppress(DBAPIError), self._database.transaction() as session:
                self._pacing.reach_less(database_time(session))

    def _reach_further(self) -> None:
        """Let claims from the start of the queue look further back, if ``pacing`` allows this."""
        if self._pacing.may_reach_further:
            with suppress(DBAPIError), self._database.transaction() as session:
                self._pacing.reach_further(database_time(session))

    def _process_alone(self, until: datetime | None) -> BatchReport:
        """Process one event alone, as the module ``isolation`` describes. Meanwhile, the other claim loops wait."""
        isolated = self._lone.choose(self._guard.state.guard, until, self._plans())
        if isolated is None:
            return BatchReport(limit=1, guard=self._guard.state.guard)
        if self._lone.is_stuck:
            return self._postpone_isolated(isolated, until)
        try:
            report = self._process_carefully(until)
        except Exception as error:
            self._on_failed_try()
            self._lone.gave_up(error)
            raise
        self._lone.done()
        return report

    def _postpone_isolated(self, isolated: IsolatedEvent, until: datetime | None) -> BatchReport:
        """Postpone the isolated event after several errors.

        Count no try, because the errors possibly have other causes.
        """
        with self._database.transaction(**self._plans()) as session:
            batch = self._outbox.claim_isolated(session, isolated, until).batch
            settled = self._postpone_uncharged(session, batch)
            self._isolation.clear_crash(session)
        self._lone.done()
        return self._made_way(batch, settled)

    def _process(self, until: datetime | None) -> BatchReport:
        """Settle a batch by one statement. If the statement fails, settle a batch carefully.

        Collect the events that the statement leaves unsettled. Settle the collected events
        carefully when there are enough of them, or after ``target_seconds``. If there are many
        collected events, leave some for later, so that clean events do not wait long.
        """
        if not self._fast.is_possible:
            return self._process_carefully(until)
        try:
            report = self._fast.run(until)
        except Again as again:
            if isinstance(again.__cause__, Again):
                self._probe_guard()
            self._reach_less(again.__cause__)
            return self._process_carefully(until)
        if report.created:
            self._settlement.succeeded()
        self._fallen.add(report, time.monotonic())
        if report.is_full and not self._must_settle_fallen():
            self._pacing.committed(report.claimed, report.claimed, is_full=True, seconds=report.seconds)
            return replace(report, fell_out=())
        return self._settle_fallen(until, report)

    def _must_settle_fallen(self) -> bool:
        most, seconds = self._pacing.careful_limit, self._pacing.limits.target_seconds
        return self._fallen.must_be_settled(time.monotonic(), most=most, seconds=seconds)

    def _settle_fallen(self, until: datetime | None, report: BatchReport) -> BatchReport:
        """Settle carefully the events that the fast statement left in this and earlier batches."""
        report = self._fallen.take(report)
        if not report.fell_out:
            self._pacing.committed(report.claimed, report.settled, is_full=report.is_full, seconds=report.seconds)
        while report.fell_out:
            report = report.followed_by(self._process_carefully(until, report))
            if report.seconds > self._pacing.limits.target_seconds:
                break
        return report

    def _probe_guard(self) -> None:
        """Check the unique index and triggers of purchases after row counts did not match."""
        with suppress(DBAPIError), self._database.transaction() as session:
            self._guard.probe(session)

    def _process_carefully(self, until: datetime | None, fast: BatchReport | None = None) -> BatchReport:
        """Settle events in a careful transaction, under the locks of their pairs.

        Settle the events that ``fast`` left. If ``fast`` is None, claim other events.
        """
        attempts = self._pacing.limits.batch_size.bit_length() + 2
        try:
            return retry_transaction(partial(self._try, until, fast), attempts=attempts)
        except Exception:
            self._pacing.gave_up()
            raise

    def _try(self, until: datetime | None, fast: BatchReport | None, failed: int) -> BatchReport:
        try:
            has_failed = failed or self._pacing.breaks_alone
            makes_way = has_failed and self._pacing.is_alone and self._lone.event is None
            return self._make_way(until) if makes_way else self._transact(until, None if failed else fast)
        except DBAPIError as error:
            if classify(error) is Failure.RETRY:
                self._pacing.failed()
                self._on_failed_try()
            self._reach_less(error)
            raise

    def _transact(self, until: datetime | None, fast: BatchReport | None) -> BatchReport:
        """Claim, settle and commit in one careful transaction."""
        limit, isolated = min(self._pacing.careful_limit, self._guard.state.lock_capacity), self._lone.event
        claim = Claim()
        before = fast or BatchReport(limit=1 if isolated else limit, guard=self._guard.state.guard)
        try:
            with self._database.transaction(**self._plans()) as session:
                if isolated:
                    claim = self._outbox.claim_isolated(session, isolated, until)
                elif fast:
                    claim = self._outbox.claim_these(session, fast.fell_out[:limit], fast.windows, until)
                else:
                    claim = self._claim(session, limit, until)
                claimed_at = time.monotonic()
                batch, left = self._choose(claim)
                settled = self._settle(session, batch, is_last=until is not None) if batch else Settled()
                if isolated:
                    self._isolation.clear_crash(session)
                answer = self._database.commit(session, claim.transaction_id)
        except Exception as error:
            self._pacing.interrupted(len(claim.batch))
            if classify(error) is Failure.RECONNECT and claim.batch and not isolated:
                self._pacing.broke()
            if classify(error) is Failure.UNCLEAR and not isolated:
                self._pacing.in_doubt(claim.end if not fast and len(claim.batch) >= limit else None)
            self._telemetry.transaction_failed(error, len(claim.batch))
            raise
        report = BatchReport(
            claimed=len(claim.batch),
            batch=claim.batch,
            fell_out=[*left.ids, *fast.fell_out[limit:]] if fast else (),
            windows=[claim.batch.window],
            verdicts=settled.verdicts,
            postponed=settled.postponed,
            set_aside=settled.set_aside,
            limit=before.limit,
            guard=self._guard.state.guard,
            seconds=time.monotonic() - claimed_at,
            transaction=answer,
        )
        self._committed(settled)
        self._telemetry.batch_committed(report)
        if not isolated:
            self._lone.crash_suspects += claim.crash_suspects
            whole = before.followed_by(report) if fast else report
            self._pacing.committed(whole.claimed, whole.settled, is_full=whole.is_full, seconds=whole.seconds)
        return report

    def _committed(self, settled: Settled) -> None:
        self._settlement.committed(settled)
        set_aside, now = self._pacing.set_aside, time.monotonic()
        set_aside.forget(settled.verdicts.keys() - settled.set_aside.keys())
        set_aside.add(settled.set_aside, now)
        set_aside.add_unrecorded(settled.postponed, now)

    def _claim(self, session: Session, limit: int, until: datetime | None) -> Claim:
        """Claim events after the end of the last claim.

        If there are no later events, or if a claim from the start is due, claim from the start of
        the queue.
        """
        began = time.monotonic()
        start, besides = self._pacing.start(began), self._pacing.set_aside.ids
        claim = Claim() if start is None else self._outbox.claim(session, limit, until, start, set_aside=besides)
        if not claim.batch:
            start, began = None, time.monotonic()
            claim = self._outbox.claim(session, limit, until, self._pacing.frontier.start, set_aside=besides)
            self._pacing.claimed_from_start(began, time.monotonic(), has_found=bool(claim.batch))
        self._pacing.claimed(start, claim.end, is_full=len(claim.batch) >= limit)
        return claim

    def _plans(self) -> Mapping[str, str]:
        return index_plans(self._guard.state.has_index_paths)

    def _choose(self, claim: Claim) -> tuple[Batch, Batch]:
        """Return the events to settle now, and the events of other types that stay in the outbox.

        Each handler writes its purchases in ascending order. Two handlers in one transaction would
        not keep this order, and two workers could deadlock. Events without a handler are settled
        together with any other type. The worker processes a crash suspect alone later.
        """
        batch = claim.batch if self._lone.event else claim.batch.without(claim.crash_suspects)
        kinds = {name: events for name, events in batch.by_type().items() if name in self._handlers}
        if len(kinds) < 2:
            return batch, Batch()
        chosen = self._pacing.choose(list(kinds))
        left = batch.among({key for name, events in kinds.items() if name != chosen for key in events})
        return batch.without(left.keys()), left

    def _settle(self, session: Session, batch: Batch, *, is_last: bool) -> Settled:
        isolated = self._lone.event
        if isolated and isolated.crashes >= CRASHES_MAX:
            verdicts = dict.fromkeys(batch, decide(Facts(crashes=isolated.crashes)))
            return self._settlement.record(session, batch, verdicts)
        if self._pacing.is_stuck and not isolated:
            return self._postpone_uncharged(session, batch)
        settled = self._settlement.settle(session, batch, is_last=is_last)
        if not settled.is_through:
            self._pacing.ran_out()
        return settled

    def _make_way(self, until: datetime | None) -> BatchReport:
        """Postpone the first event of the queue without counting a try.

        This event failed even in a batch without other events. Another transaction blocked this
        event, or the connection broke.
        """
        start, besides = self._pacing.frontier.start, self._pacing.set_aside.ids
        with self._database.transaction(**self._plans()) as session:
            batch = self._outbox.claim(session, 1, until, start, set_aside=besides).batch
            settled = self._postpone_uncharged(session, batch)
        self._pacing.made_way()
        return self._made_way(batch, settled)

    def _postpone_uncharged(self, session: Session, batch: Batch) -> Settled:
        return self._settlement.postpone(session, batch) if batch else Settled()

    def _made_way(self, batch: Batch, settled: Settled) -> BatchReport:
        self._committed(settled)
        guard = self._guard.state.guard
        report = BatchReport(
            claimed=len(batch), batch=batch, set_aside=settled.set_aside, limit=1, guard=guard, has_made_way=bool(batch)
        )
        self._telemetry.batch_committed(report)
        return report
