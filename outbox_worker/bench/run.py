"""Runs the benchmark: the real worker and bare SQL do the same task, one after the other.

Events per second depend on the machine. Compare ratios instead. The benchmark uses only its own
database on the server.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

import psycopg
from psycopg import sql

from outbox_worker.bench.baselines import FILL, FILL_MIXED, drain_bare, drain_one_by_one
from outbox_worker.bench.measurements import (
    commits,
    latencies,
    server_cpu,
    start_ups,
    url_of,
    waits_per_batch,
    wal_bytes,
    worker_command,
    worker_environment,
)
from outbox_worker.database.engine import Database, unavailable
from outbox_worker.embedded import server as embedded
from outbox_worker.errors import NotProved, Refused
from outbox_worker.schema.migrate import VERSION_TABLE, upgrade
from outbox_worker.schema.tables import OWNED, build_tables
from outbox_worker.settings import Settings, load_settings

DATABASE = "outbox_worker_bench"
"""The benchmark's database on the server of OUTBOX_DATABASE_URL. The benchmark drops it at the end."""
ONE_BY_ONE_SHARE = 0.04
"""The share of the events that the contestant ``one by one`` settles.

The share is small because this contestant is much slower than the others.
"""
MIXED = "worker, mixed load"
"""The worker as a contestant that settles all kinds of events (``FILL_MIXED``).

The contestant ``worker`` settles only first confirmations.
"""
_CHUNK = 10_000
_TABLES = ("payments", "outbox", "purchases", "processed_events", "dead_letters")

# what: tables that the benchmark did not create · lock: none · index: the catalogue's indexes
_STRANGERS = """
    SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND n.nspname NOT LIKE 'pg_toast%%' AND c.relname <> %s AND obj_description(c.oid, 'pg_class') IS DISTINCT FROM %s
"""


# what: due events that are left, and payments that are owed a purchase · lock: none · index: none, reads all payments
_UNSETTLED = """
    SELECT (SELECT count(*) FROM outbox WHERE attempts = 0)
           + (SELECT count(*) FROM payments p WHERE p.status = 'succeeded' AND NOT EXISTS
              (SELECT FROM purchases b WHERE (b.student_id, b.course_id) = (p.student_id, p.course_id) AND b.is_active))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The options of a benchmark."""

    events: int = 50_000
    rounds: int = 3
    concurrency: int = 1
    guard: str = "index"
    latency: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun:
    """The measurements of one round, in which one contestant settles a full outbox."""

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
    """The runs of each contestant in order, and latencies in milliseconds.

    Latencies are measured with polling and with NOTIFY.
    """

    plan: Plan
    runs: Mapping[str, Sequence[BenchRun]]
    waits_per_batch: float = 0.0
    """How often one claim loop waits for the server during a full batch, including COMMIT."""
    start_ups: Sequence[float] = ()
    """How long a worker takes to start, divided by the time to import SQLAlchemy and psycopg."""
    latencies: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def median(self, contestant: str, of: Callable[[BenchRun], float | None]) -> float | None:
        values = [value for value in map(of, self.runs[contestant]) if value is not None]
        return statistics.median(values) if values else None

    def ratio(self, contestant: str, to: str = "bare SQL") -> float:
        """Divide the contestant's rate by the rate of ``to`` per round. Return the median ratio."""
        pairs = zip(self.runs[contestant], self.runs[to], strict=True)
        return statistics.median(mine.rate / other.rate for mine, other in pairs)

    @property
    def mixed_ratio(self) -> float:
        """The worker's rate with the mixed load, divided by its rate with first confirmations only."""
        return self.ratio(MIXED, to="worker")


def run_bench(settings: Settings, plan: Plan, say: Callable[[str], None]) -> BenchReport:
    """Run the benchmark and call ``say`` after each step.

    Raises Refused if the benchmark's database has tables that the benchmark did not create. Raises DatabaseUnavailable
    if the benchmark cannot connect, and NotProved if the database refuses a statement.
    """
    try:
        return _run(settings, plan, say)
    except psycopg.Error as error:
        if error.sqlstate is None and isinstance(error, psycopg.OperationalError):
            raise unavailable(error) from None
        raise NotProved(f"The database refused: {str(error).splitlines()[0]}.") from None


def _run(settings: Settings, plan: Plan, say: Callable[[str], None]) -> BenchReport:
    with own_database(settings, plan) as conninfo, psycopg.connect(conninfo, autocommit=True) as connection:
        runs: dict[str, list[BenchRun]] = {"worker": [], "bare SQL": [], MIXED: [], "one by one": []}
        for turn in range(plan.rounds):
            for name in list(runs) if turn % 2 else reversed(list(runs)):
                run = _measure(connection, conninfo, plan, name)
                runs[name].append(run)
                say(f"round {turn + 1} of {plan.rounds}: {name} {run.rate:,.0f} events/s")
        batches = 10 * load_settings(database_url=url_of(conninfo)).batch_size
        fill(connection, batches)
        return BenchReport(
            plan=plan,
            runs=runs,
            waits_per_batch=waits_per_batch(conninfo, batches),
            start_ups=start_ups(conninfo, plan.rounds),
            latencies=_measure_latencies(connection, conninfo, say) if plan.latency else {},
        )


@contextmanager
def own_database(settings: Settings, plan: Plan) -> Iterator[str]:
    """Create the benchmark's database with its tables, and drop it at the end. Yields the connection string.

    Raises Refused if the database has tables that the benchmark did not create.
    """
    server = _conninfo(settings)
    with psycopg.connect(server, autocommit=True) as connection:
        own = psycopg.conninfo.make_conninfo(server, dbname=DATABASE)
        if connection.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,)).rowcount:
            _expect_no_strangers(own)
            _drop(connection)
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        try:
            migrate(own, *(["unique_index"] if plan.guard == "index" else []))
            yield own
        finally:
            _drop(connection)


def migrate(conninfo: str, *options: str) -> None:
    """Create the tables in the benchmark's database, with these optional migrations."""
    settings = load_settings(database_url=url_of(conninfo))
    database = Database(settings, deadline_seconds=None)
    upgrade(database, settings, build_tables(settings), options)
    database.close()


def _drop(connection: psycopg.Connection) -> None:
    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(DATABASE)))


def _expect_no_strangers(conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        found = [name for (name,) in connection.execute(_STRANGERS, (VERSION_TABLE, OWNED))]
    if found:
        raise Refused(
            f"The database {DATABASE} has tables that the benchmark did not create: {', '.join(found)}. "
            "Rename or drop this database. Nothing was changed."
        )


def _conninfo(settings: Settings) -> str:
    directory = settings.embedded_directory
    if directory is not None:
        return psycopg.conninfo.make_conninfo(**embedded.ensure_server(directory, bin_dir=settings.embedded_bin_dir))
    return settings.conninfo


def _measure(connection: psycopg.Connection, conninfo: str, plan: Plan, name: str) -> BenchRun:
    """Fill the outbox and measure how one contestant settles it.

    Leave out the CPU time of the worker's start.
    """
    is_worker = name in ("worker", MIXED)
    idle = _drain_by_worker(conninfo, plan)[1] if is_worker else 0.0
    events = max(1, round(plan.events * ONE_BY_ONE_SHARE)) if name == "one by one" else plan.events
    fill(connection, events, FILL_MIXED if name == MIXED else FILL)
    server, wal, client = server_cpu(connection), wal_bytes(connection), None
    match name:
        case "worker" | "worker, mixed load":
            seconds, used = _drain_by_worker(conninfo, plan)
            client = max(0.0, used - idle)
        case "bare SQL":
            seconds = drain_bare(conninfo, plan.concurrency)
        case _:
            seconds = drain_one_by_one(conninfo)
    after = server_cpu(connection)
    if connection.execute(_UNSETTLED).fetchone() != (0,):
        raise NotProved(f"{name}: not every event is settled, so the figures would be wrong.")
    return BenchRun(
        events=events,
        seconds=seconds,
        server_cpu_seconds=None if server is None or after is None else after - server,
        wal_bytes=wal_bytes(connection) - wal,
        client_cpu_seconds=client,
    )


def fill(connection: psycopg.Connection, events: int, statement: str = FILL) -> None:
    connection.execute(f"TRUNCATE {', '.join(_TABLES)}")
    for begin in range(0, events, _CHUNK):
        connection.execute(statement, (min(_CHUNK, events - begin),))
    connection.execute("VACUUM ANALYZE")
    connection.execute("CHECKPOINT")


def _drain_by_worker(conninfo: str, plan: Plan) -> tuple[float, float]:
    """Run the worker. Return the seconds from the first to the last log record, and CPU seconds."""
    command = worker_command("--drain", "--concurrency", str(plan.concurrency))
    process = subprocess.Popen(command, env=worker_environment(conninfo), stderr=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stderr is not None  # noqa: S101 - not None, because stderr=PIPE
    lines = process.stderr.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise NotProved(f"The worker ended with {process.returncode}: {lines[-1] if lines else 'silently'}")
    times = {record["event"]: datetime.fromisoformat(record["time"]) for record in map(json.loads, lines)}
    return (times["worker_stopped"] - times["worker_started"]).total_seconds(), usage.ru_utime + usage.ru_stime


def _measure_latencies(
    connection: psycopg.Connection, conninfo: str, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the milliseconds from a producer's COMMIT to the purchase, and of a single COMMIT."""
    fill(connection, 1)
    found = {"one commit": commits(connection)}
    for name, option in (("by polling", None), ("by notify", "notify")):
        if option:
            migrate(conninfo, option)
        found[name] = latencies(conninfo)
        say(f"latency {name}: median {statistics.median(found[name]):.1f} ms")
    return found
