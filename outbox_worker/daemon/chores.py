"""Runs the regular tasks of a worker (chores): writes heartbeats and updates gauges.

The chores also check which guard the worker can use. A guard (unique index or locks) prevents
duplicate purchases. The chores start the listener when the database has the trigger that notifies
workers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from outbox_worker.daemon.heartbeats import Heartbeats
from outbox_worker.daemon.horizon import HorizonWatch
from outbox_worker.daemon.supervision import Supervision
from outbox_worker.database.engine import Database
from outbox_worker.database.failures import Failure, classify, sqlstate
from outbox_worker.model import Guard, PaymentTotals
from outbox_worker.schema.catalogue import notifies
from outbox_worker.schema.requirements import find_problems, list_problems
from outbox_worker.schema.tables import Tables
from outbox_worker.store.backfill_runs import BackfillRuns
from outbox_worker.store.dead_letters import count_open
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.ignored import count_ignored
from outbox_worker.store.outbox import Backlog, Outbox
from outbox_worker.telemetry.reporter import Telemetry

CHORE_SECONDS = 5.0
"""The seconds between two rounds of chores.

Within this time, the worker notices a change of its guard (unique index or locks). An idle worker
notices the change within ``QUIET_SECONDS``.
"""
QUIET_SECONDS = 30.0
"""The seconds between two rounds that do all chores, while no event is due.

All other rounds only write a heartbeat.
"""
IGNORED_SECONDS = 300.0
"""The seconds between two counts of the events of ignored types.

The worker counts rarely, because each count reads up to 100,000 entries of an index.
"""
_NAMES_AND_RIGHTS = ("42", "3F")
"""The SQLSTATE classes of errors about a missing table, column, schema or privilege."""


@dataclass(frozen=True, slots=True)
class _Look:
    """The facts that one round of chores has read from the database."""

    guard: Guard
    backlog: Backlog
    open_letters: int
    has_notify: bool
    counted: dict[str, float]

    def status(self) -> str:
        """Return one line for ``systemctl status``."""
        late = f", the oldest for {self.backlog.oldest_due_seconds:.0f} s" if self.backlog.due else ""
        return (
            f"due: {self.backlog.due}{late}; settled per second: {self.counted['events_per_second']:.0f}; "
            f"dead letters: {self.open_letters}; guard: {self.guard}"
        )


class Chores:
    """Runs one round of chores (regular tasks) every ``CHORE_SECONDS``, in a separate thread.

    If a round fails, the chores log the failure, and the next round tries again. The first round
    that finds the option ``notify`` in the database calls ``start_listening``. If
    ``start_listening`` is None, the worker never listens.
    """

    def __init__(
        self,
        database: Database,
        tables: Tables,
        outbox: Outbox,
        guard: GuardWatch,
        heartbeats: Heartbeats,
        telemetry: Telemetry,
        supervision: Supervision,
        start_listening: Callable[[], None] | None,
    ) -> None:
        self._database, self._tables, self._outbox = database, tables, outbox
        self._guard, self._heartbeats = guard, heartbeats
        self._telemetry, self._supervision = telemetry, supervision
        self._start_listening = start_listening
        self._runs = BackfillRuns(tables)
        self._horizon = HorizonWatch()
        self._is_schema_suspect = False
        self._counted_ignored_at: float | None = None
        self._quiet_until = 0.0

    def run(self, is_over: threading.Event) -> bool:
        """Run rounds until ``is_over`` is set. Then run one more round.

        This round records that the process stopped.
        """
        while not is_over.is_set():
            self.do_round()
            is_over.wait(CHORE_SECONDS)
        self.do_round(stopped=True)
        return True

    def do_round(self, *, stopped: bool = False) -> None:
        """Read the facts, report them and write a heartbeat. If ``stopped``, also record that the process stopped."""
        try:
            if not stopped and self._supervision.is_idle and time.monotonic() < self._quiet_until:
                self._beat()
                return
            self._check_schema_if_suspect()
            look = self._look(stopped)
            self._heartbeats.written(stopped=stopped)
        except Exception as error:  # noqa: BLE001 - logged, a bug with its traceback
            self._quiet_until = 0.0
            self._heartbeats.lost()
            self.meet_trouble(error, CHORE_SECONDS)
            self._supervision.looked_in_vain(error)
            return
        self._quiet_until = 0.0 if look.backlog.due else time.monotonic() + QUIET_SECONDS
        self._count_ignored_if_late()
        self._supervision.looked(look.status())
        if look.has_notify and self._start_listening is not None:
            self._start_listening()
            self._start_listening = None

    def _beat(self) -> None:
        """Write only a heartbeat. Call this method if no event has become due since all chores were done."""
        with self._database.transaction() as session:
            self._heartbeats.beat(session, self._guard.state.guard, self._telemetry.beat(), stopped=False)
        self._heartbeats.written_only()

    def meet_trouble(self, error: BaseException, pause_seconds: float) -> None:
        """Log a failed step of any thread.

        If a missing table or privilege may be the cause, the next round checks all tables and privileges.
        """
        self._telemetry.trouble(error, pause_seconds)
        if classify(error) is Failure.RECONNECT:
            self._heartbeats.lost()
        if (sqlstate(error) or "").startswith(_NAMES_AND_RIGHTS):
            self._is_schema_suspect = True

    def _look(self, stopped: bool) -> _Look:
        with self._database.transaction() as session:
            guard = self._guard.probe(session).guard
            has_notify = self._start_listening is not None and notifies(session, self._tables.outbox)
            set_aside = self._heartbeats.review_set_aside(session)
            self._telemetry.observe_set_aside(len(set_aside))
            backlog = self._outbox.backlog(session, set_aside=set_aside)
            letters = count_open(session, self._tables)
            self._telemetry.observe_backlog(backlog.due, backlog.oldest_due_seconds, letters)
            self._telemetry.observe_horizon(self._horizon.stood_still_seconds(session))
            if found := self._runs.latest_counts(session):
                left = PaymentTotals.read(found.get("left"))
                self._telemetry.observe_unexplained(left.count, left.money)
            counted = self._telemetry.beat()
            self._heartbeats.beat(session, guard, counted, stopped=stopped)
        return _Look(guard, backlog, letters, has_notify, counted)

    def _count_ignored_if_late(self) -> None:
        """Count the events of ignored types in the first round and then every ``IGNORED_SECONDS``."""
        now = time.monotonic()
        if self._counted_ignored_at is not None and now - self._counted_ignored_at < IGNORED_SECONDS:
            return
        self._counted_ignored_at = now
        try:
            with self._database.transaction() as session:
                ignored = count_ignored(session, self._tables, self._outbox.event_types)
        except Exception as error:  # noqa: BLE001 - reported; the next count tries again
            self.meet_trouble(error, IGNORED_SECONDS)
            return
        self._telemetry.observe_ignored(ignored.events, {each.event_type: each.events for each in ignored.types})

    def _check_schema_if_suspect(self) -> None:
        """Log which tables, columns and privileges are missing now, each with its remedy."""
        if not self._is_schema_suspect:
            return
        with self._database.transaction() as session:
            problems = find_problems(session, self._tables)
        if problems:
            self._telemetry.schema_problems(list_problems(problems))
        self._is_schema_suspect = False
