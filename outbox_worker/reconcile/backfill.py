"""Runs the backfill that an operator starts: finds unexplained payments and makes their purchases.

A succeeded payment is unexplained if it has no purchase and no record gives a reason for this. The
scan finds and counts all unexplained payments before the backfill makes the first purchase. If more
than ``max_repairs`` purchases are owed, the backfill makes no purchase. This limit is called the
fuse. An operator can kill a backfill at any time. The next backfill with the same range continues
the work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.decision import RetryPolicy
from outbox_worker.durations import count_of
from outbox_worker.errors import Refused
from outbox_worker.model import FoundPayment, PaymentTotals, UnjudgedPayment
from outbox_worker.money import amount_text
from outbox_worker.reconcile.owed import BackfillResult, OwedPurchases, choose_owed, left_of
from outbox_worker.reconcile.scan import PAGE_MAX, PaymentScan, ScanCursor, ScanLimits, ScanPaths, ScanRange, Throttle
from outbox_worker.schema.privileges import BACKFILLING, EXPLAINING
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables
from outbox_worker.store.backfill_runs import (
    BackfillRange,
    BackfillRun,
    BackfillRuns,
    RunKind,
    RunOutcome,
    written_left,
)
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.payment_classes import RECENT, PaymentClass
from outbox_worker.store.queries import database_time

ROUNDS = 10
"""At its end, the backfill retries contended payments at most this many times. A payment is
contended if another transaction had locked its pair."""
_ROUND_SECONDS = 0.5
_ROUNDS_SECONDS = 60.0
"""After this many seconds, the backfill begins no new round of retries. Each round can wait for
many locks."""
_BEAT_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of ``backfill`` that an operator chose."""

    actor: str
    reason: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    older_than: timedelta = timedelta(minutes=5)
    max_repairs: int = 1000
    max_rate: float | None = None
    """The largest number of payments to read per second. None means that there is no limit."""
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a backfill.

    The scan sets the first four counts. Each transaction adds to all other counts.
    """

    looked_at: int = 0
    unexplained: PaymentTotals = field(default_factory=PaymentTotals)
    owed: PaymentTotals = field(default_factory=PaymentTotals)
    duplicates: PaymentTotals = field(default_factory=PaymentTotals)
    made: PaymentTotals = field(default_factory=PaymentTotals)
    recovered: PaymentTotals = field(default_factory=PaymentTotals)
    """The payments of ``made`` whose earlier purchase was deleted."""
    explained: PaymentTotals = field(default_factory=PaymentTotals)
    """Payments that were owed a purchase during the scan, but not at the second check."""
    contended: PaymentTotals = field(default_factory=PaymentTotals)
    """Payments whose pair another transaction had locked at every attempt."""
    refused: PaymentTotals = field(default_factory=PaymentTotals)
    """Payments whose purchase the database refused with an error, or silently did not write."""
    withheld: PaymentTotals = field(default_factory=PaymentTotals)
    """Payments that got no purchase. An older unexplained payment of the same pair is owed the
    purchase, but is outside the range."""

    def plus(self, result: BackfillResult) -> Counts:
        """Return these counts plus the result of one transaction."""
        return replace(
            self,
            made=self.made + PaymentTotals.of(result.purchases),
            recovered=self.recovered + PaymentTotals.of(result.recovered),
            explained=self.explained + PaymentTotals.of(result.explained),
            contended=self.contended + PaymentTotals.of(result.contended),
            refused=self.refused + PaymentTotals.of(each.payment for each in result.refused),
            withheld=self.withheld + PaymentTotals.of(result.withheld),
        )

    def written(self) -> dict[str, Any]:
        """Return the counts as an object for a JSON column."""
        return {"looked_at": self.looked_at} | {name: getattr(self, name).written() for name in _VALUES}

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Counts:
        """Return the counts from an object that the method ``written`` returned."""
        return cls(written.get("looked_at", 0), *(PaymentTotals.read(written.get(name)) for name in _VALUES))


_VALUES = tuple(each.name for each in fields(Counts) if each.name != "looked_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackfillReport:
    """The result of a backfill.

    If this backfill continued a killed backfill, the counts include both backfills. All other
    fields describe only the work of this process.
    """

    dry_run: bool
    range: BackfillRange
    continued: BackfillRun | None
    counts: Counts
    owed: Sequence[FoundPayment]
    duplicates: Sequence[FoundPayment]
    withheld: Sequence[FoundPayment]
    """Payments that get no purchase now. An older unexplained payment of the same pair is outside
    the range."""
    cannot_be_judged: Sequence[UnjudgedPayment]
    made: BackfillResult
    seconds: float
    payments_per_second: float
    """How many payments the scan read per second."""

    @property
    def ok(self) -> bool:
        """Return whether every owed purchase was made and every payment could be classified.

        Return True for every dry run. Withheld payments do not make the result False. For a
        withheld payment, the operator's range leaves out an older payment that is owed the
        purchase.
        """
        return self.dry_run or not (self.made.contended or self.made.refused or self.cannot_be_judged)


@dataclass(frozen=True, slots=True)
class Beginning:
    """The range of a backfill, and the facts that the backfill read from the database before its scan."""

    range: BackfillRange
    paths: ScanPaths
    run: UUID | None = None
    """The id of this backfill's row in ``backfill_runs``. None means a dry run, which has no
    row."""
    continued: BackfillRun | None = None
    """The killed backfill that this backfill continues. None means that this backfill is new."""


class Backfill:
    """One backfill. Call ``look`` to find the owed purchases, then ``make`` to make them."""

    def __init__(
        self, database: Database, tables: Tables, policy: RetryPolicy, request: Request, beginning: Beginning
    ) -> None:
        self._database, self._tables, self._policy, self._request = database, tables, policy, request
        self._runs = BackfillRuns(tables)
        self._began = self._beaten = time.monotonic()
        self.range, self._run, self._continued = beginning.range, beginning.run, beginning.continued
        known = Counts.read(self._continued.counts if self._continued else {})
        # the next scan finds contended and withheld payments again
        self._counts = replace(known, contended=PaymentTotals(), withheld=PaymentTotals())
        self._cursor: ScanCursor | None = self._continued.cursor if self._continued else None
        self._is_cursor_held, self._by_index = False, beginning.paths.by_index
        rate = request.max_rate
        page_max = PAGE_MAX if rate is None else max(1, min(PAGE_MAX, int(rate)))
        span = ScanRange(request.since, self.range.before)
        limits, is_open = ScanLimits(page_max=page_max), request.until is None
        self._scan = PaymentScan(database, tables, beginning.paths, span, limits=limits, looks_ahead=is_open)
        if self._cursor is not None and len(self._cursor) != len(self._scan.order):
            self._cursor = None  # after a change of an index, the scan has another order
        self._owed: list[FoundPayment] = []
        self._duplicates: list[FoundPayment] = []
        self._made = BackfillResult()
        self._rate = 0.0

    @classmethod
    def start(cls, database: Database, tables: Tables, policy: RetryPolicy, request: Request) -> Backfill:
        """Check tables and privileges, and write this backfill's row in ``backfill_runs``. Raises SchemaError.

        A dry run writes no row. If an operator's backfill of the same range was killed, continue
        that backfill.
        """
        with database.transaction() as session:
            tables = check_schema(session, tables, EXPLAINING if request.dry_run else BACKFILLING)
            beginning = _begin(session, tables, request)
        return cls(database, tables, policy, request, beginning)

    def estimate(self) -> int:
        """Return the planner's estimate of the number of payments in the range."""
        return self._scan.estimate()

    def look(self, progress: Throttle) -> int:
        """Find the owed purchases and return their number. Raises Refused if more than ``max_repairs`` are owed."""
        self._scan.run(self._paced(progress), self._cursor)
        totals = self._scan.totals
        self._rate = totals.passed / max(time.monotonic() - self._began, 1e-3)
        oldest, self._duplicates = choose_owed(totals.unexplained)
        self._made.withheld = self._forecast_withheld(oldest)
        # the next backfill must find the withheld payments again
        self._is_cursor_held = bool(self._made.withheld)
        behind = {payment.payment_id for payment in self._made.withheld}
        self._owed = [payment for payment in oldest if payment.payment_id not in behind]
        self._owed = self._scan.in_order(self._owed)
        if not self._counts.looked_at:
            self._counts = Counts(
                totals.passed,
                totals.value(PaymentClass.UNEXPLAINED),
                PaymentTotals.of(self._owed),
                PaymentTotals.of(self._duplicates),
            )
        if self._run is not None:
            self._check_fuse(self._run)
        return len(self._owed)

    def make(self, progress: Throttle) -> BackfillReport:
        """Make the owed purchases, but only if this is not a dry run.

        Calls ``progress`` after each transaction.
        """
        total = self._made
        if self._run is not None:
            self._make(self._run, progress)
            counts = self._counts.plus(total)
            left = self._left(left_of(self._scan.totals.unexplained, total))
            # this scan read only the rest of the range; the counts include both backfills
            if self._continued:
                left = written_left(counts.contended + counts.refused + counts.withheld, PaymentTotals())
            with self._database.transaction() as session:
                self._runs.finish(session, self._run, RunOutcome.MADE, counts.written() | left)
        return BackfillReport(
            dry_run=self._request.dry_run,
            range=self.range,
            continued=self._continued,
            counts=self._counts.plus(total),
            owed=sorted(self._owed, key=lambda payment: payment.age),
            duplicates=self._duplicates,
            withheld=total.withheld,
            cannot_be_judged=sorted(self._scan.totals.cannot_be_judged, key=lambda payment: payment.age),
            made=total,
            seconds=time.monotonic() - self._began,
            payments_per_second=self._rate,
        )

    def _check_fuse(self, run: UUID) -> None:
        owed, most = PaymentTotals.of(self._owed), self._request.max_repairs
        with self._database.transaction() as session:
            if owed.count <= most:
                self._runs.advance(session, run, self._counts.written(), self._cursor)
                return
            # do not finish the row of a continued backfill: the next backfill can continue it
            if self._continued is None:
                left = self._left(self._scan.totals.unexplained)
                self._runs.finish(session, run, RunOutcome.REFUSED, self._counts.written() | left)
        texts = (f"{amount_text(amount, currency, grouped=True)} {currency}" for currency, amount in owed.money.items())
        money = ", ".join(texts)
        now = " now" if self._continued else ""
        raise Refused(
            f"A purchase is owed for {count_of(owed.count, 'payment')} ({money}), but --max-repairs allows {most:,}. "
            f"Nothing was made{now}. List them with --dry-run. If they are right, pass --max-repairs {owed.count}."
        )

    def _make(self, run: UUID, progress: Throttle) -> None:
        guard = GuardWatch(self._tables.purchases, lambda _: None)
        guard.know(self._tables)
        given = self._database, self._tables, self._policy, guard
        purchases = OwedPurchases.start(*given, looks_for_older=self._is_partial)
        waiting, total, give_up = self._owed, self._made, math.inf
        for turn in range(ROUNDS + 1):
            for result in purchases.make(waiting, partial(self._advance, run)):
                total += result
                progress(len(self._owed) - len(total.contended), 0.0)
            if not total.contended or turn == ROUNDS or time.monotonic() > give_up:
                return
            give_up = min(give_up, time.monotonic() + _ROUNDS_SECONDS)
            waiting, total.contended = total.contended, []
            time.sleep(_ROUND_SECONDS)

    @property
    def _is_partial(self) -> bool:
        """Whether this scan leaves out older payments, before its range or before its cursor."""
        return self._request.since is not None or self._continued is not None

    def _forecast_withheld(self, oldest: Sequence[FoundPayment]) -> list[FoundPayment]:
        guard = GuardWatch(self._tables.purchases, lambda _: None)
        given = self._database, self._tables, self._policy, guard
        return OwedPurchases(*given, by_index=self._by_index, looks_for_older=self._is_partial).withheld(oldest)

    def _advance(self, run: UUID, session: Session, part: Sequence[FoundPayment], result: BackfillResult) -> None:
        """Save cursor and counts in the transaction that writes the purchases.

        The cursor stays before the first payment whose pair was locked. The next backfill then
        tries that payment again.
        """
        self._is_cursor_held = self._is_cursor_held or bool(result.contended)
        if not self._is_cursor_held:
            self._cursor = self._scan.cursor_of(part[-1])
        counts = self._counts.plus(self._made).plus(result)
        self._runs.advance(session, run, counts.written(), self._cursor)

    def _left(self, payments: Sequence[FoundPayment]) -> dict[str, Any]:
        """Return the counts and sums of the payments that stay unexplained.

        The worker shows these numbers as metrics.
        """
        edge = self.range.before - RECENT
        return written_left(
            PaymentTotals.of(payments), PaymentTotals.of(each for each in payments if each.is_since(edge))
        )

    def _paced(self, progress: Throttle) -> Throttle:
        """Return a throttle that sleeps if the scan exceeds ``max_rate``, and writes heartbeats to the database."""

        def throttle(passed: int, seconds: float) -> bool:
            progress(passed, seconds)
            wait = passed / self._request.max_rate - (time.monotonic() - self._began) if self._request.max_rate else 0
            while True:
                self._beat()
                if wait <= 0:
                    return True
                time.sleep(min(wait, _BEAT_SECONDS))
                wait -= _BEAT_SECONDS

        return throttle

    def _beat(self) -> None:
        if self._run is not None and time.monotonic() - self._beaten > _BEAT_SECONDS:
            self._beaten = time.monotonic()
            with self._database.transaction() as session:
                self._runs.beat(session, self._run)


def _begin(session: Session, tables: Tables, request: Request) -> Beginning:
    runs, paths = BackfillRuns(tables), ScanPaths.read(session, tables)
    fresh = BackfillRange(request.since, request.until, database_time(session) - request.older_than)
    if request.dry_run:
        return Beginning(fresh, paths)
    if killed := runs.continue_killed(session, request.since, request.until, request.actor):
        return Beginning(killed.range, paths, killed.id, killed)
    return Beginning(fresh, paths, runs.begin(session, RunKind.OPERATOR, fresh, request.actor, request.reason))
