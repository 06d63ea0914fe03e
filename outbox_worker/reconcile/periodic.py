"""The daemon's backfill: now and then one of the workers looks for payments that nothing explains, and reports them.

It makes purchases only if an operator has completed a backfill on this database by hand: otherwise the first start on
adopted tables would grant years of history. It works a tenth of the time at most, on a connection of its own.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.database.retry import wait_out_outage
from outbox_worker.model import FoundPayment, PaymentTotals
from outbox_worker.reconcile.backfill import Counts
from outbox_worker.reconcile.owed import BackfillResult, OwedPurchases, choose_owed, left_of
from outbox_worker.reconcile.scan import PaymentScan, ScanLimits, ScanPaths, ScanRange, ScanTotals
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.store.backfill_runs import BackfillRange, BackfillRuns, RunKind, RunOutcome, written_left
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.payment_classes import RECENT, PaymentClass
from outbox_worker.store.queries import database_time
from outbox_worker.telemetry.reporter import Telemetry

OLDER_THAN = timedelta(minutes=5)
"""Younger payments are left to the claim loops."""
FULL_EVERY = timedelta(days=1)
"""The time between two scans of all payments; other scans begin where the last full one ended, with an overlap."""
FUSE = 100
"""If more purchases are owed, none is made: a person must look first."""
_SHARE = 0.1
"""Largest share of the time spent in statements."""
ACTOR = "outbox-worker run"
_LIMITS = ScanLimits(target_seconds=0.25, portion=20_000)
_BEAT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One periodic backfill by this worker."""

    run: UUID
    range: BackfillRange
    paths: ScanPaths
    carried: PaymentTotals
    """Unexplained payments that the last full scan found and this one does not look at."""
    may_make: bool
    """Whether it may make purchases, or only report."""


class PeriodicBackfill:
    """Runs every ``settings.backfill_every_seconds``, in one of the workers, until told to stop."""

    def __init__(
        self,
        settings: Settings,
        tables: Tables,
        guard: GuardWatch,
        stop: threading.Event,
        telemetry: Telemetry,
        on_trouble: Callable[[BaseException, float], None],
    ) -> None:
        self._settings, self._tables, self._guard = settings, tables, guard
        self._stop_serving, self._telemetry, self._on_trouble = stop, telemetry, on_trouble
        self._database = Database(settings, connections=1, deadline_seconds=settings.database_deadline_seconds)
        self._runs = BackfillRuns(tables)
        self._beaten = 0.0
        self._every = timedelta(seconds=settings.backfill_every_seconds)

    def run(self) -> bool:
        """Run until told to stop; a failure is reported and tried again."""
        asks = min(60.0, self._every.total_seconds() / 10)
        while not self._stop_serving.wait(asks * random.uniform(0.5, 1)):  # noqa: S311 - spread, not secrecy
            wait_out_outage(self.run_once, self._stop_serving, self._on_trouble)
        self._database.close()
        return True

    def run_once(self) -> bool:
        """Look at the payments if it is this worker's turn; return whether it was."""
        with self._database.transaction() as session:
            turn = self._begin(session) if self._runs.take_periodic_turn(session, self._every) else None
        if turn is None:
            return False
        try:
            self._look(turn)
        except BaseException:
            with suppress(DBAPIError):
                self._finish(turn, RunOutcome.INTERRUPTED, {})
            raise
        return True

    def _begin(self, session: Session) -> Turn:
        now = database_time(session)
        base = self._runs.last_full(session)
        if base is None or now - base.started_at > FULL_EVERY:
            span, carried = BackfillRange(None, None, now - OLDER_THAN), PaymentTotals()
        else:
            span = BackfillRange(base.range.before - RECENT, None, now - OLDER_THAN)
            carried = PaymentTotals.read(base.counts["carried"])
        run = self._runs.begin(session, RunKind.PERIODIC, span, ACTOR, None)
        paths = ScanPaths.read(session, self._tables)
        return Turn(run, span, paths, carried, self._runs.was_made_by_hand(session))

    def _look(self, turn: Turn) -> None:
        span = ScanRange(turn.range.since, turn.range.before)
        scan = PaymentScan(
            self._database,
            self._tables,
            turn.paths,
            span,
            limits=_LIMITS,
            lists=FUSE,
        )
        if scan.run(lambda _, seconds: self._rest(turn, seconds * (1 / _SHARE - 1))):
            self._conclude(turn, scan.totals)
        else:
            self._finish(turn, RunOutcome.INTERRUPTED, {})

    def _rest(self, turn: Turn, seconds: float) -> bool:
        """Wait, and write heartbeats meanwhile; False if the daemon is to stop."""
        over = time.monotonic() + seconds
        while not self._stop_serving.is_set():
            if time.monotonic() - self._beaten > _BEAT_SECONDS:
                self._beat(turn)
            if (left := over - time.monotonic()) <= 0:
                return True
            self._stop_serving.wait(min(left, _BEAT_SECONDS))
        return False

    def _conclude(self, turn: Turn, totals: ScanTotals) -> None:
        """Report what was found, and make the purchases if that is allowed."""
        unexplained = totals.value(PaymentClass.UNEXPLAINED)
        owed, others = choose_owed(totals.unexplained)
        counts = Counts(totals.passed, unexplained, PaymentTotals.of(owed), PaymentTotals.of(others))
        left, recent, outcome = unexplained, totals.recent, RunOutcome.REPORTED
        if unexplained.count and not turn.may_make:
            self._telemetry.payments_unexplained(unexplained.count, unexplained.money)
        elif len(owed) > FUSE or len(totals.unexplained) < unexplained.count:
            outcome = RunOutcome.REFUSED
            self._telemetry.backfill_refused(unexplained.count, unexplained.money, FUSE)
        elif owed:
            result = self._make(owed)
            counts, outcome = counts.plus(result), RunOutcome.MADE
            remaining = left_of(totals.unexplained, result)
            left = PaymentTotals.of(remaining)
            recent = PaymentTotals.of(each for each in remaining if each.is_since(turn.range.before - RECENT))
        written = written_left(left, recent) | {"left": (left + turn.carried).written()}
        self._finish(turn, outcome, counts.written() | written)

    def _make(self, owed: Sequence[FoundPayment]) -> BackfillResult:
        total = BackfillResult()
        purchases = OwedPurchases.start(self._database, self._tables, self._settings.retry_policy, self._guard)
        for result in purchases.make(owed, lambda *_: None):
            total += result
        self._telemetry.purchases_backfilled(len(total.purchases), len(total.contended), len(total.refused))
        return total

    def _beat(self, turn: Turn) -> None:
        self._beaten = time.monotonic()
        with self._database.transaction() as session:
            self._runs.beat(session, turn.run)

    def _finish(self, turn: Turn, outcome: RunOutcome, counts: Mapping[str, Any]) -> None:
        with self._database.transaction() as session:
            self._runs.finish(session, turn.run, outcome, counts)
