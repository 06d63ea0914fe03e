"""Settles one batch by one SQL statement (``store/fast_path``) in a separate transaction."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.direct import Direct
from outbox_worker.database.engine import Database
from outbox_worker.database.failures import Failure, classify
from outbox_worker.database.planner import index_plans
from outbox_worker.database.statements import fetching
from outbox_worker.errors import Again
from outbox_worker.model import DueWindow, Guard, Position
from outbox_worker.settle.pacing import Pacing
from outbox_worker.store.doors import Doors
from outbox_worker.store.fast_path import FastResult, Wanted
from outbox_worker.store.guard import GuardState, GuardWatch
from outbox_worker.telemetry.reporter import BatchReport, Telemetry


@dataclass
class FallenEvents:
    """The events of several batches that the fast statement left unsettled.

    One careful transaction then settles all of these events. A careful transaction needs about
    twenty round trips, even for a single event.
    """

    _ids: dict[int, None] = field(default_factory=dict)
    _windows: list[DueWindow] = field(default_factory=list)
    _since: float = 0.0

    def add(self, report: BatchReport, now: float) -> None:
        """Add the events of one batch that the fast statement left unsettled.

        ``now`` is the time in monotonic seconds.
        """
        if report.fell_out:
            self._since = self._since if self._ids else now
            self._ids |= dict.fromkeys(report.fell_out)
            self._windows += report.windows

    def must_be_settled(self, now: float, *, most: int, seconds: float) -> bool:
        """Return whether the worker must settle the waiting events now.

        True if half of ``most`` events wait, or if an event has waited for ``seconds``.
        """
        return bool(self._ids) and (len(self._ids) * 2 >= most or now - self._since >= seconds)

    def take(self, report: BatchReport) -> BatchReport:
        """Return a copy of ``report`` with all waiting events in ``fell_out``.

        Then forget the waiting events.
        """
        ids, windows = list(self._ids), self._windows
        self._ids, self._windows = {}, []
        return replace(report, claimed=report.created + len(ids), fell_out=ids, windows=windows)


class FastTransaction:
    """Claims one batch, and settles each event that needs no careful transaction.

    Each claim loop has one ``FastTransaction``.
    """

    def __init__(
        self,
        database: Database,
        doors: Doors,
        guard: GuardWatch,
        telemetry: Telemetry,
        pacing: Pacing,
    ) -> None:
        self._database = database
        self._path, self._outbox, self._purchases = doors
        self._guard, self._telemetry, self._pacing = guard, telemetry, pacing
        self._commit_seconds = 0.0

    @property
    def is_possible(self) -> bool:
        """Whether one statement can settle the next batch.

        False while the worker searches for the cause of a failure. Also false if a trigger could
        change a purchase after the statement has checked the purchase.
        """
        return self._pacing.is_calm and "INSERT" not in self._guard.state.triggers_on

    def run(self, until: datetime | None) -> BatchReport:
        """Settle one batch. The rows of the events in ``fell_out`` of the report are unchanged.

        Raises Again if the database refuses the statement, or if the numbers of written rows do not
        match. The whole transaction is then rolled back. Raises the database's error if the
        connection is lost.
        """
        state, limit, began = self._guard.state, _claim_size(self._guard.state, self._pacing), time.monotonic()
        result = FastResult()
        opens = self._database.direct if self._path.claims_itself else self._database.transaction
        try:
            with opens(**index_plans(state.has_index_paths)) as transaction:
                result = self._settle(transaction, limit, until)
                answer = self._commit(transaction, result)
        except Exception as error:
            self._pacing.interrupted(result.claimed)
            self._telemetry.transaction_failed(error, result.claimed)
            if isinstance(error, DBAPIError | psycopg.Error | Again) and classify(error) is not Failure.RECONNECT:
                raise Again("The batch is settled again in a careful transaction.") from error
            self._pacing.be_careful()  # a careful transaction finds out whether an event breaks the connection
            raise
        report = BatchReport(
            claimed=result.claimed,
            limit=limit,
            guard=state.guard,
            created=result.created,
            fell_out=result.fell_out,
            windows=[result.window],
            latencies=result.latencies,
            seconds=time.monotonic() - began,
            transaction=answer,
        )
        self._telemetry.batch_committed(report)
        return report

    def _commit(self, transaction: Session | Direct, result: FastResult) -> Literal["commit", "unknown"]:
        """Commit, even if the claim found no event.

        After a ROLLBACK, psycopg would prepare its statements again.
        """
        began = time.monotonic()
        answer = self._database.commit(transaction, result.transaction_id)
        if result.created:
            self._commit_seconds = time.monotonic() - began
        return answer

    def _settle(self, transaction: Session | Direct, limit: int, until: datetime | None) -> FastResult:
        """Settle events after the end of the last claim.

        Begin at the start of the queue if no event is found, or if a claim from the start is due.
        """
        known, began = self._pacing.set_aside, time.monotonic()
        wanted = Wanted(
            limit=limit,
            until=until,
            set_aside=known.ids,
            odd=known.known,
            commit_seconds=self._commit_seconds,
        )
        start = self._pacing.start(began)
        result = self._run(transaction, wanted, start) if start is not None else FastResult()
        if not result.claimed:
            start, began = None, time.monotonic()
            result = self._run(transaction, wanted, self._pacing.frontier.start)
            self._pacing.claimed_from_start(began, time.monotonic(), has_found=result.claimed > 0)
        self._pacing.claimed(start, result.end, is_full=result.claimed >= limit)
        return result

    def _run(self, transaction: Session | Direct, wanted: Wanted, start: Position | None) -> FastResult:
        """Claim and settle events by one statement.

        Under the guard ``lock``, one statement locks the pairs, and another statement settles the
        events.
        """
        if isinstance(transaction, Session):
            return self._of_documents(transaction, wanted, start)
        state = self._guard.state
        settle = self._path.settle_due if state.guard is Guard.INDEX else self._path.settle_locked
        return settle(transaction.fetch, state, wanted, start)

    def _of_documents(self, session: Session, wanted: Wanted, start: Position | None) -> FastResult:
        """Claim and settle events whose payloads are json or text.

        Python must parse these payloads before a statement settles the events.
        """
        state = self._guard.state
        claim = self._outbox.claim(session, wanted.limit, wanted.until, start, set_aside=wanted.set_aside)
        batch = claim.batch.without(claim.crash_suspects)
        if state.guard is Guard.LOCK and batch:
            batch = batch.among(self._purchases.lock_pairs(session, batch, state.lock_capacity).locked)
        result = self._path.settle_claimed(fetching(session), state, wanted, batch) if batch else FastResult()
        return replace(
            result,
            claimed=len(claim.batch),
            fell_out=[*claim.batch.without(batch.keys()).ids, *result.fell_out],
            window=claim.batch.window,
            end=claim.end,
            transaction_id=claim.transaction_id,
        )


def _claim_size(guard: GuardState, pacing: Pacing) -> int:
    """Return the number of events to claim. Under the guard ``lock``, this number is at most ``lock_capacity``."""
    return min(pacing.limit, guard.lock_capacity) if guard.guard is Guard.LOCK else pacing.limit
