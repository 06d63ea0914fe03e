"""Reads and writes ``workers``: one row per process, with its last heartbeat and its counters.

The row also contains the events that the process has set aside, and the event that it processes
alone.

A worker writes its row at its start and at every heartbeat. A worker that stops cleanly closes its
row. If an open row is no longer updated, its worker has died.

Before a worker processes an event alone, it *accuses* the event: it commits the event's id into its
own row. The worker withdraws the accusation if the event is settled or given up, and if the worker
stops. If a worker dies with an accusation in its row, another worker takes the row over. If the
event is proven to be the cause of the death, the other worker counts a crash for the event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    FromClause,
    Row,
    Select,
    Table,
    TableValuedAlias,
    and_,
    cast,
    delete,
    func,
    literal,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker import __version__
from outbox_worker.database.engine import savepoint
from outbox_worker.database.expressions import seconds_since
from outbox_worker.database.failures import Failure, classify
from outbox_worker.decision import WORKER_SILENT_AFTER_SECONDS, Death, IsolationTrace, Traces, judge_death
from outbox_worker.model import Guard
from outbox_worker.schema.tables import Tables, by_column
from outbox_worker.store.crashes import Changed, add_crash, take_back_crash
from outbox_worker.store.processes import has_note, is_running, leave_note, remove_note, this_process
from outbox_worker.store.set_aside import SetAside

ROWS_KEPT_FOR = timedelta(days=1)
"""The time after which a worker deletes the row of a process that has ended."""

# what: the timeline of the server, a number that changes with each failover · lock: none
_TIMELINE = text("SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)")

_NOTHING_ISOLATED = {"isolated_event": None, "isolated_at": None, "isolated_timeline": None}


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A row of ``workers``. ``silent_seconds`` is the time since the last heartbeat, by the database's clock."""

    id: UUID
    host: str
    pid: int
    version: str
    started_at: datetime
    silent_seconds: float
    stopped_at: datetime | None
    guard: str
    metrics: Mapping[str, float]


@dataclass
class Contact:
    """Records when this process could reach the database.

    The process needs this information to judge whether other workers died.
    """

    heartbeats: int = 0
    """The number of heartbeats that this process wrote since the last outage of the database."""
    regained_at: datetime | None = None
    """The time, by the database's clock, when the database answered again after an outage.

    The time is None if no outage has occurred.
    """
    _is_lost: bool = False

    def lost(self) -> None:
        """Record that the database did not answer, or refused a heartbeat."""
        self.heartbeats, self._is_lost = 0, True

    def answered(self, now: datetime) -> None:
        """Record that the database answers at ``now``."""
        if self._is_lost:
            self.regained_at, self._is_lost = now, False


@dataclass(frozen=True, slots=True)
class DeadWorker:
    """A dead worker whose row this worker has taken over."""

    host: str
    pid: int
    isolated: int | None
    """The event (``outbox.id``) that the worker processed alone; None if it processed a batch, or nothing."""
    is_counted: bool
    """Whether the death was counted for this event, because the event is proven to be the cause."""


@dataclass
class Takeover:
    """The result of one search for dead workers."""

    dead: list[DeadWorker] = field(default_factory=list)
    is_undecided: bool = False
    """Whether another worker cannot be judged yet.

    That worker is probably dead, and it processed an event alone.
    """


class Workers:
    """Writes the row of this process, and takes over the rows of dead workers."""

    def __init__(self, tables: Tables, worker_id: UUID) -> None:
        self.set_aside = SetAside()
        """The events that claims skip.

        Each heartbeat writes the events that this process has set aside into the row of this
        process.
        """
        self._workers, self._outbox = tables.workers, tables.outbox
        self._id = worker_id

    def join(self, session: Session, guard: Guard) -> datetime | None:
        """Insert the row of this process.

        Delete the rows of processes that ended more than a day ago. Return the time of the
        heartbeat, as ``beat`` does.
        """
        workers = self._workers
        last_seen = func.coalesce(workers.c.stopped_at, workers.c.seen_at)
        session.execute(delete(workers).where(last_seen < func.clock_timestamp() - ROWS_KEPT_FOR))
        return self.beat(session, guard, {})

    def beat(
        self, session: Session, guard: Guard, metrics: Mapping[str, float], *, stopped: bool = False
    ) -> datetime | None:
        """Write a heartbeat, the counters of this process, and the events that it has set aside.

        If ``stopped``, also close the row and withdraw the accusation.

        Return the time of the heartbeat by the database's clock. Return None if ``_write`` did not
        write the heartbeat.
        """
        now = func.clock_timestamp()
        seen = {
            "guard": guard.value,
            "metrics": dict(metrics),
            "set_aside": self.set_aside.refusals(),
            "stopped_at": now if stopped else None,
        }
        return self._write(session, seen | (_NOTHING_ISOLATED if stopped else {}))

    def accuse(self, session: Session, guard: Guard, event: int) -> bool:
        """Write into the row of this process that it processes only this event from now on.

        The caller must commit before it processes the event. Return False if ``_write`` could not write the row.
        """
        now, timeline = func.statement_timestamp(), _timeline(session)
        isolated = {"isolated_event": event, "isolated_at": now, "isolated_timeline": timeline}
        remove_note(self._id)
        return self._write(session, {"guard": guard.value} | isolated) is not None

    def withdraw(self, session: Session) -> None:
        """Write that this process no longer processes an isolated event."""
        ours = [self._workers.c.id == self._id, self._workers.c.succeeded_at.is_(None)]
        cleared = update(self._workers).where(*ours).values(by_column(self._workers, _NOTHING_ISOLATED))
        if session.scalar(cleared.returning(self._workers.c.id)) is None:
            self._reopen(session)

    def withdraw_here(self) -> None:
        """Leave a note (a file) on this host that withdraws the accusation.

        Call this method if ``withdraw`` failed because the database is away.
        """
        leave_note(self._id)

    def take_over_dead_workers(
        self, session: Session, contact: Contact, deadline_seconds: float, *, only_accusers: bool = False
    ) -> Takeover:
        """Take over the rows of dead workers.

        Count each proven death for its event, in this transaction. Take over at most one row of a
        worker that processed no event alone. The worker that takes over such a row then processes
        events alone. One worker per death is enough for this. If ``only_accusers``, take over only
        rows of workers that processed an event alone.
        """
        found = Takeover()
        rows = self._open_rows(session, contact, only_accusers)
        timeline = _timeline(session) if any(row.isolated_event is not None for row in rows) else None
        for row in rows:
            if row.isolated_event is None and any(each.isolated is None for each in found.dead):
                continue
            death = judge_death(_traces(row, contact, timeline), deadline_seconds)
            if death is Death.UNDECIDED:
                found.is_undecided = True
            elif death is not Death.NONE:
                self._take_over(session, row, death, found)
        return found

    def _open_rows(self, session: Session, contact: Contact, only_accusers: bool) -> Sequence[Row[Any]]:
        """what: other workers' open rows, with the facts for ``judge_death`` · lock: none · index: none (few rows)"""
        workers = self._workers
        isolated_at, seen_at = (func.date_part("epoch", workers.c[key]) for key in ("isolated_at", "seen_at"))
        regained_at = literal(contact.regained_at, DateTime(timezone=True))
        columns: list[ColumnElement[Any]] = [
            *(workers.c[key].label(key) for key in ("id", "host", "pid", "seen_at")),
            *(workers.c[key].label(key) for key in ("isolated_event", "isolated_timeline")),
            seconds_since(workers.c.seen_at).label("silent_seconds"),
            func.coalesce(seen_at - isolated_at, 0.0).label("lived_on_seconds"),
            func.coalesce(workers.c.isolated_at > func.pg_postmaster_start_time(), False).label("is_same_start"),
            func.coalesce(workers.c.isolated_at < regained_at, False).label("judge_was_cut_off"),
        ]
        accusers = [workers.c.isolated_event.is_not(None)] if only_accusers else []
        open_rows: Select[Any] = select(*columns).where(workers.c.id != self._id, *self._is_open(), *accusers)
        return session.execute(open_rows.order_by(workers.c.started_at)).all()

    def _take_over(self, session: Session, row: Row[Any], death: Death, found: Takeover) -> None:
        """what: closes the row of a dead worker and counts its death, if the row is unchanged
        lock: FOR UPDATE SKIP LOCKED, the row of the worker before the event · index: primary keys

        If the death was counted, the row keeps the id of its event. ``_reopen`` needs this id to
        subtract the death again.
        """
        workers = self._workers
        unchanged = [workers.c.id == row.id, workers.c.seen_at == row.seen_at, *self._is_open()]
        same_event = workers.c.isolated_event.is_not_distinct_from(row.isolated_event)
        locked = select(workers.c.id).where(*unchanged, same_event).with_for_update(skip_locked=True)
        if session.scalar(locked) is None:
            return
        change = _count(session, self._outbox, row.isolated_event) if death is Death.PROVEN else Changed.NOTHING
        if change is Changed.LOCKED:
            found.is_undecided = True
            return
        is_counted = change is Changed.DONE
        taken = {"succeeded_at": func.clock_timestamp()} | ({} if is_counted else _NOTHING_ISOLATED)
        session.execute(update(workers).where(workers.c.id == row.id).values(by_column(workers, taken)))
        remove_note(row.id)
        found.dead.append(DeadWorker(row.host, row.pid, row.isolated_event, is_counted))

    def learn_set_aside(self, session: Session) -> None:
        """Read which events other running workers have set aside."""
        workers = self._workers
        others = session.scalars(_keys_set_aside(workers, _is_running(workers), workers.c.id != self._id)).all()
        self.set_aside.learn(others)

    def _is_open(self) -> list[ColumnElement[bool]]:
        return [self._workers.c.stopped_at.is_(None), self._workers.c.succeeded_at.is_(None)]

    def _reopen(self, session: Session) -> bool:
        """what: opens the row of this worker again if another worker has taken it over; subtracts
        the counted death
        lock: FOR UPDATE on the row, then FOR UPDATE SKIP LOCKED on the event · index: primary keys

        The other worker was wrong, because this process is alive. This process was only paused, or
        could not reach the database. If the event is locked, return False and write nothing. The
        next heartbeat tries again.
        """
        workers = self._workers
        taken = [workers.c.id == self._id, workers.c.succeeded_at.is_not(None)]
        row = session.execute(select(workers.c.isolated_event).where(*taken).with_for_update()).one_or_none()
        if row is None:
            return True
        counted = row.isolated_event
        if counted is not None and take_back_crash(session, self._outbox, counted) is Changed.LOCKED:
            return False
        reopened = {"succeeded_at": None, **_NOTHING_ISOLATED}
        session.execute(update(workers).where(*taken).values(by_column(workers, reopened)))
        return True

    def _write(self, session: Session, values: Mapping[str, Any]) -> datetime | None:
        """what: updates the row of this process and its heartbeat, or inserts the row
        lock: row · index: primary key

        Return the time of the heartbeat. If another worker has taken the row over, open the row
        again first. If the row cannot be opened now, return None.
        """
        workers = self._workers
        seen = {"seen_at": func.clock_timestamp(), **values}
        who = {"id": self._id, "version": __version__, **this_process()}
        row = insert(workers).values({"metrics": {}, **who, **seen})
        written = row.on_conflict_do_update(
            index_elements=[workers.c.id], set_=by_column(workers, seen), where=workers.c.succeeded_at.is_(None)
        ).returning(workers.c.seen_at)
        seen_at: datetime | None = session.scalar(written)
        if seen_at is None and self._reopen(session):
            seen_at = session.scalar(written)
        return seen_at


def _traces(row: Row[Any], contact: Contact, timeline: str | None) -> Traces:
    isolation = IsolationTrace(
        lived_on_seconds=row.lived_on_seconds,
        is_same_server=row.is_same_start and row.isolated_timeline == timeline,
        judge_was_cut_off=row.judge_was_cut_off,
        is_withdrawn=has_note(row.id),
    )
    return Traces(
        is_running=is_running(row.host, row.pid),
        silent_seconds=row.silent_seconds,
        judge_heartbeats=contact.heartbeats,
        isolation=None if row.isolated_event is None else isolation,
    )


def _timeline(session: Session) -> str | None:
    """Return the timeline of the server. Return None if the timeline cannot be read.

    Without the timeline, only the server's start time shows a failover.
    """
    try:
        with savepoint(session):
            found: str = session.scalars(_TIMELINE).one()
    except DBAPIError as error:
        if classify(error) is Failure.RECONNECT:
            raise
        return None
    return found


def _count(session: Session, outbox: Table, event: int) -> Changed:
    """Count a death for an event.

    If a trigger or a rule of the outbox refuses this, the death is not counted.
    """
    try:
        with savepoint(session):
            return add_crash(session, outbox, event)
    except DBAPIError as error:
        if classify(error) in (Failure.RECONNECT, Failure.RETRY):
            raise
        return Changed.NOTHING


def list_workers(session: Session, tables: Tables) -> Sequence[WorkerRow]:
    """Read the rows of all processes, open rows first."""
    workers = tables.workers
    silent = seconds_since(workers.c.seen_at)
    columns = [workers.c[key] for key in ("id", "host", "pid", "version", "started_at")]
    query: Select[Any] = select(*columns, silent, workers.c.stopped_at, workers.c.guard, workers.c.metrics)
    rows = session.execute(query.order_by(workers.c.stopped_at.is_not(None), workers.c.started_at)).all()
    return [WorkerRow(*row) for row in rows]


def set_aside_events(workers: Table) -> Select[Any]:
    """what: the ids of the events that workers have set aside
    lock: none · index: none, ``workers`` is small

    The events of a worker count as set aside while it runs. After the worker's end, its events
    count until another worker starts. The new worker tries these events again.
    """
    return _keys_set_aside(workers, _is_latest(workers))


def read_set_aside(session: Session, tables: Tables) -> dict[int, str]:
    """Return the events that workers have set aside and that are still in the outbox, each with the error."""
    workers, outbox = tables.workers, tables.outbox
    each = _aside(workers)
    still_there = outbox.c.id == cast(each.c.key, BigInteger)
    rows = select(outbox.c.id, each.c.value).select_from(workers.join(each, true()).join(outbox, still_there))
    return {row.id: row.value for row in session.execute(rows.where(_is_latest(workers)).order_by(outbox.c.id))}


def _keys_set_aside(workers: Table, *which: ColumnElement[bool]) -> Select[Any]:
    each = _aside(workers)
    return select(cast(each.c.key, BigInteger)).select_from(workers.join(each, true())).where(*which)


def _aside(workers: Table) -> TableValuedAlias:
    return func.jsonb_each_text(workers.c.set_aside).table_valued("key", "value").render_derived(name="aside")


def _is_running(workers: FromClause) -> ColumnElement[bool]:
    return and_(workers.c.stopped_at.is_(None), seconds_since(workers.c.seen_at) <= WORKER_SILENT_AFTER_SECONDS)


def _is_latest(workers: Table) -> ColumnElement[bool]:
    """Build the condition that a row's worker runs, or that no other worker has started after its
    end.
    """
    later = workers.alias("later")
    ended = func.coalesce(workers.c.stopped_at, workers.c.seen_at)
    return or_(_is_running(workers), ~select(later.c.id).where(later.c.started_at > ended).exists())
