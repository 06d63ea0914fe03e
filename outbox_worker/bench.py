"""The benchmark: the worker as it is run, beside the bare SQL that does the same work, in turn, on one server.

Absolute figures tell of the machine; the ratios tell of the worker. Everything happens in a database of its own.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import psycopg
from psycopg import sql

from outbox_worker import embedded
from outbox_worker.database import Database, unavailable
from outbox_worker.errors import OutboxWorkerError, Refused
from outbox_worker.migration import VERSION_TABLE, upgrade
from outbox_worker.rivals import FILL, drain_bare, drain_one_by_one
from outbox_worker.schema import OWNED, build_tables
from outbox_worker.settings import Settings, load_settings

DATABASE = "outbox_worker_bench"
"""Made for the benchmark on the server of OUTBOX_DATABASE_URL, and dropped after it."""
ONE_BY_ONE_SHARE = 0.04
"""Of the events, for the worker that takes them one by one: it needs as long for them."""
LATENCY_RATE = 50
LATENCY_SECONDS = 10.0
_CHUNK = 10_000
_TABLES = ("payments", "outbox", "purchases", "processed_events", "dead_letters")

# what: tables in which somebody else's rows may be · lock: none · index: the catalogue's own
_STRANGERS = """
    SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND n.nspname NOT LIKE 'pg_toast%%' AND c.relname <> %s AND obj_description(c.oid, 'pg_class') IS DISTINCT FROM %s
"""


_THERE = "SELECT payment_id FROM purchases WHERE payment_id = ANY(%s)"
_ONE_ROW = """
    INSERT INTO payments (student_id, course_id, amount, currency, status)
    VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'EUR', 'pending')
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured."""

    events: int = 50_000
    rounds: int = 3
    concurrency: int = 1
    guard: str = "index"
    latency: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One contestant that drained a full outbox once."""

    events: int
    seconds: float
    server_cpu_seconds: float | None
    wal_bytes: int
    client_cpu_seconds: float | None = None

    @property
    def rate(self) -> float:
        return self.events / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """All runs, by contestant and in their order; latencies in milliseconds by what was in force."""

    plan: Plan
    runs: Mapping[str, Sequence[Run]]
    latencies: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def median(self, contestant: str, of: Callable[[Run], float | None]) -> float | None:
        values = [value for value in map(of, self.runs[contestant]) if value is not None]
        return statistics.median(values) if values else None

    def ratio(self, contestant: str) -> float:
        """To the bare statement of the same round; the median of the rounds."""
        pairs = zip(self.runs[contestant], self.runs["bare SQL"], strict=True)
        return statistics.median(mine.rate / limit.rate for mine, limit in pairs)


def run_bench(settings: Settings, plan: Plan, say: Callable[[str], None]) -> BenchReport:
    """Measure, telling ``say`` of each step.

    Raises Refused where the benchmark's database holds somebody's tables, DatabaseUnavailable without a connection, and
    OutboxWorkerError where the database refuses.
    """
    try:
        return _run(settings, plan, say)
    except psycopg.Error as error:
        if error.sqlstate is None and isinstance(error, psycopg.OperationalError):
            raise unavailable(error) from None
        raise OutboxWorkerError(f"The database refused: {str(error).splitlines()[0]}.") from None


def _run(settings: Settings, plan: Plan, say: Callable[[str], None]) -> BenchReport:
    with _own_database(settings, plan) as conninfo, psycopg.connect(conninfo, autocommit=True) as connection:
        runs: dict[str, list[Run]] = {"worker": [], "bare SQL": [], "one by one": []}
        for turn in range(plan.rounds):
            for name in list(runs) if turn % 2 else reversed(list(runs)):
                run = _measure(connection, conninfo, plan, name)
                runs[name].append(run)
                say(f"round {turn + 1} of {plan.rounds}: {name} {run.rate:,.0f} events/s")
        latencies = _measure_latencies(connection, conninfo, say) if plan.latency else {}
    return BenchReport(plan=plan, runs=runs, latencies=latencies)


@contextmanager
def _own_database(settings: Settings, plan: Plan) -> Iterator[str]:
    """A migrated database that nobody else has tables in; its connection string."""
    server = _conninfo(settings)
    with psycopg.connect(server, autocommit=True) as connection:
        own = psycopg.conninfo.make_conninfo(server, dbname=DATABASE)
        if connection.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,)).rowcount:
            _expect_no_strangers(own)
            _drop(connection)
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        try:
            mine = load_settings(database_url=_url(own))
            database = Database(mine, deadline_seconds=None)
            upgrade(database, mine, build_tables(mine), ["unique_index"] if plan.guard == "index" else [])
            database.close()
            yield own
        finally:
            _drop(connection)


def _drop(connection: psycopg.Connection) -> None:
    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(DATABASE)))


def _expect_no_strangers(conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        found = [name for (name,) in connection.execute(_STRANGERS, (VERSION_TABLE, OWNED))]
    if found:
        raise Refused(
            f"The database {DATABASE} holds tables that are not the benchmark's: {', '.join(found)}. "
            "Rename or drop it. Nothing was changed."
        )


def _conninfo(settings: Settings) -> str:
    directory = settings.embedded_directory
    if directory is not None:
        return psycopg.conninfo.make_conninfo(**embedded.ensure_server(directory, bin_dir=settings.embedded_bin_dir))
    return settings.conninfo


def _url(conninfo: str) -> str:
    """The same as a URL, as settings take it."""
    given = {key: str(value) for key, value in psycopg.conninfo.conninfo_to_dict(conninfo).items()}
    name = given.pop("dbname")
    return f"postgresql:///{name}?{urlencode(given)}"


def _measure(connection: psycopg.Connection, conninfo: str, plan: Plan, name: str) -> Run:
    """Fill the outbox and let one contestant drain it. A worker's CPU is counted without that of its start."""
    idle = _drain_by_worker(conninfo, plan)[1] if name == "worker" else 0.0
    events = max(1, round(plan.events * ONE_BY_ONE_SHARE)) if name == "one by one" else plan.events
    _fill(connection, events)
    server, wal, client = _server_cpu(connection), _wal(connection), None
    match name:
        case "worker":
            seconds, used = _drain_by_worker(conninfo, plan)
            client = max(0.0, used - idle)
        case "bare SQL":
            seconds = drain_bare(conninfo, plan.concurrency)
        case _:
            seconds = drain_one_by_one(conninfo)
    after = _server_cpu(connection)
    if connection.execute("SELECT count(*) FROM purchases").fetchone() != (events,):
        raise OutboxWorkerError(f"{name}: not every event became a purchase; the figures would be worth nothing.")
    return Run(
        events=events,
        seconds=seconds,
        server_cpu_seconds=None if server is None or after is None else after - server,
        wal_bytes=_wal(connection) - wal,
        client_cpu_seconds=client,
    )


def _fill(connection: psycopg.Connection, events: int) -> None:
    connection.execute(f"TRUNCATE {', '.join(_TABLES)}")
    for begin in range(0, events, _CHUNK):
        connection.execute(FILL, (min(_CHUNK, events - begin),))
    connection.execute("VACUUM ANALYZE")
    connection.execute("CHECKPOINT")


def _worker_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "outbox_worker", "run", "--log-format", "json", *arguments]


def _worker_environment(conninfo: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("OUTBOX_")}
    return kept | {"OUTBOX_DATABASE_URL": _url(conninfo)}


def _drain_by_worker(conninfo: str, plan: Plan) -> tuple[float, float]:
    """The real command, as an operator runs it: seconds between its first and last word, and its CPU seconds."""
    command = _worker_command("--drain", "--concurrency", str(plan.concurrency))
    process = subprocess.Popen(command, env=_worker_environment(conninfo), stderr=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stderr is not None  # noqa: S101 - asked for above
    lines = process.stderr.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise OutboxWorkerError(f"The worker ended with {process.returncode}: {lines[-1] if lines else 'silently'}")
    times = {record["event"]: datetime.fromisoformat(record["time"]) for record in map(json.loads, lines)}
    return (times["worker_stopped"] - times["worker_started"]).total_seconds(), usage.ru_utime + usage.ru_stime


def _wal(connection: psycopg.Connection) -> int:
    row = connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')").fetchone()
    return int(row[0]) if row else 0


def _server_cpu(connection: psycopg.Connection) -> float | None:
    """CPU seconds of all server processes so far, ended ones included; None where they cannot be seen from here."""
    stats = {int(entry.name): _stat(entry) for entry in Path("/proc").glob("[0-9]*")}
    backend = stats.get(connection.info.backend_pid)
    if backend is None or backend.name != "postgres":
        return None
    postmaster, children = stats[backend.parent], [each for each in stats.values() if each.parent == backend.parent]
    ticks = postmaster.own + postmaster.waited_for + sum(each.own for each in children)
    return ticks / os.sysconf("SC_CLK_TCK")


class _Stat(NamedTuple):
    """A process in clock ticks; see proc_pid_stat(5)."""

    name: str = ""
    parent: int = 0
    own: int = 0
    waited_for: int = 0


def _stat(entry: Path) -> _Stat:
    try:
        head, _, tail = (entry / "stat").read_text().rpartition(")")
    except OSError:
        return _Stat()  # it ended meanwhile
    numbers = tail.split()
    own, waited_for = (sum(map(int, numbers[at : at + 2])) for at in (11, 13))
    return _Stat(head.partition("(")[2], int(numbers[1]), own, waited_for)


def _measure_latencies(
    connection: psycopg.Connection, conninfo: str, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Milliseconds from a producer's COMMIT to the purchase; and what one durable commit takes."""
    _fill(connection, 1)
    found = {"one commit": _commits(connection)}
    mine = load_settings(database_url=_url(conninfo))
    for name, option in (("by polling", None), ("by notify", "notify")):
        if option:
            database = Database(mine, deadline_seconds=None)
            upgrade(database, mine, build_tables(mine), [option])
            database.close()
        found[name] = _latencies(conninfo)
        say(f"latency {name}: median {statistics.median(found[name]):.1f} ms")
    return found


def _commits(connection: psycopg.Connection) -> list[float]:
    times = []
    for _ in range(200):
        begin = time.monotonic()
        connection.execute(_ONE_ROW)
        times.append((time.monotonic() - begin) * 1000)
    return times


def _latencies(conninfo: str) -> list[float]:
    process = subprocess.Popen(_worker_command(), env=_worker_environment(conninfo), stderr=subprocess.PIPE, text=True)  # noqa: S603
    try:
        assert process.stderr is not None  # noqa: S101 - asked for above
        next(line for line in process.stderr if "worker_started" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        return _Watch(conninfo).run()
    finally:
        process.terminate()
        process.wait()


class _Watch:
    """A producer that holds its transactions open for up to 20 ms, and a reader that waits for the purchase."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._waiting: dict[Any, float] = {}
        self._done = threading.Event()

    def run(self) -> list[float]:
        """Latencies in milliseconds; the first second is not counted: LISTEN may not be there yet."""
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
                    self._done.wait(random.uniform(0, 0.02))  # noqa: S311 - a load, no secret
                self._waiting[payment] = time.monotonic()
                self._done.wait(max(0.0, 1 / LATENCY_RATE - (time.monotonic() - begin)))
        self._done.set()

    def _pay(self, connection: psycopg.Connection) -> Any:
        row = connection.execute(FILL + " RETURNING CAST(payload ->> 'payment_id' AS uuid)", (1,)).fetchone()
        return row[0] if row else None
