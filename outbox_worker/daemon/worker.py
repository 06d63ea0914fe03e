"""The daemon: start, serve, stop. ``run`` is a loop over ``run_once``.

The claim loops are threads, and so are the chores (heartbeat, gauges, guard); the main thread takes the signals and
asks the database nothing while they run: a stop does not wait for an answer.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from uuid import uuid4

from sqlalchemy import func, select

from outbox_worker.daemon.claim_loop import ClaimLoop, LoopThread, all_done
from outbox_worker.daemon.horizon import HorizonWatch
from outbox_worker.daemon.listener import Listener
from outbox_worker.daemon.signals import Signals
from outbox_worker.daemon.supervision import Pulse, Supervision
from outbox_worker.daemon.systemd import Notifier
from outbox_worker.database.engine import Database
from outbox_worker.database.failures import sqlstate
from outbox_worker.database.retry import wait_out_outage
from outbox_worker.errors import SettingError, in_one_line
from outbox_worker.model import Guard, PaymentTotals
from outbox_worker.reconcile.periodic import PeriodicBackfill
from outbox_worker.schema.catalogue import notifies
from outbox_worker.schema.requirements import check_schema, find_problems, list_problems
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import RELOADABLE, Settings
from outbox_worker.settle.handlers import build_handlers, claimed_types
from outbox_worker.settle.pacing import Frontier, Pacing
from outbox_worker.settle.processor import Processor
from outbox_worker.store.backfill_runs import BackfillRuns
from outbox_worker.store.dead_letters import count_open
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.outbox import Backlog, Outbox
from outbox_worker.store.purchases import PurchaseRepository
from outbox_worker.store.workers import Workers
from outbox_worker.telemetry.logs import configure_logging
from outbox_worker.telemetry.reporter import Telemetry

_NAMES_AND_RIGHTS = ("42", "3F")
"""Classes of SQLSTATE: a table, column, schema or privilege that is not there."""
CHORE_SECONDS = 5.0
"""Between two heartbeats; also how long a changed guard can stay unnoticed while no batch trips over it."""


class Worker:
    """One process: ``settings.concurrency`` claim loops over one database.

    ``reread`` reads the settings again, when a signal asks for it.
    """

    def __init__(self, settings: Settings, reread: Callable[[], Settings] | None = None) -> None:
        self.telemetry = Telemetry()
        self._settings = settings
        self._reread = reread
        self._supervision = Supervision(settings, self.telemetry, Notifier(os.environ))
        self._tables = build_tables(settings)
        deadline = settings.database_deadline_seconds
        self._database = Database(settings, connections=settings.concurrency + 1, deadline_seconds=deadline)
        self._guard = GuardWatch(self._tables.purchases, self.telemetry.guard_changed)
        self._workers = Workers(self._tables, uuid4())
        self._stop = threading.Event()
        self._is_over = threading.Event()
        self._is_schema_suspect = False
        self._loops: list[ClaimLoop] = []
        self._listens = False
        self._isolates_first = False
        self._listener: Listener | None = None
        self._runs = BackfillRuns(self._tables)
        self._horizon = HorizonWatch()

    def run(self, signals: Signals) -> int:
        """Serve until a signal comes; return the exit status. Waits for a database that is not there yet."""
        with self._supervision.answering():
            outbox = self._wait_for_start(signals)
            if outbox is None:
                self._supervision.stops()
            else:
                self._loops = self._make_loops(outbox)
                self._run_loops(signals, [loop.run for loop in self._loops], outbox, self._backfills())
        self._database.close()
        return 0

    def drain(self, signals: Signals) -> int:
        """Settle all that is due now, then end: 0, or 1 where rows that others hold did not come free in time.

        Raises DatabaseUnavailable when the database is not there.
        """
        self._database.check()
        outbox = self._start()
        until, is_empty = self._now(), partial(self._is_empty, outbox)
        self._loops = self._make_loops(outbox)
        found = self._run_loops(signals, [partial(loop.drain, until, is_empty) for loop in self._loops], outbox)
        self._database.close()
        return 0 if all(found) else 1

    def _wait_for_start(self, signals: Signals) -> Outbox | None:
        """Until the database was looked at; None when told to stop meanwhile. To wait for it is a loop, too."""
        (pulse,) = self._supervision.pulses(1, signals)
        return wait_out_outage(
            partial(self._start, listens=True), pulse, partial(self._meet_trouble_at_start, signals, pulse)
        )

    def _meet_trouble_at_start(
        self, signals: Signals, pulse: Pulse, error: BaseException, pause_seconds: float
    ) -> None:
        pulse.failed(error)
        self.telemetry.trouble(error, pause_seconds)
        self._supervision.waits(error)
        self._reload_if_asked(signals)

    def _start(self, *, listens: bool = False) -> Outbox:
        """Look before the first claim: is all there, which guard is in force, whose outbox is it."""
        with self._database.transaction() as session:
            self._tables = check_schema(session, self._tables)
            guard = self._guard.probe(session).guard
            self._isolates_first = self._workers.take_over_dead_worker(session)
            self._workers.join(session, guard)
            event_types = claimed_types(session, self._tables, self._settings.unknown_types)
        self._listens = listens and (self._settings.pooler == "none" or self._settings.listen_conninfo is not None)
        self.telemetry.started(self._settings.concurrency, guard)
        if self._isolates_first:
            self.telemetry.isolating_after_crash(self._settings.batch_size)
        return Outbox(self._tables, event_types)

    def _make_loops(self, outbox: Outbox) -> list[ClaimLoop]:
        frontier = Frontier()
        return [
            ClaimLoop(self._processor(outbox, frontier), self._settings, pulse, self._meet_trouble)
            for pulse in self._supervision.pulses(self._settings.concurrency, self._stop)
        ]

    def _processor(self, outbox: Outbox, frontier: Frontier) -> Processor:
        repository, policy = PurchaseRepository(self._tables), self._settings.retry_policy
        processor = Processor(
            self._database,
            outbox,
            repository,
            build_handlers(repository, policy),
            self._guard,
            self.telemetry,
            policy,
            Pacing(self._settings.batch_size, self._settings.batch_target_ms / 1000, frontier),
        )
        if self._isolates_first:
            processor.isolate_next(self._settings.batch_size)
        return processor

    def _run_loops(
        self,
        signals: Signals,
        bodies: Sequence[Callable[[], bool]],
        outbox: Outbox,
        others: Sequence[Callable[[], bool]] = (),
    ) -> list[bool]:
        """Run the loops in threads, the chores and ``others`` beside them. The first signal stops them after their
        batch; the second does not wait: what is not committed then is rolled back by the server."""
        loops = [LoopThread(body, signals) for body in bodies]
        chores: Callable[[], bool] = partial(self._housekeeping, outbox)
        beside = [LoopThread(body, signals) for body in (chores, *others)]
        for thread in (*beside, *loops):
            thread.start()
        self._supervision.serves()
        while not all_done(loops) and not signals.wait(CHORE_SECONDS):
            self._reload_if_asked(signals)
        self._supervision.stops()
        if signals.is_set():
            self.telemetry.stopping()
        self._stop.set()
        self._wake_loop()
        self._await(loops, signals)
        self._is_over.set()
        self._await(beside, signals)
        self.telemetry.stopped()
        return [thread.result() for thread in loops]

    def _reload_if_asked(self, signals: Signals) -> None:
        """Read the settings again; where they cannot be used, nothing changes."""
        if self._reread is None or not signals.take_reload():
            return
        self._supervision.reloads()
        try:
            self._adopt(self._reread())
            self._supervision.reloaded("the settings were read again")
        except SettingError as error:
            self.telemetry.reload_refused(in_one_line(error))
            self._supervision.reloaded("nothing was reloaded: a setting cannot be used")

    def _adopt(self, found: Settings) -> None:
        """Take the log level and the limits, each loop from its next step on; only a restart changes the rest."""
        before, level = self._settings, self._settings.log_level
        changed = [name for name in Settings.model_fields if getattr(found, name) != getattr(before, name)]
        self._settings = before.model_copy(update={name: getattr(found, name) for name in RELOADABLE})
        if found.log_level != level:
            configure_logging(found.log_level, before.log_format)
        for loop in self._loops:
            loop.adopt(self._settings, partial(self._adopt_in, self._settings))
        self.telemetry.reloaded(
            [name for name in changed if name in RELOADABLE], [name for name in changed if name not in RELOADABLE]
        )

    def _adopt_in(self, settings: Settings, processor: Processor) -> None:
        policy = settings.retry_policy
        handlers = build_handlers(PurchaseRepository(self._tables), policy)
        processor.adopt(handlers, policy, settings.batch_size, settings.batch_target_ms / 1000)

    def _await(self, threads: Sequence[LoopThread], signals: Signals) -> None:
        """Until all are done; not for longer than the deadline, and not in a hurry."""
        give_up = time.monotonic() + self._settings.database_deadline_seconds
        while not all_done(threads) and not signals.is_hurried() and time.monotonic() < give_up:
            signals.pause(0.5)

    def _housekeeping(self, outbox: Outbox) -> bool:
        """The chores, in turns until the loops have ended, and once more to say good-bye."""
        while not self._is_over.is_set():
            self._do_chores(outbox)
            self._is_over.wait(CHORE_SECONDS)
        self._do_chores(outbox, stopped=True)
        return True

    def _backfills(self) -> list[Callable[[], bool]]:
        """What a thread of its own does, so that it holds up neither the claim loops nor the heartbeat."""
        if not self._settings.backfill_every_seconds:
            return []
        given = self._settings, self._tables, self._guard, self._stop, self.telemetry, self._meet_trouble
        return [PeriodicBackfill(*given).run]

    def _start_listening(self) -> None:
        self._listener = Listener(self._settings, self._tables, self._stop, self._wake_loop, self._meet_trouble)
        self._listener.start()

    def _wake_loop(self) -> None:
        """There is something to do: wake a loop that rests; where none does, let all look once more."""
        resting = [loop for loop in self._loops if loop.is_resting]
        for loop in self._loops if self._stop.is_set() else resting[:1] or self._loops:
            loop.wake()

    def _do_chores(self, outbox: Outbox, *, stopped: bool = False) -> None:
        """Heartbeat, gauges, guard, and whether there is something to listen to: the option ``notify`` may come while
        we run. A chore that fails is told and tried again at the next turn."""
        try:
            if self._is_schema_suspect:
                self._tell_schema_problems()
            with self._database.transaction() as session:
                guard = self._guard.probe(session).guard
                must_listen = self._listens and self._listener is None and notifies(session, self._tables.outbox)
                backlog = outbox.backlog(session)
                letters = count_open(session, self._tables)
                self.telemetry.observe_backlog(backlog.due, backlog.oldest_due_seconds, letters)
                self.telemetry.observe_horizon(self._horizon.stood_still_seconds(session))
                if looked := self._runs.latest_counts(session):
                    left = PaymentTotals.read(looked.get("left"))
                    self.telemetry.observe_unexplained(left.count, left.money)
                counted = self.telemetry.beat()
                self._workers.beat(session, guard, counted, stopped=stopped)
        except Exception as error:  # noqa: BLE001 - told with its traceback where it is our own mistake
            self._meet_trouble(error, CHORE_SECONDS)
            self._supervision.looked_in_vain(error)
            return
        self._supervision.looked(_status(guard, backlog, letters, counted["events_per_second"]))
        if must_listen:
            self._start_listening()

    def _meet_trouble(self, error: BaseException, pause_seconds: float) -> None:
        self.telemetry.trouble(error, pause_seconds)
        if (sqlstate(error) or "").startswith(_NAMES_AND_RIGHTS):
            self._is_schema_suspect = True

    def _tell_schema_problems(self) -> None:
        """Something that was there at the start is refused now: the operator is told what, and how to mend it."""
        with self._database.transaction() as session:
            problems = find_problems(session, self._tables)
        if problems:
            self.telemetry.schema_problems(list_problems(problems))
        self._is_schema_suspect = False

    def _is_empty(self, outbox: Outbox, until: datetime) -> bool:
        with self._database.transaction() as session:
            return not outbox.has_due(session, until)

    def _now(self) -> datetime:
        """The database's clock: only it says what is due."""
        with self._database.transaction() as session:
            now: datetime = session.scalars(select(func.clock_timestamp())).one()
        return now


def _status(guard: Guard, backlog: Backlog, letters: int, rate: float) -> str:
    """One line for ``systemctl status``."""
    late = f", the oldest for {backlog.oldest_due_seconds:.0f} s" if backlog.due else ""
    return f"{backlog.due} event(s) due{late}; {rate:.0f} settled/s; {letters} dead letter(s); guard {guard}"
