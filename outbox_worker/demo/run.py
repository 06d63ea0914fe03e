"""Runs the demonstration: a payments service that makes mistakes, two workers, and an audit.

Kills one of the workers. Uses real processes, connections, commits and SIGKILL. A private
PostgreSQL runs in a temporary directory. The demonstration removes this directory at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

from outbox_worker.daemon.signals import Signals
from outbox_worker.database.engine import Database
from outbox_worker.demo.simulation import PaymentsService
from outbox_worker.demo.view import Scene, View, open_view
from outbox_worker.durations import count_of
from outbox_worker.embedded import server as embedded
from outbox_worker.embedded.launcher import end_with
from outbox_worker.errors import NotProved
from outbox_worker.model import Outcome
from outbox_worker.reconcile.audit import Audit, AuditReport
from outbox_worker.schema.migrate import upgrade
from outbox_worker.schema.tables import PAIR_INDEX, build_tables
from outbox_worker.settings import Settings, load_settings
from outbox_worker.store.payment_classes import PaymentClass

WORKERS = 2
SECONDS = 8.0
"""How many seconds the payments service writes payments. It needs longer on a slow database."""
DAMAGE_SHARE = 0.05
"""The number of payments that the simulated old worker lost, divided by the number of orders."""
SETTLE_SECONDS = 60.0
"""How many seconds the workers have to settle the last events after the payments service has ended."""

_WORKER_SETTINGS = {
    "OUTBOX_RETRY_BASE_SECONDS": "0.5",
    "OUTBOX_LOG_LEVEL": "WARNING",
    "OUTBOX_LOG_FORMAT": "json",
    "OUTBOX_HTTP_LISTEN": "off",
}

_OUTCOMES = """
    SELECT outcome, count(*) FROM processed_events AS mark
    WHERE NOT EXISTS (SELECT FROM outbox WHERE outbox.event_id = mark.event_id) GROUP BY outcome
"""
_OPEN_LETTERS = "SELECT reason, count(*) FROM dead_letters WHERE state = 'open' GROUP BY reason ORDER BY reason"
_OWED = "SELECT count(*) FROM outbox"
DOUBLED = """
    SELECT (SELECT count(*) FROM purchases WHERE is_active)
         - (SELECT count(*) FROM (SELECT DISTINCT student_id, course_id FROM purchases WHERE is_active) AS pairs)
"""
UNPAID = """
    SELECT count(*) FROM purchases AS p
    WHERE is_active AND NOT EXISTS (
        SELECT FROM payments AS y
        WHERE y.status = 'succeeded'
          AND (y.id, y.student_id, y.course_id, y.amount, y.currency)
            = (p.payment_id, p.student_id, p.course_id, p.amount, p.currency)
    )
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of the demonstration."""

    audit: AuditReport
    doubled: int
    """How many active purchases exceed the limit of one per student and course."""
    unpaid: int
    """How many active purchases have no succeeded payment of the same student, course and amount."""
    lost: int
    """How many events have neither a mark nor a dead letter, or are still in the outbox."""
    outcomes: Mapping[str, int]
    """The number of events for each outcome. Each dead letter counts under its reason."""

    @property
    def holds(self) -> bool:
        return self.audit.ok and not (self.doubled or self.unpaid or self.lost)

    def sentence(self) -> str:
        """Return a sentence that states what was proved, or what could not be proved."""
        if not self.holds:
            unexplained = len(self.audit.unexplained)
            return (
                f"NOT proved: {count_of(unexplained, 'payment')} unexplained, {count_of(self.doubled, 'purchase')} "
                f"too many, {count_of(self.unpaid, 'purchase')} without payment, {count_of(self.lost, 'event')} lost."
            )
        counts = self.audit.counts
        return (
            f"Proved: of {count_of(sum(counts.values()), 'payment')}, {counts[PaymentClass.ACTIVE]:,} gave their "
            f"course exactly once, {counts[PaymentClass.DUPLICATE]:,} paid for a course a second time, and "
            f"{counts[PaymentClass.DEAD]:,} contradict their event (a person decides). No payment was taken for "
            f"nothing. None of {count_of(self.outcomes.get(Outcome.REVOKED, 0), 'refunded payment')} holds a course."
        )


def run_demo(payments: int) -> Proof | None:
    """Run the demonstration with about ``payments`` payments. Return None if it was interrupted.

    Raises NotProved if a worker ends, if the outbox is not settled in time, or if the database refuses a
    statement.
    """
    try:
        with (
            Signals(signal.SIGHUP) as signals,
            tempfile.TemporaryDirectory(prefix="outbox-demo-") as name,
            _private_database(Path(name)) as settings,
            Crew(settings, Path(name)) as crew,
            open_view() as view,
        ):
            return Demo(settings, payments, crew, view).play(signals)
    except psycopg.Error as error:
        raise NotProved(f"NOT proved: {str(error).splitlines()[0]}") from error


@contextmanager
def _private_database(directory: Path) -> Iterator[Settings]:
    """Start a private PostgreSQL in ``directory`` and create the tables.

    First delete the variables OUTBOX_* and PG* from the environment. They could change the
    demonstration.
    """
    for variable in [name for name in os.environ if name.upper().startswith(("OUTBOX_", "PG"))]:
        del os.environ[variable]
    where = embedded.ensure_server(directory)
    settings = load_settings(database_url=f"postgresql://postgres@/postgres?host={where['host']}&port={where['port']}")
    database = Database(settings, deadline_seconds=None)
    try:
        upgrade(database, settings, build_tables(settings), ["unique_index"])
        yield settings
    finally:
        database.close()
        embedded.stop_server(directory)


class Crew:
    """The worker processes of the demonstration. They all stop at the end of the ``with`` block."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._url = settings.conninfo
        self._log = directory / "workers.log"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def hire(self) -> int:
        """Start a worker and return its process id."""
        environment = {**os.environ, **_WORKER_SETTINGS, "OUTBOX_DATABASE_URL": self._url}
        command = [sys.executable, "-m", "outbox_worker", "run"]
        with self._log.open("ab") as log:
            started = subprocess.Popen(  # noqa: S603 - starts this program
                command,
                env=environment,
                stderr=log,
                preexec_fn=partial(end_with, os.getpid()),  # noqa: PLW1509 - one system call, prepared before the fork
            )
        self._processes.append(started)
        return self._processes[-1].pid

    def kill_one(self) -> int:
        """Send SIGKILL to the worker that was started first. Return this worker's process id."""
        victim = self._processes.pop(0)
        victim.kill()
        victim.wait()
        return victim.pid

    def check(self) -> None:
        """Raise NotProved with the last line of the log if a worker failed."""
        for process in self._processes:
            if process.poll() not in (None, 0):
                last_words = self._log.read_text().splitlines()[-1:] or ["nothing"]
                raise NotProved(f"Worker {process.pid} ended with {process.returncode}: {last_words[0]}")

    def stop(self) -> None:
        """Send SIGTERM to all workers and wait until they have ended."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
        self._processes.clear()


@dataclass(frozen=True, slots=True)
class Cue:
    """An action of the demonstration, such as the kill of a worker.

    ``progress`` (from 0 to 1) is the share of orders that must be made before the action.
    """

    progress: float
    act: Callable[[], str]


class Demo:
    """One run of the demonstration."""

    def __init__(self, settings: Settings, payments: int, crew: Crew, view: View) -> None:
        self._settings = settings
        self._crew = crew
        self._view = view
        self._begin = time.monotonic()
        self._connection = psycopg.connect(settings.conninfo, autocommit=True)
        self._service = PaymentsService(settings.conninfo, payments, SECONDS)
        self._damage = max(1, round(payments * DAMAGE_SHARE))
        self._seen: deque[tuple[float, int]] = deque(maxlen=8)
        self._cues = deque(
            [
                Cue(0.35, self._kill_a_worker),
                Cue(0.45, self._replace_it),
                Cue(0.55, self._drop_the_index),
                Cue(0.80, self._rebuild_the_index),
            ]
        )

    def play(self, signals: Signals) -> Proof | None:
        """Run until every event is settled and return the proof. Return None after a signal."""
        self._service.leave_damage(self._damage)
        self._say(f"the old worker marked {count_of(self._damage, 'event')} as processed but made no purchase")
        self._say(f"{WORKERS} workers start: " + ", ".join(f"process {self._crew.hire()}" for _ in range(WORKERS)))
        self._service.start()
        self._say("the payments service starts to write payments")
        try:
            if self._watch(signals):
                return self._proof()
            self._say("interrupted; all processes stop")
            return None
        finally:
            self._service.stop()
            self._connection.close()

    def _watch(self, signals: Signals) -> bool:
        """Show the state until every event is settled, then return True. Return False after a signal."""
        ended: float | None = None
        while not signals.wait(0.25):
            self._crew.check()
            while self._cues and self._service.progress >= self._cues[0].progress:
                self._say(self._cues.popleft().act())
            scene = self._look()
            self._view.show(scene)
            if self._service.is_done():
                ended = ended or time.monotonic()
                if scene.owed == 0 and not self._cues:
                    self._say("the outbox is empty; the workers stop")
                    self._crew.stop()
                    return True
                if time.monotonic() - ended > SETTLE_SECONDS:
                    raise NotProved(f"{count_of(scene.owed, 'event')} not settled within {SETTLE_SECONDS:.0f} s.")
        return False

    def _look(self) -> Scene:
        outcomes = self._tally(_OUTCOMES)
        outcomes[Outcome.DEAD] = self._tally(_OPEN_LETTERS).total()
        now = time.monotonic() - self._begin
        self._seen.append((now, outcomes.total()))
        (before, had), (after, have) = self._seen[0], self._seen[-1]
        rate = (have - had) / (after - before) if after > before else 0.0
        return Scene(now, self._service.progress, self._count(_OWED), outcomes, rate)

    def _proof(self) -> Proof:
        database = Database(self._settings, deadline_seconds=None)
        try:
            report = Audit.start(database, build_tables(self._settings)).run()
            outcomes = self._tally(_OUTCOMES) + self._tally(_OPEN_LETTERS)
            lost = self._service.events - outcomes.total()
            return Proof(report, self._count(DOUBLED), self._count(UNPAID), lost, outcomes)
        finally:
            database.close()

    def _tally(self, query: str) -> Counter[str]:
        return Counter(dict(self._connection.execute(query).fetchall()))

    def _count(self, query: str) -> int:
        row = self._connection.execute(query).fetchone()
        return row[0] if row else 0

    def _say(self, sentence: str) -> None:
        self._view.say(time.monotonic() - self._begin, sentence)

    def _kill_a_worker(self) -> str:
        return f"kill -9 {self._crew.kill_one()}: one worker is killed while it works"

    def _replace_it(self) -> str:
        return f"process {self._crew.hire()} replaces the killed worker; nobody repairs anything by hand"

    def _drop_the_index(self) -> str:
        self._connection.execute(f"DROP INDEX {PAIR_INDEX}")
        return "somebody drops the unique index: the workers fall back to the lock"

    def _rebuild_the_index(self) -> str:
        self._connection.execute(
            f"CREATE UNIQUE INDEX CONCURRENTLY {PAIR_INDEX} ON purchases (student_id, course_id) WHERE is_active"
        )
        return "the unique index is back: the workers use it again"
