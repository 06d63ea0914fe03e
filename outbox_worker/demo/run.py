"""The demonstration: a payments service with all its troubles, two workers, one of them killed, and the audit.

Everything is real: processes, connections, commits, SIGKILL. It runs on a private PostgreSQL in a directory of its own,
which goes when the demonstration ends.
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
from outbox_worker.embedded import server as embedded
from outbox_worker.embedded.launcher import end_with
from outbox_worker.errors import OutboxWorkerError
from outbox_worker.model import Outcome
from outbox_worker.reconcile.audit import Audit, AuditReport
from outbox_worker.schema.migrate import upgrade
from outbox_worker.schema.tables import PAIR_INDEX, build_tables
from outbox_worker.settings import Settings, load_settings
from outbox_worker.store.payment_classes import PaymentClass

WORKERS = 2
SECONDS = 8.0
"""How long the payments service writes; more payments come faster, as fast as they can."""
DAMAGE_SHARE = 0.05
SETTLE_SECONDS = 60.0
"""How long the workers may take for what is left when the payments service has ended."""

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
    """What the demonstration ends with."""

    audit: AuditReport
    doubled: int
    """Purchases of a pair beyond its first."""
    unpaid: int
    """Purchases that are not those of a payment that succeeded."""
    lost: int
    """Events that left neither a mark nor a dead letter, or are still in the outbox."""
    outcomes: Mapping[str, int]
    """Events by outcome; the dead ones by reason."""

    @property
    def holds(self) -> bool:
        return self.audit.ok and not (self.doubled or self.unpaid or self.lost)

    def sentence(self) -> str:
        """What was proved, or what speaks against it."""
        if not self.holds:
            unexplained = len(self.audit.unexplained)
            return (
                f"NOT proved: {unexplained:,} payments unexplained, {self.doubled:,} purchases too many, "
                f"{self.unpaid:,} that nobody paid, {self.lost:,} events lost."
            )
        counts = self.audit.counts
        return (
            f"Proved: of {sum(counts.values()):,} payments {counts[PaymentClass.ACTIVE]:,} gave their course exactly "
            f"once, {counts[PaymentClass.DUPLICATE]:,} paid for one a second time and {counts[PaymentClass.DEAD]:,} "
            f"contradict their event (about these a person decides); none was taken for nothing. "
            f"None of {self.outcomes.get(Outcome.REVOKED, 0):,} refunded payments holds a course."
        )


def run_demo(payments: int) -> Proof | None:
    """Play the demonstration with about ``payments`` payments; None when it was interrupted.

    Raises OutboxWorkerError when a worker does not start, the outbox is not settled in time, or the database refuses.
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
        raise OutboxWorkerError(f"NOT proved: {str(error).splitlines()[0]}") from error


@contextmanager
def _private_database(directory: Path) -> Iterator[Settings]:
    """A migrated database in ``directory``. Whatever ``OUTBOX_*`` says, nothing else is touched."""
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
    """The worker processes. Context manager: whoever is left at the end is stopped."""

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
        """Start one more worker; return its pid."""
        environment = {**os.environ, **_WORKER_SETTINGS, "OUTBOX_DATABASE_URL": self._url}
        command = [sys.executable, "-m", "outbox_worker", "run"]
        with self._log.open("ab") as log:
            started = subprocess.Popen(  # noqa: S603 - ourselves
                command,
                env=environment,
                stderr=log,
                preexec_fn=partial(end_with, os.getpid()),  # noqa: PLW1509 - one system call, prepared before the fork
            )
        self._processes.append(started)
        return self._processes[-1].pid

    def kill_one(self) -> int:
        """SIGKILL the worker that has been here longest; return its pid."""
        victim = self._processes.pop(0)
        victim.kill()
        victim.wait()
        return victim.pid

    def check(self) -> None:
        """Raise where a worker ended by itself, with what it last_words last."""
        for process in self._processes:
            if process.poll() not in (None, 0):
                last_words = self._log.read_text().splitlines()[-1:] or ["nothing"]
                raise OutboxWorkerError(f"Worker {process.pid} ended with {process.returncode}: {last_words[0]}")

    def stop(self) -> None:
        """SIGTERM all and wait for them."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
        self._processes.clear()


@dataclass(frozen=True, slots=True)
class Cue:
    """What happens when so much has been paid."""

    progress: float
    act: Callable[[], str]


class Demo:
    """One performance."""

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
        """Run to the end, or until a signal comes."""
        self._service.leave_damage(self._damage)
        self._say(f"the old worker marked {self._damage} events as done and never wrote their purchase")
        self._say(f"{WORKERS} workers start: " + ", ".join(f"process {self._crew.hire()}" for _ in range(WORKERS)))
        self._service.start()
        self._say("the payments service starts to pay")
        try:
            if self._watch(signals):
                return self._proof()
            self._say("interrupted; stopping everything")
            return None
        finally:
            self._service.stop()
            self._connection.close()

    def _watch(self, signals: Signals) -> bool:
        """Follow what happens until all is settled; False when interrupted."""
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
                    self._say("nothing is left in the outbox; the workers stop")
                    self._crew.stop()
                    return True
                if time.monotonic() - ended > SETTLE_SECONDS:
                    raise OutboxWorkerError(f"{scene.owed} events were not settled within {SETTLE_SECONDS:.0f} s.")
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
        return f"kill -9 {self._crew.kill_one()}: one worker is gone in the middle of its work"

    def _replace_it(self) -> str:
        return f"process {self._crew.hire()} takes its place; nobody repaired anything"

    def _drop_the_index(self) -> str:
        self._connection.execute(f"DROP INDEX {PAIR_INDEX}")
        return "somebody drops the unique index: the workers fall back to the lock"

    def _rebuild_the_index(self) -> str:
        self._connection.execute(
            f"CREATE UNIQUE INDEX CONCURRENTLY {PAIR_INDEX} ON purchases (student_id, course_id) WHERE is_active"
        )
        return "the unique index is back: the workers use it again"
