"""Reads the current state of the queue: backlog, guard, dead letters, workers, counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from outbox_worker.database.engine import Database
from outbox_worker.decision import WORKER_SILENT_AFTER_SECONDS
from outbox_worker.model import Guard
from outbox_worker.schema.catalogue import adopted_tables
from outbox_worker.schema.concerns import find_concerns
from outbox_worker.schema.nullable import nullable_keys
from outbox_worker.schema.privileges import COUNTING
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables
from outbox_worker.settle.handlers import UnknownTypes, claimed_types
from outbox_worker.store.dead_letters import count_open
from outbox_worker.store.guard import guard_in_force
from outbox_worker.store.ignored import IgnoredEvents, count_ignored
from outbox_worker.store.outbox import Backlog, Outbox
from outbox_worker.store.queries import database_time
from outbox_worker.store.workers import WorkerRow, list_workers, read_set_aside


@dataclass(frozen=True, slots=True)
class Status:
    time: datetime
    guard: Guard
    backlog: Backlog
    never_claimed: int
    """The number of events that no worker can ever claim. Such an event has no due time, no id or
    no type."""
    open_letters: int
    workers: Sequence[WorkerRow]
    ignored: IgnoredEvents
    adopted: Sequence[str]
    """The tables that our migrations did not create."""
    concerns: Sequence[SchemaProblem]
    set_aside: Mapping[int, str] = field(default_factory=dict)
    """The events that workers exclude from claims. Maps each ``outbox.id`` to the error of the
    database."""

    def metrics(self) -> dict[str, float]:
        """Return each counter and each gauge.

        A counter is summed over all worker processes that reported within the last day. A gauge has its current value.
        """
        total: Counter[str] = Counter()
        for worker in self.workers:
            total.update({name: value for name, value in worker.metrics.items() if name != "events_per_second"})
        gauges: dict[str, float] = {
            "outbox_due_events": self.backlog.due,
            "outbox_oldest_due_seconds": self.backlog.oldest_due_seconds,
            "outbox_open_dead_letters": self.open_letters,
            "outbox_ignored_events": self.ignored.events,
            "outbox_set_aside_events": len(self.set_aside),
        }
        return dict(total) | gauges | {f'outbox_guard{{mode="{mode}"}}': float(mode is self.guard) for mode in Guard}

    def events_per_second(self) -> float:
        """Return how many events per second all running workers settled, according to their last heartbeats."""
        return sum(
            worker.metrics.get("events_per_second", 0) for worker in self.workers if condition(worker) == "running"
        )


def condition(worker: WorkerRow) -> str:
    """Return ``running``, ``stopped`` or ``silent``.

    A stopped worker recorded its end. A silent worker sends no heartbeat and is probably dead.
    """
    if worker.stopped_at is not None:
        return "stopped"
    return "silent" if worker.silent_seconds > WORKER_SILENT_AFTER_SECONDS else "running"


def read_status(database: Database, tables: Tables, unknown_types: UnknownTypes) -> Status:
    """Read the state in one transaction. Raises SchemaError if tables or privileges are missing."""
    with database.transaction() as session:
        tables = check_schema(session, tables, COUNTING)
        event_types = claimed_types(session, tables, unknown_types)
        outbox, set_aside = Outbox(tables, event_types), read_set_aside(session, tables)
        return Status(
            time=database_time(session),
            guard=guard_in_force(session, tables),
            backlog=outbox.backlog(session, set_aside=set_aside),
            never_claimed=outbox.never_claimed(session, nullable_keys(session, "outbox", tables.outbox)),
            open_letters=count_open(session, tables),
            workers=list_workers(session, tables),
            ignored=count_ignored(session, tables, event_types),
            adopted=adopted_tables(session, tables),
            concerns=find_concerns(session, tables),
            set_aside=set_aside,
        )
