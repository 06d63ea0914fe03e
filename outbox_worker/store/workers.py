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

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from outbox_worker import __version__
from outbox_worker.database.expressions import seconds_since
from outbox_worker.model import Guard
from outbox_worker.schema.tables import Tables, by_column
from outbox_worker.store.processes import WORKER_SILENT_AFTER_SECONDS, is_gone, this_process

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

    def beat(self, session: Session, guard: Guard, metrics: Mapping[str, float], *, stopped: bool = False) -> None:
        """Write a heartbeat and the counters of this process. If ``stopped``, close the row."""
        now = func.clock_timestamp()
        who = {"id": self._id, "version": __version__, **this_process()}
        seen = {"seen_at": now, "guard": guard.value, "metrics": dict(metrics), "stopped_at": now if stopped else None}
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
