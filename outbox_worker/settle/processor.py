"""One batch: claim, settle, record, commit. The only owner of the transaction grain.

What fails for want of luck is repeated with fewer events; what stands in the way of others makes way.
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
from outbox_worker.model import Batch, Facts, Guard, Verdicts
from outbox_worker.settle.handlers import Handlers, build_handlers
from outbox_worker.settle.pacing import STUCK_PASSES_MAX, Pacing
from outbox_worker.settle.settlement import Settlement
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.outbox import Claim, IsolatedEvent, Outbox, Postponement
from outbox_worker.store.purchases import PurchaseRepository
from outbox_worker.telemetry.reporter import BatchReport, Telemetry


class RefusedAtCommit(Exception):
    """A constraint that is checked at COMMIT failed: some event of the batch is at fault."""


def _nothing() -> None:
    """Nobody asked to be told."""


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
        self._handlers = handlers
        self._outbox = outbox
        self._purchases = purchases
        self._guard = guard
        self._telemetry = telemetry
        self._policy = policy
        self._pacing = pacing
        self._on_failed_try: Callable[[], None] = _nothing
        self._to_isolate = 0
        self._crash_suspects: list[int] = []
        self._isolated: IsolatedEvent | None = None
        self._failed_alone = 0
        self._settlement = Settlement(outbox, purchases, handlers, guard, policy)

    def isolate_next(self, events: int) -> None:
        """A worker died, and nobody knows of what: take so many events one by one, each written down before."""
        self._to_isolate = events

    def tell_of_tries(self, on_failed_try: Callable[[], None]) -> None:
        """Call this after each try that failed and is repeated: one call of ``process_batch`` may take many."""
        self._on_failed_try = on_failed_try

    def adopt(self, policy: RetryPolicy, batch_size: int, target_seconds: float) -> None:
        """Go by other limits from the next batch on. Guesses about refusals are made anew; what is accused stays so."""
        self._handlers, self._policy = build_handlers(self._purchases, policy), policy
        self._settlement = Settlement(self._outbox, self._purchases, self._handlers, self._guard, policy)
        self._pacing.adopt(batch_size, target_seconds)

    def process_batch(self, until: datetime | None = None) -> BatchReport:
        """Claim and settle up to one batch of events due by ``until`` (None: now), all in one transaction.

        Raises what the database raises when it is in trouble; then nothing was changed and no event charged.
        """
        if self._isolated or self._crash_suspects or self._to_isolate:
            return self._process_alone(until)
        return self._process(until)

    def _process_alone(self, until: datetime | None) -> BatchReport:
        """One event by itself. Its crash is committed before the work, and crossed out with it.

        What fails otherwise is no crash: the event stays accused, and its work is done again by the next call. Where
        that is in vain, though nothing says that others would fail, it makes way.
        """
        if self._isolated is None:
            key = self._crash_suspects.pop() if self._crash_suspects else None
            with self._database.transaction(**self._plans()) as session:
                self._isolated = self._outbox.isolate(session, key, until, self._policy.base)
            if self._isolated is None:
                self._to_isolate = 0 if key is None else self._to_isolate
                return BatchReport(batch=Batch(), verdicts={}, limit=1, guard=self._guard.state.guard)
            self._to_isolate = max(0, self._to_isolate - 1)
        if self._failed_alone >= STUCK_PASSES_MAX:
            return self._postpone_isolated(self._isolated)
        try:
            report = self._process(until)
        except DBAPIError as error:
            self._failed_alone += classify(error) in (Failure.RETRY, Failure.UNCLEAR)
            raise
        self._isolated, self._failed_alone = None, 0
        return report

    def _postpone_isolated(self, isolated: IsolatedEvent) -> BatchReport:
        """Cross its crash out and postpone it, uncharged."""
        with self._database.transaction(**self._plans()) as session:
            batch = self._outbox.claim_isolated(session, isolated).batch
            self._postpone_uncharged(session, batch)
        self._isolated, self._failed_alone = None, 0
        return self._made_way(batch)

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
            makes_way = failed and self._pacing.is_alone and self._isolated is None
            return self._make_way(until) if makes_way else self._transact(until, careful)
        except DBAPIError as error:
            if classify(error) is Failure.RETRY:
                self._pacing.failed()
                self._on_failed_try()
            raise

    def _transact(self, until: datetime | None, careful: bool) -> BatchReport:
        """One transaction: claim, settle, commit."""
        claim, limit, isolated = Claim(), self._claim_size(), self._isolated
        try:
            with self._database.transaction(**self._plans()) as session:
                claim = (
                    self._outbox.claim_isolated(session, isolated) if isolated else self._claim(session, limit, until)
                )
                if len(claim.batch) >= limit and not isolated:
                    self._pacing.claimed(claim.end)
                claimed_at = time.monotonic()
                verdicts = self._settle(session, claim, careful) if claim.batch else {}
                result = self._commit(session, claim.transaction_id)
        except Exception as error:
            self._pacing.interrupted()
            if classify(error) is Failure.UNCLEAR and not isolated:
                self._pacing.in_doubt(claim.end if len(claim.batch) >= limit else None)
            self._telemetry.transaction_failed(error, len(claim.batch))
            raise
        report = BatchReport(
            batch=claim.batch,
            verdicts=verdicts,
            limit=1 if isolated else limit,
            guard=self._guard.state.guard,
            seconds=time.monotonic() - claimed_at,
            transaction=result,
        )
        self._settlement.committed(verdicts)
        if not isolated:
            self._crash_suspects += claim.crash_suspects
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
        isolated = self._isolated
        batch = claim.batch if isolated else claim.batch.without(claim.crash_suspects)
        if isolated and isolated.crashes >= CRASHES_MAX:
            verdicts = dict.fromkeys(batch, decide(Facts(crashes=isolated.crashes)))
            return self._settlement.record(session, batch, verdicts)
        if not batch:
            return {}
        batch = self._of_one_kind(batch)
        if self._pacing.is_stuck and not isolated:
            self._postpone_uncharged(session, batch)
            return {}
        verdicts, is_through = self._settlement.settle(session, batch, careful=careful)
        if not is_through:
            self._pacing.ran_out()
        return verdicts

    def _of_one_kind(self, batch: Batch) -> Batch:
        """Events of one handler, and those of none; the others stay in the outbox for the next claim.

        Two handlers in one transaction would write purchases in two ascending passes: two workers could deadlock.
        """
        kinds = {name: events for name, events in batch.by_type().items() if name in self._handlers}
        if len(kinds) < 2:
            return batch
        chosen = self._pacing.choose(list(kinds))
        return batch.without({key for name, events in kinds.items() if name != chosen for key in events})

    def _make_way(self, until: datetime | None) -> BatchReport:
        """The event at the head waits, alone, for a foreign transaction: postpone it, uncharged."""
        with self._database.transaction(**self._plans()) as session:
            batch = self._outbox.claim(session, 1, until).batch
            self._postpone_uncharged(session, batch)
        self._pacing.made_way()
        return self._made_way(batch)

    def _postpone_uncharged(self, session: Session, batch: Batch) -> None:
        if batch:
            later = Postponement(self._policy.base, charged=False)
            self._outbox.postpone(session, batch, dict.fromkeys(batch, later))

    def _made_way(self, batch: Batch) -> BatchReport:
        report = BatchReport(batch=batch, verdicts={}, limit=1, guard=self._guard.state.guard)
        self._telemetry.batch_committed(report)
        return report
