"""The measurements of the benchmark: CPU, WAL, number of statements, start-up time, and latency of purchases."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import psycopg
from loguru import logger
from sqlalchemy import Engine
from sqlalchemy import event as listener

from outbox_worker.bench.baselines import FILL
from outbox_worker.daemon.signals import Signals
from outbox_worker.daemon.worker import Worker
from outbox_worker.database.direct import Direct
from outbox_worker.settings import Settings, load_settings

LATENCY_RATE = 50
LATENCY_SECONDS = 10.0

_THERE = "SELECT payment_id FROM purchases WHERE payment_id = ANY(%s)"
_ONE_ROW = """
    INSERT INTO payments (student_id, course_id, amount, currency, status)
    VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'EUR', 'pending')
"""


def url_of(conninfo: str) -> str:
    """Convert a connection string into the URL that the settings accept."""
    given = {key: str(value) for key, value in psycopg.conninfo.conninfo_to_dict(conninfo).items()}
    name = given.pop("dbname")
    return f"postgresql:///{name}?{urlencode(given)}"


def worker_command(*arguments: str) -> list[str]:
    """Return the command that starts a worker, as an operator runs it."""
    return [sys.executable, "-m", "outbox_worker", "run", "--log-format", "json", *arguments]


def worker_environment(conninfo: str) -> dict[str, str]:
    """Return the environment of a worker: this process's environment with new OUTBOX_* variables.

    OUTBOX_* sets only the database's URL, and turns HTTP off. Several workers run at the same time
    and would need the same port for HTTP.
    """
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("OUTBOX_")}
    return kept | {"OUTBOX_DATABASE_URL": url_of(conninfo), "OUTBOX_HTTP_LISTEN": "off"}


def wal_bytes(connection: psycopg.Connection) -> int:
    """Return how many bytes of WAL the server has written so far."""
    row = connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')").fetchone()
    return int(row[0]) if row else 0


def server_cpu(connection: psycopg.Connection) -> float | None:
    """Return the CPU seconds that all server processes have used so far, including ended processes.

    Return None if /proc does not show the server processes.
    """
    stats = {int(entry.name): _stat(entry) for entry in Path("/proc").glob("[0-9]*")}
    backend = stats.get(connection.info.backend_pid)
    if backend is None or backend.name != "postgres":
        return None
    postmaster, children = stats[backend.parent], [each for each in stats.values() if each.parent == backend.parent]
    ticks = postmaster.own + postmaster.waited_for + sum(each.own for each in children)
    return ticks / os.sysconf("SC_CLK_TCK")


class _Stat(NamedTuple):
    """The CPU time of a process in clock ticks, see proc_pid_stat(5)."""

    name: str = ""
    parent: int = 0
    own: int = 0
    waited_for: int = 0


def _stat(entry: Path) -> _Stat:
    try:
        head, _, tail = (entry / "stat").read_text().rpartition(")")
    except OSError:
        return _Stat()  # the process has ended
    numbers = tail.split()
    own, waited_for = (sum(map(int, numbers[at : at + 2])) for at in (11, 13))
    return _Stat(head.partition("(")[2], int(numbers[1]), own, waited_for)


def commits(connection: psycopg.Connection) -> list[float]:
    """Commit one row 200 times. Return the milliseconds that each commit took."""
    times = []
    for _ in range(200):
        begin = time.monotonic()
        connection.execute(_ONE_ROW)
        times.append((time.monotonic() - begin) * 1000)
    return times


def start_ups(conninfo: str, rounds: int) -> list[float]:
    """Return a worker's start-up times, divided by the time to import SQLAlchemy and psycopg."""
    found = []
    for _ in range(rounds):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", "import sqlalchemy.orm, psycopg"], check=True)
        middle = time.monotonic()
        with _serving(conninfo):
            found.append((time.monotonic() - middle) / (middle - begin))
    return found


def waits_per_batch(conninfo: str, events: int) -> float:
    """Return how often one claim loop waits for the server during a full batch, including COMMIT.

    ``events`` is the number of events in the outbox. A second run has an empty outbox and counts
    only the waits of start and stop. Subtract these waits from the waits of the first run.
    """
    settings = load_settings(database_url=url_of(conninfo))
    first, second = (_waits_of_a_drain(settings) for _ in range(2))
    return (first - second) / (events // settings.batch_size)


def _waits_of_a_drain(settings: Settings) -> int:
    waits: list[str] = []
    watched = {name: lambda *_: waits.append("SQLAlchemy") for name in ("begin", "commit", "before_cursor_execute")}
    for name, note in watched.items():
        listener.listen(Engine, name, note)
    logger.disable("outbox_worker")
    try:
        with _counting(Direct, "fetch", waits), _counting(Direct, "commit", waits), Signals() as signals:
            Worker(settings).drain(signals)
    finally:
        logger.enable("outbox_worker")
        for name, note in watched.items():
            listener.remove(Engine, name, note)
    return len(waits)


@contextmanager
def _counting(owner: type, name: str, calls: list[str]) -> Iterator[None]:
    """Append a method's name to ``calls`` at each call of this method inside the ``with`` block."""
    method = getattr(owner, name)

    def counted(*given: Any) -> Any:
        calls.append(name)
        return method(*given)

    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, method)


def latencies(conninfo: str) -> list[float]:
    """Return the milliseconds from each COMMIT of the producer until the purchase is visible."""
    with _serving(conninfo):
        return _Watch(conninfo).run()


@contextmanager
def _serving(conninfo: str) -> Iterator[None]:
    """Run a daemon in the background. The ``with`` block begins when the daemon is ready to claim."""
    process = subprocess.Popen(worker_command(), env=worker_environment(conninfo), stderr=subprocess.PIPE, text=True)  # noqa: S603
    try:
        assert process.stderr is not None  # noqa: S101 - not None, because stderr=PIPE
        next(line for line in process.stderr if "worker_started" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield
    finally:
        process.terminate()
        process.wait()


class _Watch:
    """Runs a producer of events, and a reader that waits for each purchase.

    A transaction of the producer stays open for up to 20 ms.
    """

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._waiting: dict[Any, float] = {}
        self._done = threading.Event()

    def run(self) -> list[float]:
        """Return the latencies in milliseconds.

        Leave out the latencies of the first second. The worker perhaps does not yet listen for
        notifications.
        """
        producer = threading.Thread(target=self._produce)
        producer.start()
        found, begin = [], time.monotonic()
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            while not self._done.is_set() or self._waiting:
                pending = list(self._waiting)
                rows = connection.execute(_THERE, (pending,)).fetchall()
                now = time.monotonic()
                waited = [(now - self._waiting.pop(payment)) * 1000 for (payment,) in rows]
                found += waited if now - begin > 1 else []
                time.sleep(0.0005)
        producer.join()
        return found

    def _produce(self) -> None:
        end = time.monotonic() + LATENCY_SECONDS
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            while time.monotonic() < end:
                begin = time.monotonic()
                with connection.transaction():
                    payment = self._pay(connection)
                    self._done.wait(random.uniform(0, 0.02))  # noqa: S311 - a random load; not a secret
                self._waiting[payment] = time.monotonic()
                self._done.wait(max(0.0, 1 / LATENCY_RATE - (time.monotonic() - begin)))
        self._done.set()

    def _pay(self, connection: psycopg.Connection) -> Any:
        row = connection.execute(FILL + " RETURNING CAST(payload ->> 'payment_id' AS uuid)", (1,)).fetchone()
        return row[0] if row else None
