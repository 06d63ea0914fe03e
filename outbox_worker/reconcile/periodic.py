"""Runs the periodic backfill of the daemon: finds and reports unexplained payments.

At regular intervals, one worker runs this backfill. The backfill makes the purchases of these
payments only if an operator has completed a backfill on this database by hand. Otherwise the first
start on adopted tables would create purchases for years of old payments. The periodic backfill has
a separate connection, and spends at most a tenth of its time in statements.
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
from outbox_worker.errors import NothingWritten
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
"""The periodic backfill skips payments that are younger than this. The claim loops can still settle
their events."""
FULL_EVERY = timedelta(days=1)
"""The time between two full scans. A full scan reads all payments.

The range of every other scan overlaps the range of the last full scan by ``RECENT``.
"""
FUSE = 100
"""The largest number of purchases that one periodic backfill makes. If more purchases are owed, the
backfill makes no purchase. Something can be wrong, and a person must check first."""
_SHARE = 0.1
"""The periodic backfill spends at most this share of its time in statements. So claims stay
fast."""
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
    """The unexplained payments of the last full scan that were created before the range of this
    scan."""
    may_make: bool
    """Whether this backfill is allowed to make purchases. Otherwise this backfill only reports
    unexplained payments."""


class PeriodicBackfill:
    """Runs a backfill every ``settings.backfill_every_seconds``.

    Only one of the workers on a database runs each backfill.
    """

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
        """Run until ``stop`` is set. Report each failure and try again."""
        asks = min(60.0, self._every.total_seconds() / 10)
        while not self._stop_serving.wait(asks * random.uniform(0.5, 1)):  # noqa: S311 - not for secrets
            wait_out_outage(self.run_once, self._stop_serving, self._on_trouble)
        self._database.close()
        return True

    def run_once(self) -> bool:
        """If a backfill is due and no other worker runs it, run it. Return whether this worker ran the backfill."""
        with self._database.transaction() as session:
            turn = self._begin(session) if self._runs.take_periodic_turn(session, self._every) else None
        if turn is None:
            return False
        try:
            self._look(turn)
        except BaseException:
            with suppress(DBAPIError, NothingWritten):
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
            looks_ahead=True,
        )
        if scan.run(lambda _, seconds: self._rest(turn, seconds * (1 / _SHARE - 1))):
            self._conclude(turn, scan.totals)
        else:
            self._finish(turn, RunOutcome.INTERRUPTED, {})

    def _rest(self, turn: Turn, seconds: float) -> bool:
        """Sleep, and write heartbeats during the sleep. Return False if the daemon stops, otherwise True."""
        over = time.monotonic() + seconds
        while not self._stop_serving.is_set():
            if time.monotonic() - self._beaten > _BEAT_SECONDS:
                self._beat(turn)
            if (left := over - time.monotonic()) <= 0:
                return True
            self._stop_serving.wait(min(left, _BEAT_SECONDS))
        return False

    def _conclude(self, turn: Turn, totals: ScanTotals) -> None:
        """Report the unexplained payments. If ``turn.may_make`` is true, make their purchases."""
        if totals.cannot_be_judged:
            self._telemetry.payments_not_judged(len(totals.cannot_be_judged))
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
            result = self._make(owed, is_partial=turn.range.since is not None)
            counts, outcome = counts.plus(result), RunOutcome.MADE
            remaining = left_of(totals.unexplained, result)
            left = PaymentTotals.of(remaining)
            recent = PaymentTotals.of(each for each in remaining if each.is_since(turn.range.before - RECENT))
        written = written_left(left, recent) | {"left": (left + turn.carried).written()}
        self._finish(turn, outcome, counts.written() | written)

    def _make(self, owed: Sequence[FoundPayment], *, is_partial: bool) -> BackfillResult:
        """Make the purchases. ``is_partial``: whether the scan left out older payments."""
        total = BackfillResult()
        given = self._database, self._tables, self._settings.retry_policy, self._guard
        purchases = OwedPurchases.start(*given, looks_for_older=is_partial)
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
