"""The door to ``backfill_runs``: what each backfill looked at and made, and how far it came.

Cursor and counts are written in the transaction of the purchases that they count. A backfill that is not finished and
whose process is gone was killed: the next one with the same range continues from its cursor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, Row, Select, and_, delete, func, insert, null, or_, select, text, update
from sqlalchemy.orm import Session

from outbox_worker.database.expressions import seconds_since
from outbox_worker.model import PaymentTotals
from outbox_worker.schema.tables import Tables, by_column
from outbox_worker.store.processes import BACKFILL_SILENT_AFTER_SECONDS, is_gone, this_process

PERIODIC_RUNS_KEPT_FOR = timedelta(days=7)
"""How long the rows of periodic backfills are kept."""
CONTINUED_WITHIN = timedelta(days=1)
"""A backfill that was killed longer ago is not continued: it would leave out too many later payments."""

_TURN_KEY = "purchase-outbox-worker: periodic backfill"
# what: whether this process may decide about the next periodic backfill
# lock: an advisory lock of the transaction, tried and not waited for; works behind a pooler
_TAKE_TURN = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:key, 0))")


class RunKind(StrEnum):
    OPERATOR = "operator"
    PERIODIC = "periodic"


class RunOutcome(StrEnum):
    """How a backfill ended."""

    MADE = "made"
    """It made what was owed, or tried to."""
    REPORTED = "reported"
    """It only looked."""
    REFUSED = "refused"
    """More purchases were owed than it may make: it made none."""
    INTERRUPTED = "interrupted"
    """The worker stopped, the scan failed, or the process was killed."""


@dataclass(frozen=True, slots=True)
class BackfillRange:
    """The payments that a backfill looks at: created before ``cutoff``, and in [since, until) if these are given."""

    since: datetime | None
    until: datetime | None
    cutoff: datetime

    @property
    def before(self) -> datetime:
        return min(self.until or self.cutoff, self.cutoff)

    @property
    def is_full(self) -> bool:
        """Whether it looks at all payments that were created before the cutoff."""
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
    """The backfills of one database. Holds no state: a backfill is named by the id of its row."""

    def __init__(self, tables: Tables) -> None:
        self._runs = tables.backfill_runs

    def begin(self, session: Session, kind: RunKind, span: BackfillRange, actor: str, reason: str | None) -> UUID:
        """Write the row of a backfill that starts now; return its id."""
        given = {"since": span.since, "until": span.until, "cutoff": span.cutoff, "is_full": span.is_full}
        key, who = uuid4(), {"actor": actor, "reason": reason}
        session.execute(insert(self._runs).values(id=key, kind=kind.value, **given, **who, **this_process()))
        return key

    def continue_killed(
        self, session: Session, since: datetime | None, until: datetime | None, actor: str
    ) -> BackfillRun | None:
        """Take over an operator's backfill of this range that was killed; None if there is none.

        ``actor`` is added to the names of those who worked on it before.
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
        """Write how far a backfill came, in the transaction of the purchases that it made."""
        values = {"counts": dict(counts), "cursor": null() if cursor is None else list(cursor)}
        self._update(session, key, **values)

    def beat(self, session: Session, key: UUID) -> None:
        """Write that a backfill still runs."""
        self._update(session, key)

    def finish(self, session: Session, key: UUID, outcome: RunOutcome, counts: Mapping[str, Any]) -> None:
        """Write how a backfill ended."""
        self._update(
            session, key, finished_at=func.clock_timestamp(), outcome=outcome.value, counts=dict(counts), cursor=null()
        )

    def take_periodic_turn(self, session: Session, every: timedelta) -> bool:
        """Whether this process should run the periodic backfill: none runs, and the last began at least ``every`` ago.

        If so, other processes are told no until this transaction ends; it should write the row of the backfill.
        """
        if not session.scalar(_TAKE_TURN, {"key": _TURN_KEY}):
            return False
        self._tidy_up(session)
        runs = self._runs
        fresh = or_(runs.c.finished_at.is_(None), runs.c.started_at > func.clock_timestamp() - every)
        done = or_(runs.c.outcome.is_(None), runs.c.outcome != RunOutcome.INTERRUPTED.value)
        return not self._rows(session, runs.c.kind == RunKind.PERIODIC.value, fresh, done)

    def last_full(self, session: Session) -> BackfillRun | None:
        """The last finished backfill that looked at all payments."""
        row = next(iter(self._rows(session, self._runs.c.is_full, self._has_result())), None)
        return _run(row) if row else None

    def latest_counts(self, session: Session) -> Mapping[str, Any]:
        """The counts of the last backfill that accounts for all payments: a periodic one, or an operator's full one."""
        runs = self._runs
        whole = or_(runs.c.kind == RunKind.PERIODIC.value, runs.c.is_full)
        found = select(runs.c.counts).where(whole, self._has_result()).order_by(runs.c.finished_at.desc()).limit(1)
        return session.scalar(found) or {}

    def was_made_by_hand(self, session: Session) -> bool:
        """Whether an operator has completed a backfill on this database: then periodic ones may make purchases."""
        runs = self._runs
        by_hand = runs.c.kind == RunKind.OPERATOR.value, runs.c.outcome == RunOutcome.MADE.value
        return bool(session.scalar(select(select(runs.c.id).where(*by_hand).exists())))

    def _has_result(self) -> ColumnElement[bool]:
        return and_(self._runs.c.finished_at.is_not(None), self._runs.c.counts.has_key("left"))

    def _rows(self, session: Session, *where: ColumnElement[bool]) -> Sequence[Row[Any]]:
        """Rows that meet the conditions, newest first."""
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
        """Finish the rows of periodic backfills whose process is gone, and delete old ones."""
        runs, ours = self._runs, self._runs.c.kind == RunKind.PERIODIC.value
        for row in self._rows(session, ours, runs.c.finished_at.is_(None)):
            if self._is_gone(row):
                self.finish(session, row.id, RunOutcome.INTERRUPTED, row.counts)
        session.execute(delete(runs).where(ours, runs.c.finished_at < func.clock_timestamp() - PERIODIC_RUNS_KEPT_FOR))

    def _update(self, session: Session, key: UUID, **values: Any) -> None:
        values = {"seen_at": func.clock_timestamp(), **values}
        session.execute(update(self._runs).where(self._runs.c.id == key).values(by_column(self._runs, values)))


def written_left(left: PaymentTotals, recent: PaymentTotals) -> dict[str, Any]:
    """What stays unexplained, for ``counts``; ``carried`` leaves out what the next scan sees again (``recent``)."""
    return {"left": left.written(), "carried": (left - recent).written()}


def _run(row: Row[Any]) -> BackfillRun:
    span = BackfillRange(row.since, row.until, row.cutoff)
    return BackfillRun(row.id, span, row.started_at, row.actor, row.cursor, row.counts)
