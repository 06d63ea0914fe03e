"""Reads and writes ``workers``: one row per process, with its last heartbeat and its counters.

A worker writes its row at start and at every heartbeat, and closes the row when it stops cleanly. If an open row is no
longer updated, its worker has died.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Select,
    Table,
    TableValuedAlias,
    and_,
    cast,
    delete,
    func,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from outbox_worker import __version__
from outbox_worker.database.expressions import seconds_since
from outbox_worker.model import Guard
from outbox_worker.schema.tables import Tables, by_column
from outbox_worker.store.processes import WORKER_SILENT_AFTER_SECONDS, is_gone, this_process
from outbox_worker.store.set_aside import SetAside

ROWS_KEPT_FOR = timedelta(days=1)
"""The age at which the row of an ended process is deleted."""


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


class Workers:
    """Writes the row of this process, and finds rows of dead workers."""

    def __init__(self, tables: Tables, worker_id: UUID) -> None:
        self.set_aside = SetAside()
        """The events that no claim of this process takes. Each heartbeat writes those that this process set aside."""
        self._workers = tables.workers
        self._id = worker_id

    def join(self, session: Session, guard: Guard) -> None:
        """Insert the row of this process, and delete the rows of processes that ended more than a day ago."""
        workers = self._workers
        last_seen = func.coalesce(workers.c.stopped_at, workers.c.seen_at)
        session.execute(delete(workers).where(last_seen < func.clock_timestamp() - ROWS_KEPT_FOR))
        self.beat(session, guard, {})

    def take_over_dead_worker(self, session: Session) -> bool:
        """Mark one dead worker as taken over by this worker. Return False if there is no dead worker left.

        A worker is dead if its row is open, and the row either has no recent heartbeat or names a process of this host
        that no longer runs.
        """
        workers = self._workers
        is_open = [workers.c.stopped_at.is_(None), workers.c.succeeded_at.is_(None), workers.c.id != self._id]
        columns = workers.c.id, workers.c.host, workers.c.pid, seconds_since(workers.c.seen_at)
        for key, host, pid, seconds in session.execute(select(*columns).where(*is_open)).all():
            if is_gone(host, pid, seconds, WORKER_SILENT_AFTER_SECONDS):
                taken = update(workers).where(workers.c.id == key, *is_open).values(succeeded_at=func.clock_timestamp())
                if session.scalar(taken.returning(workers.c.id)):
                    return True
        return False

    def learn_set_aside(self, session: Session) -> None:
        """Read which events other running workers have set aside."""
        workers = self._workers
        others = session.scalars(_keys_set_aside(workers, _is_running(workers), workers.c.id != self._id)).all()
        self.set_aside.learn(others)

    def beat(self, session: Session, guard: Guard, metrics: Mapping[str, float], *, stopped: bool = False) -> None:
        """Write a heartbeat, and the counters and events set aside of this process. If ``stopped``, close the row."""
        now = func.clock_timestamp()
        who = {"id": self._id, "version": __version__, **this_process()}
        seen = {
            "seen_at": now,
            "guard": guard.value,
            "metrics": dict(metrics),
            "set_aside": self.set_aside.refusals(),
            "stopped_at": now if stopped else None,
        }
        row = insert(self._workers).values(**who, **seen)
        session.execute(
            row.on_conflict_do_update(index_elements=[self._workers.c.id], set_=by_column(self._workers, seen))
        )


def list_workers(session: Session, tables: Tables) -> Sequence[WorkerRow]:
    """Read the rows of all processes, open rows first."""
    workers = tables.workers
    silent = seconds_since(workers.c.seen_at)
    columns = [workers.c[key] for key in ("id", "host", "pid", "version", "started_at")]
    query: Select[Any] = select(*columns, silent, workers.c.stopped_at, workers.c.guard, workers.c.metrics)
    rows = session.execute(query.order_by(workers.c.stopped_at.is_not(None), workers.c.started_at)).all()
    return [WorkerRow(*row) for row in rows]


def set_aside_events(workers: Table) -> Select[Any]:
    """what: the ids of the events that workers have set aside · lock: none · index: none, ``workers`` is small

    A row counts while its worker runs, and afterwards until another worker starts, because that one tries again.
    """
    return _keys_set_aside(workers, _is_latest(workers))


def read_set_aside(session: Session, tables: Tables) -> dict[int, str]:
    """Return the events that workers have set aside and that are still in the outbox, each with the refusal."""
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
    """Build the condition that the worker of a row runs, or that no other worker has started after it ended."""
    later = workers.alias("later")
    ended = func.coalesce(workers.c.stopped_at, workers.c.seen_at)
    return or_(_is_running(workers), ~select(later.c.id).where(later.c.started_at > ended).exists())
