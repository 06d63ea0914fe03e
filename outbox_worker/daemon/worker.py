"""Starts, runs and stops the daemon.

Claim loops, chores, listener and periodic backfill are threads. While these threads run, the main
thread only waits for signals and sends no queries. Therefore the main thread can stop the process
even if the database does not answer.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from uuid import uuid4

from outbox_worker.daemon.bell import Bell
from outbox_worker.daemon.chores import CHORE_SECONDS, Chores
from outbox_worker.daemon.claim_loop import ClaimLoop, LoopThread, all_done
from outbox_worker.daemon.heartbeats import Heartbeats
from outbox_worker.daemon.listener import Listener
from outbox_worker.daemon.signals import Signals
from outbox_worker.daemon.supervision import Pulse, Supervision
from outbox_worker.daemon.systemd import Notifier
from outbox_worker.database.engine import Database
from outbox_worker.database.retry import wait_out_outage
from outbox_worker.errors import SettingError, in_one_line
from outbox_worker.reconcile.periodic import PeriodicBackfill
from outbox_worker.schema.catalogue import adopted_tables
from outbox_worker.schema.concerns import find_concerns
from outbox_worker.schema.nullable import nullable_columns
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import RELOADABLE, Settings
from outbox_worker.settle.handlers import claimed_types
from outbox_worker.settle.isolation import Isolation
from outbox_worker.settle.pacing import Frontier, Pacing
from outbox_worker.settle.processor import Processor
from outbox_worker.store.doors import Doors
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.outbox import Outbox
from outbox_worker.store.queries import database_time
from outbox_worker.store.workers import Workers
from outbox_worker.telemetry.logs import configure_logging
from outbox_worker.telemetry.reporter import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The facts that the worker reads from the database before its first claim."""

    tables: Tables
    """The tables with the column types of this database.

    For example, the payload column can have the type jsonb, json or text.
    """
    doors: Doors
    """The SQL statements on these tables, for the event types that the worker claims."""

    @property
    def outbox(self) -> Outbox:
        return self.doors.outbox


class Worker:
    """Runs ``settings.concurrency`` claim loops in one process, on one database.

    After SIGHUP, the worker calls ``reread`` to read the settings again. The constructor does not connect to the
    database.
    """

    def __init__(self, settings: Settings, reread: Callable[[], Settings] | None = None) -> None:
        self.telemetry = Telemetry()
        self._settings = settings
        self._reread = reread
        self._supervision = Supervision(settings, self.telemetry, Notifier(os.environ))
        tables, deadline = build_tables(settings), settings.database_deadline_seconds
        self._database = Database(settings, connections=settings.concurrency + 1, deadline_seconds=deadline)
        self._guard = GuardWatch(tables.purchases, self.telemetry.guard_changed)
        self._workers = Workers(tables, uuid4())
        self._isolation = Isolation(self._database, self._workers)
        self._heartbeats = Heartbeats(self._database, self._workers, self._isolation, self.telemetry, settings)
        self._stop = threading.Event()
        self._is_over = threading.Event()
        self._bell = Bell()
        self._loops: list[ClaimLoop] = []

    def run(self, signals: Signals) -> int:
        """Serve until a stop signal arrives. Return the exit status. If the database is down at start, wait."""
        with self._supervision.answering():
            start = self._wait_for_start(signals)
            if start is None:
                self._supervision.stops()
            else:
                self._serve(signals, start)
        self._database.close()
        return 0

    def drain(self, signals: Signals) -> int:
        """Settle all events that are due now, then end.

        Return 1 if other transactions kept due rows locked for too long. Also return 1 if due
        events are set aside (excluded from claims). Otherwise return 0. Raises DatabaseUnavailable.
        """
        self._database.check()
        start = self.start()
        until = self._now()
        chores = self._make_chores(start, start_listening=None)
        self._loops = self._make_loops(start, chores)
        is_empty = partial(self._is_empty, start.outbox)
        drains = [partial(loop.drain, until, is_empty) for loop in self._loops]
        emptied = self._run_loops(signals, drains, [partial(chores.run, self._is_over)])
        is_complete = all(emptied) and (signals.is_set() or self._left_nothing(start.outbox, until))
        self._database.close()
        return 0 if is_complete else 1

    def start(self) -> Start:
        """Check the tables and the guard, read the event types to claim, and insert this process into ``workers``.

        Raises SchemaError, and any error of the database.
        """
        with self._database.transaction() as session:
            tables = check_schema(session, build_tables(self._settings))
            self._guard.know(tables)
            guard = self._guard.probe(session).guard
            found = self._heartbeats.start(session, guard)
            event_types = claimed_types(session, tables, self._settings.unknown_types)
            adopted = adopted_tables(session, tables)
            concerns = find_concerns(session, tables)
            nullable = nullable_columns(session, tables)
            self._workers.learn_set_aside(session)
        if nullable:
            self.telemetry.nullable_columns(nullable)
        self.telemetry.started(self._settings.concurrency, guard)
        if adopted:
            self.telemetry.tables_adopted(adopted, ignores_types=event_types is not None)
        for concern in concerns:
            self.telemetry.setup_concern(concern.finding, concern.remedy)
        self._heartbeats.started(found)
        return Start(tables=tables, doors=Doors.of(tables, event_types))

    def _wait_for_start(self, signals: Signals) -> Start | None:
        """Start as soon as the database can be reached. Return None if a stop signal arrives first.

        While this method waits, /livez reports that the process is alive.
        """
        (pulse,) = self._supervision.pulses(1, signals)
        return wait_out_outage(self.start, pulse, partial(self._meet_trouble_at_start, signals, pulse))

    def _meet_trouble_at_start(
        self, signals: Signals, pulse: Pulse, error: BaseException, pause_seconds: float
    ) -> None:
        pulse.failed(error)
        self._heartbeats.lost()
        self.telemetry.trouble(error, pause_seconds)
        self._supervision.waits(error)
        self._reload_if_asked(signals)

    def _serve(self, signals: Signals, start: Start) -> None:
        may_listen = self._settings.pooler == "none" or self._settings.listen_conninfo is not None
        given = self._settings, self._database, start.tables, self._bell, self._stop
        listener = Listener(*given, self.telemetry.trouble)
        chores = self._make_chores(start, start_listening=listener.start if may_listen else None)
        self._loops = self._make_loops(start, chores)
        housekeeping: Callable[[], bool] = partial(chores.run, self._is_over)
        beside = [housekeeping, *self._backfills(start, chores)]
        self._run_loops(signals, [loop.run for loop in self._loops], beside)

    def _make_chores(self, start: Start, start_listening: Callable[[], None] | None) -> Chores:
        return Chores(
            self._database,
            start.tables,
            start.outbox,
            self._guard,
            self._heartbeats,
            self.telemetry,
            self._supervision,
            start_listening,
        )

    def _make_loops(self, start: Start, chores: Chores) -> list[ClaimLoop]:
        frontier, shared = Frontier(), (chores.meet_trouble, self._heartbeats.may_claim, self._bell)
        return [
            ClaimLoop(self._processor(start, frontier, pulse), self._settings, pulse, *shared)
            for pulse in self._supervision.pulses(self._settings.concurrency, self._stop)
        ]

    def _processor(self, start: Start, frontier: Frontier, pulse: Pulse) -> Processor:
        return Processor(
            self._database,
            start.doors,
            self._guard,
            self.telemetry,
            Pacing(self._settings.limits, frontier, self._workers.set_aside),
            self._isolation,
            pulse.beat,
        )

    def _backfills(self, start: Start, chores: Chores) -> list[Callable[[], bool]]:
        """Return the function that runs the periodic backfill, if the backfill is on.

        The backfill runs in a separate thread, and delays neither claims nor heartbeats.
        """
        if not self._settings.backfill_every_seconds:
            return []
        given = self._settings, start.tables, self._guard, self._stop, self.telemetry, chores.meet_trouble
        return [PeriodicBackfill(*given).run]

    def _run_loops(
        self, signals: Signals, bodies: Sequence[Callable[[], bool]], beside: Sequence[Callable[[], bool]]
    ) -> list[bool]:
        """Run the claim loops in threads. Run ``beside`` in other threads until the claim loops have ended.

        After the first stop signal, each loop finishes its batch. After the second stop signal, the process ends
        without waiting, and the server rolls back all open transactions.
        """
        loops, others = ([LoopThread(body, signals) for body in each] for each in (bodies, beside))
        for thread in (*others, *loops):
            thread.start()
        self._supervision.serves()
        while not all_done(loops) and not signals.wait(CHORE_SECONDS):
            self._reload_if_asked(signals)
        self._supervision.stops()
        if signals.is_set():
            self.telemetry.stopping()
        self._stop.set()
        self._heartbeats.may_claim.set()
        self._bell.silence()
        self._await(loops, signals)
        self._is_over.set()
        self._await(others, signals)
        self._isolation.withdraw_here()
        self.telemetry.stopped()
        return [thread.result() for thread in loops]

    def _await(self, threads: Sequence[LoopThread], signals: Signals) -> None:
        """Wait until all threads have ended or a second stop signal arrives.

        Wait at most ``database_deadline_seconds``.
        """
        give_up = time.monotonic() + self._settings.database_deadline_seconds
        while not all_done(threads) and not signals.is_hurried() and time.monotonic() < give_up:
            signals.pause(0.5)

    def _reload_if_asked(self, signals: Signals) -> None:
        """Read the settings again if SIGHUP arrived. If a setting is invalid, keep all old settings."""
        if self._reread is None or not signals.take_reload():
            return
        self._supervision.reloads()
        try:
            self._adopt(self._reread())
            self._supervision.reloaded("the settings were read again")
        except SettingError as error:
            self.telemetry.reload_refused(in_one_line(error))
            self._supervision.reloaded("nothing was reloaded, because a setting is invalid")

    def _adopt(self, found: Settings) -> None:
        """Apply the log level and the limits of ``found``.

        Each loop uses the new limits from its next step on. Report all other changed settings.
        These settings take effect only after a restart.
        """
        before = self._settings
        changed = [name for name in Settings.model_fields if getattr(found, name) != getattr(before, name)]
        self._settings = before.model_copy(update={name: getattr(found, name) for name in RELOADABLE})
        if found.log_level != before.log_level:
            configure_logging(found.log_level, before.log_format)
        for loop in self._loops:
            loop.settings = self._settings
        self.telemetry.reloaded(
            [name for name in changed if name in RELOADABLE], [name for name in changed if name not in RELOADABLE]
        )

    def _is_empty(self, outbox: Outbox, until: datetime) -> bool:
        with self._database.transaction() as session:
            return not outbox.has_due(session, until, set_aside=self._workers.set_aside.ids)

    def _left_nothing(self, outbox: Outbox, until: datetime) -> bool:
        """Return True if no due event is set aside (excluded from claims).

        Otherwise log how many events are set aside.
        """
        if not self._workers.set_aside.ids:
            return True
        with self._database.transaction() as session:
            if not outbox.has_due(session, until):
                return True
        self.telemetry.ended_with_set_aside(len(self._workers.set_aside.ids))
        return False

    def _now(self) -> datetime:
        """Return the time by the database's clock. Only this clock decides which events are due."""
        with self._database.transaction() as session:
            return database_time(session)
