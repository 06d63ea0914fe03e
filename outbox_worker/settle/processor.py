"""Processes one batch in one transaction: claim, settle, record, commit.

In ``settle``, only this module and ``isolation`` begin and commit transactions. After a transient failure, the
processor tries again with half the batch. The processor postpones an event that blocks other events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Literal

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import Failure, classify, describe
from outbox_worker.database.planner import INDEX_PLANS
from outbox_worker.database.retry import retry_transaction
from outbox_worker.decision import CRASHES_MAX, RetryPolicy, decide
from outbox_worker.errors import CommitLost
from outbox_worker.model import Batch, Facts, Guard
from outbox_worker.settle.handlers import build_handlers
from outbox_worker.settle.isolation import Isolation, LoneEvents
from outbox_worker.settle.pacing import Pacing
from outbox_worker.settle.settlement import Settled, Settlement
from outbox_worker.store.claims import Claim, IsolatedEvent
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.outbox import Outbox
from outbox_worker.store.purchases import PurchaseRepository
from outbox_worker.telemetry.reporter import BatchReport, Telemetry


class RefusedAtCommit(Exception):
    """Raised if COMMIT fails because an event of the batch violates a deferred constraint."""


def _nothing() -> None:
    """Do nothing. The processor calls this function until ``tell_of_tries`` sets another one."""


class Processor:
    """Settles batches on one connection. Each claim loop has its own processor."""

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        purchases: PurchaseRepository,
        guard: GuardWatch,
        telemetry: Telemetry,
        policy: RetryPolicy,
        pacing: Pacing,
        isolation: Isolation,
    ) -> None:
        self._database = database
        self._handlers = build_handlers(purchases, policy)
        self._outbox = outbox
        self._isolation = isolation
        self._purchases = purchases
        self._guard = guard
        self._telemetry = telemetry
        self._policy = policy
        self._pacing = pacing
        self._on_failed_try: Callable[[], None] = _nothing
        self._lone = LoneEvents(isolation, outbox)
        self._settlement = Settlement(outbox, purchases, self._handlers, guard, policy, pacing.set_aside)

    def tell_of_tries(self, on_failed_try: Callable[[], None]) -> None:
        """Call ``on_failed_try`` after each failed transaction that ``process_batch`` tries again."""
        self._on_failed_try = on_failed_try

    def adopt(self, policy: RetryPolicy, batch_size: int, target_seconds: float) -> None:
        """Use new limits from the next batch on.

        The processor then forgets which events were refused for an unclear cause. The processor still knows which
        events must be processed alone.
        """
        self._handlers, self._policy = build_handlers(self._purchases, policy), policy
        self._settlement = Settlement(
            self._outbox, self._purchases, self._handlers, self._guard, policy, self._pacing.set_aside
        )
        self._pacing.adopt(batch_size, target_seconds)

    def process_batch(self, until: datetime | None = None) -> BatchReport:
        """Claim and settle one batch of events in one transaction.

        The events are due by ``until``, or by now if ``until`` is None. Raises the database's error if no event is
        known to be the cause of the error. The batch is then rolled back, and no try is counted.
        """
        if self._lone.is_next:
            with self._isolation.alone(self._on_failed_try):
                return self._process_alone(until)
        with self._isolation.together(self._on_failed_try):
            return self._process(until)

    def _process_alone(self, until: datetime | None) -> BatchReport:
        """Process one event alone, as the module ``isolation`` describes. Meanwhile, the other claim loops wait."""
        isolated = self._lone.choose(self._guard.state.guard, until, self._plans())
        if isolated is None:
            return BatchReport(batch=Batch(), verdicts={}, limit=1, guard=self._guard.state.guard)
        if self._lone.is_stuck:
            return self._postpone_isolated(isolated, until)
        try:
            report = self._process(until)
        except Exception as error:
            self._on_failed_try()
            self._lone.gave_up(error)
            raise
        self._lone.done()
        return report

    def _postpone_isolated(self, isolated: IsolatedEvent, until: datetime | None) -> BatchReport:
        """Postpone the isolated event after several errors. Count no try, because the errors may have other causes."""
        with self._database.transaction(**self._plans()) as session:
            batch = self._outbox.claim_isolated(session, isolated, until).batch
            settled = self._postpone_uncharged(session, batch)
            self._isolation.clear_crash(session)
        self._lone.done()
        return self._made_way(batch, settled)

    def _process(self, until: datetime | None) -> BatchReport:
        attempts = self._pacing.batch_size.bit_length() + 2
        try:
            return retry_transaction(partial(self._try, until, False), attempts=attempts)
        except RefusedAtCommit:
            return retry_transaction(partial(self._try, until, True), attempts=attempts)
        except Exception:
            self._pacing.gave_up()
            raise

    def _try(self, until: datetime | None, careful: bool, failed: int) -> BatchReport:
        try:
            has_failed = failed or self._pacing.breaks_alone
            makes_way = has_failed and self._pacing.is_alone and self._lone.event is None
            return self._make_way(until) if makes_way else self._transact(until, careful)
        except DBAPIError as error:
            if classify(error) is Failure.RETRY:
                self._pacing.failed()
                self._on_failed_try()
            raise

    def _transact(self, until: datetime | None, careful: bool) -> BatchReport:
        """Claim, settle and commit in one transaction."""
        claim, limit, isolated = Claim(), self._claim_size(), self._lone.event
        try:
            with self._database.transaction(**self._plans()) as session:
                claim = (
                    self._outbox.claim_isolated(session, isolated, until)
                    if isolated
                    else self._claim(session, limit, until)
                )
                if len(claim.batch) >= limit and not isolated:
                    self._pacing.claimed(claim.end)
                claimed_at = time.monotonic()
                settled = self._settle(session, claim, careful, until is not None) if claim.batch else Settled()
                if isolated:
                    self._isolation.clear_crash(session)
                result = self._commit(session, claim.transaction_id)
        except Exception as error:
            self._pacing.interrupted()
            if classify(error) is Failure.RECONNECT and claim.batch and not isolated:
                self._pacing.broke()
            if classify(error) is Failure.UNCLEAR and not isolated:
                self._pacing.in_doubt(claim.end if len(claim.batch) >= limit else None)
            self._telemetry.transaction_failed(error, len(claim.batch))
            raise
        report = BatchReport(
            batch=claim.batch,
            verdicts=settled.verdicts,
            postponed=settled.postponed,
            set_aside=settled.set_aside,
            limit=1 if isolated else limit,
            guard=self._guard.state.guard,
            seconds=time.monotonic() - claimed_at,
            transaction=result,
        )
        self._committed(settled)
        if not isolated:
            self._lone.crash_suspects += claim.crash_suspects
            self._pacing.committed(
                claimed=len(claim.batch), settled=len(settled.verdicts), is_full=report.is_full, seconds=report.seconds
            )
        self._telemetry.batch_committed(report)
        return report

    def _committed(self, settled: Settled) -> None:
        self._settlement.committed(settled)
        set_aside = self._pacing.set_aside
        if set_aside.known:
            set_aside.forget(settled.verdicts.keys() - settled.set_aside.keys())
        set_aside.add(settled.set_aside, time.monotonic())

    def _claim(self, session: Session, limit: int, until: datetime | None) -> Claim:
        """Claim events after the end of the last claim.

        If there are no such events, or if a claim from the start of the queue is due, claim from the start.
        """
        began = time.monotonic()
        start, besides = self._pacing.start(began), self._pacing.set_aside.ids
        if start is not None and (claim := self._outbox.claim(session, limit, until, start, set_aside=besides)).batch:
            return claim
        began = time.monotonic()
        claim = self._outbox.claim(session, limit, until, set_aside=besides)
        self._pacing.claimed_from_start(began, time.monotonic())
        return claim

    def _claim_size(self) -> int:
        """Return the number of events to claim. Under the guard ``lock``, this number is at most ``lock_capacity``."""
        guard = self._guard.state
        return min(self._pacing.limit, guard.lock_capacity) if guard.guard is Guard.LOCK else self._pacing.limit

    def _plans(self) -> Mapping[str, str]:
        return INDEX_PLANS if self._guard.state.has_index_paths else {}

    def _commit(self, session: Session, transaction_id: str | None) -> Literal["commit", "unknown"]:
        """Commit. If the connection is lost before the answer, ask the server whether the transaction was committed."""
        try:
            session.commit()
        except DBAPIError as error:
            failure = classify(error)
            if failure is Failure.RECONNECT and transaction_id is not None:
                session.close()
                with suppress(DBAPIError):  # no server answers, or a promoted standby does not know the transaction
                    if self._database.was_committed(transaction_id):
                        return "unknown"
                raise CommitLost("The connection was lost during COMMIT; the batch is settled again.") from error
            if failure in (Failure.EVENT, Failure.GUARD, Failure.UNCLEAR):
                raise RefusedAtCommit(describe(error)) from error
            raise
        return "commit"

    def _settle(self, session: Session, claim: Claim, careful: bool, drains: bool) -> Settled:
        isolated = self._lone.event
        batch = claim.batch if isolated else claim.batch.without(claim.crash_suspects)
        if isolated and isolated.crashes >= CRASHES_MAX:
            verdicts = dict.fromkeys(batch, decide(Facts(crashes=isolated.crashes)))
            return self._settlement.record(session, batch, verdicts)
        if not batch:
            return Settled()
        batch = self._of_one_kind(batch)
        if self._pacing.is_stuck and not isolated:
            return self._postpone_uncharged(session, batch)
        settled = self._settlement.settle(session, batch, careful=careful, is_last=drains)
        if not settled.is_through:
            self._pacing.ran_out()
        return settled

    def _of_one_kind(self, batch: Batch) -> Batch:
        """Keep the events of one handler, and events without a handler.

        All other events stay in the outbox until later. Each handler writes its purchases in ascending order. If two
        handlers wrote in one transaction, the whole transaction would not be in ascending order, and two workers could
        deadlock.
        """
        kinds = {name: events for name, events in batch.by_type().items() if name in self._handlers}
        if len(kinds) < 2:
            return batch
        chosen = self._pacing.choose(list(kinds))
        return batch.without({key for name, events in kinds.items() if name != chosen for key in events})

    def _make_way(self, until: datetime | None) -> BatchReport:
        """Postpone the first event without counting a try.

        Another transaction blocks this event, even in a batch that contains no other event.
        """
        with self._database.transaction(**self._plans()) as session:
            batch = self._outbox.claim(session, 1, until, set_aside=self._pacing.set_aside.ids).batch
            settled = self._postpone_uncharged(session, batch)
        self._pacing.made_way()
        return self._made_way(batch, settled)

    def _postpone_uncharged(self, session: Session, batch: Batch) -> Settled:
        return self._settlement.postpone(session, batch) if batch else Settled()

    def _made_way(self, batch: Batch, settled: Settled) -> BatchReport:
        self._committed(settled)
        report = BatchReport(
            batch=batch, verdicts={}, set_aside=settled.set_aside, limit=1, guard=self._guard.state.guard
        )
        self._telemetry.batch_committed(report)
        return report
