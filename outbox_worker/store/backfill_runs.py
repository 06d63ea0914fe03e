"""Reads and writes ``backfill_runs``: the range, the progress and the result of each backfill.

A backfill creates the missing purchases of payments. In the same transaction as the purchases, the
backfill writes its counts and its cursor. The cursor is the position up to which the backfill has
scanned. A backfill was killed if its row is not finished and its process no longer runs. The next
backfill of an operator with the same range continues at the cursor of the killed backfill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Executable,
    Row,
    Select,
    and_,
    delete,
    func,
    insert,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.orm import Session

from outbox_worker.database.expressions import seconds_since
from outbox_worker.errors import NothingWritten
from outbox_worker.model import PaymentTotals
from outbox_worker.schema.tables import Tables, by_column, relation_name
from outbox_worker.store.processes import BACKFILL_SILENT_AFTER_SECONDS, is_gone, this_process

PERIODIC_RUNS_KEPT_FOR = timedelta(days=7)
"""The time after which the worker deletes the row of an ended periodic backfill.

The table thus stays small.
"""
CONTINUED_WITHIN = timedelta(days=1)
"""A killed backfill is continued only if its row was updated less than this time ago.

An older backfill is not continued. The range of an old backfill ends at its cutoff and excludes all
newer payments.
"""

_TURN_KEY = "purchase-outbox-worker: periodic backfill"
# what: gives one process the right to decide whether to run the next periodic backfill
# lock: pg_try_advisory_xact_lock, which does not wait and works behind a transaction pooler
_TAKE_TURN = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:key, 0))")


class RunKind(StrEnum):
    OPERATOR = "operator"
    PERIODIC = "periodic"


class RunOutcome(StrEnum):
    """The way in which a backfill ended."""

    MADE = "made"
    """The backfill tried to create every missing purchase."""
    REPORTED = "reported"
    """The backfill counted the missing purchases, but was not asked to create them."""
    REFUSED = "refused"
    """The backfill created no purchase. More purchases were missing than the limit allows."""
    INTERRUPTED = "interrupted"
    """The worker stopped, the scan failed, or the process was killed."""


@dataclass(frozen=True, slots=True)
class BackfillRange:
    """The range of payments that a backfill scans.

    The range contains the payments that were created at or after ``since``, and before both
    ``until`` and ``cutoff``. ``since`` and ``until`` are None if they are not given.
    """

    since: datetime | None
    until: datetime | None
    cutoff: datetime

    @property
    def before(self) -> datetime:
        return min(self.until or self.cutoff, self.cutoff)

    @property
    def is_full(self) -> bool:
        """Whether the range contains all payments that were created before the cutoff."""
        return self.since is None and (self.until is None or self.until >= self.cutoff)


@dataclass(frozen=True, slots=True)
class BackfillRun:
    """A row of ``backfill_runs``."""

    id: UUID
    range: BackfillRange
    started_at: datetime
    actor: str
    cursor: Sequence[str] | None
    counts: Mapping[str, Any]


class BackfillRuns:
    """Reads and writes the rows of backfills.

    This class keeps no state. Each call names a backfill by the id of its row.
    """

    def __init__(self, tables: Tables) -> None:
        self._runs = tables.backfill_runs

    def begin(self, session: Session, kind: RunKind, span: BackfillRange, actor: str, reason: str | None) -> UUID:
        """Insert the row of a backfill that starts now. Return the id of the row."""
        given = {"since": span.since, "until": span.until, "cutoff": span.cutoff, "is_full": span.is_full}
        key, who = uuid4(), {"actor": actor, "reason": reason}
        row = insert(self._runs).values(id=key, kind=kind.value, **given, **who, **this_process())
        self._expect_written(session, row.returning(self._runs.c.id))
        return key

    def continue_killed(
        self, session: Session, since: datetime | None, until: datetime | None, actor: str
    ) -> BackfillRun | None:
        """Take over a killed backfill of an operator with this range.

        Return None if no such backfill exists. This method adds ``actor`` to the actors in the row.
        """
        runs = self._runs
        same = [runs.c.since.is_not_distinct_from(since), runs.c.until.is_not_distinct_from(until)]
        recent = runs.c.seen_at > func.clock_timestamp() - CONTINUED_WITHIN
        unfinished = [runs.c.finished_at.is_(None), runs.c.kind == RunKind.OPERATOR.value, *same, recent]
        for row in self._rows(session, *unfinished):
            if self._is_gone(row) and self._take_over(session, row, actor):
                return _run(row)
        return None

    def advance(self, session: Session, key: UUID, counts: Mapping[str, Any], cursor: Sequence[str] | None) -> None:
        """Write the counts and the cursor of a backfill.

        Call this method in the transaction that inserts its purchases.
        """
        values = {"counts": dict(counts), "cursor": null() if cursor is None else list(cursor)}
        self._update(session, key, **values)

    def beat(self, session: Session, key: UUID) -> None:
        """Record that a backfill still runs."""
        self._update(session, key)

    def finish(self, session: Session, key: UUID, outcome: RunOutcome, counts: Mapping[str, Any]) -> None:
        """Record the outcome and the final counts of a backfill."""
        self._update(
            session, key, finished_at=func.clock_timestamp(), outcome=outcome.value, counts=dict(counts), cursor=null()
        )

    def take_periodic_turn(self, session: Session, every: timedelta) -> bool:
        """Return whether this process should run the periodic backfill now.

        Return True if no periodic backfill runs and none began within ``every`` before now.
        Interrupted backfills do not count. If this method returns True, all other processes get
        False until this transaction ends. Therefore the caller must insert the row of the new
        backfill in this transaction.
        """
        if not session.scalar(_TAKE_TURN, {"key": _TURN_KEY}):
            return False
        self._tidy_up(session)
        runs = self._runs
        fresh = or_(runs.c.finished_at.is_(None), runs.c.started_at > func.clock_timestamp() - every)
        done = or_(runs.c.outcome.is_(None), runs.c.outcome != RunOutcome.INTERRUPTED.value)
        return not self._rows(session, runs.c.kind == RunKind.PERIODIC.value, fresh, done)

    def last_full(self, session: Session) -> BackfillRun | None:
        """Return the last finished backfill that scanned all payments."""
        row = next(iter(self._rows(session, self._runs.c.is_full, self._has_result())), None)
        return _run(row) if row else None

    def latest_counts(self, session: Session) -> Mapping[str, Any]:
        """Return the counts of the last finished backfill that was periodic or scanned all payments.

        Return {} if there is no such backfill.
        """
        runs = self._runs
        whole = or_(runs.c.kind == RunKind.PERIODIC.value, runs.c.is_full)
        found = select(runs.c.counts).where(whole, self._has_result()).order_by(runs.c.finished_at.desc()).limit(1)
        return session.scalar(found) or {}

    def was_made_by_hand(self, session: Session) -> bool:
        """Return whether an operator has completed a backfill.

        Until then, periodic backfills create no purchases.
        """
        runs = self._runs
        by_hand = runs.c.kind == RunKind.OPERATOR.value, runs.c.outcome == RunOutcome.MADE.value
        return bool(session.scalar(select(select(runs.c.id).where(*by_hand).exists())))

    def _has_result(self) -> ColumnElement[bool]:
        return and_(self._runs.c.finished_at.is_not(None), self._runs.c.counts.has_key("left"))

    def _rows(self, session: Session, *where: ColumnElement[bool]) -> Sequence[Row[Any]]:
        """Read the rows that meet the conditions, newest first."""
        runs = self._runs
        silent = seconds_since(runs.c.seen_at).label("silent_seconds")
        columns = [column.label(column.key) for column in runs.c]
        found: Select[Any] = select(*columns, silent).where(*where).order_by(runs.c.started_at.desc())
        return session.execute(found).all()

    def _is_gone(self, row: Row[Any]) -> bool:
        return is_gone(row.host, row.pid, row.silent_seconds, BACKFILL_SILENT_AFTER_SECONDS)

    def _take_over(self, session: Session, row: Row[Any], actor: str) -> bool:
        runs = self._runs
        who = row.actor if actor in row.actor.split(", ") else f"{row.actor}, {actor}"
        now_ours = {"seen_at": func.clock_timestamp(), "actor": who, **this_process()}
        taken = update(runs).where(runs.c.id == row.id, runs.c.seen_at == row.seen_at, runs.c.finished_at.is_(None))
        return session.scalar(taken.values(by_column(runs, now_ours)).returning(runs.c.id)) is not None

    def _tidy_up(self, session: Session) -> None:
        """Close the rows of periodic backfills whose process no longer runs, and delete old rows."""
        runs, ours = self._runs, self._runs.c.kind == RunKind.PERIODIC.value
        for row in self._rows(session, ours, runs.c.finished_at.is_(None)):
            if self._is_gone(row):
                self.finish(session, row.id, RunOutcome.INTERRUPTED, row.counts)
        session.execute(delete(runs).where(ours, runs.c.finished_at < func.clock_timestamp() - PERIODIC_RUNS_KEPT_FOR))

    def _update(self, session: Session, key: UUID, **values: Any) -> None:
        values = {"seen_at": func.clock_timestamp(), **values}
        written = update(self._runs).where(self._runs.c.id == key).values(by_column(self._runs, values))
        self._expect_written(session, written.returning(self._runs.c.id))

    def _expect_written(self, session: Session, write: Executable) -> None:
        """Raise NothingWritten if the statement wrote no row.

        A backfill without a row cannot be continued.
        """
        if session.scalar(write) is None:
            raise NothingWritten(
                f"The row of this backfill in {relation_name(self._runs)} was not written, and PostgreSQL raised no "
                "error: another program deleted the row, or a trigger, a rule or a policy of the table prevents it. "
                "Purchases of earlier transactions stay. Run the backfill again."
            )


def written_left(left: PaymentTotals, recent: PaymentTotals) -> dict[str, Any]:
    """Build the part of ``counts`` about payments that are still unexplained after the backfill.

    ``left`` counts all of these payments. ``carried`` does not count the ``recent`` payments. The
    next scan counts the recent payments again.
    """
    return {"left": left.written(), "carried": (left - recent).written()}


def _run(row: Row[Any]) -> BackfillRun:
    span = BackfillRange(row.since, row.until, row.cutoff)
    return BackfillRun(row.id, span, row.started_at, row.actor, row.cursor, row.counts)
