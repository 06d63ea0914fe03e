"""Measures the figures of docs/explanation/performance.md that take many minutes. Set OUTBOX_DATABASE_URL first.

    python benchmarks/long.py MEASUREMENT [MEASUREMENT ...]

Uses only the benchmark's own database. Measurements: loops, history, backlog, horizon, pages, idle.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from outbox_worker.bench import run as bench
from outbox_worker.bench.baselines import BARE
from outbox_worker.settings import load_settings

ROUNDS = 5
EVENTS = 50_000
SLICE_SECONDS = 6.0
HISTORY = 10_000_000
BACKLOG = 5_000_000
HORIZON_SECONDS = 180
IDLE_WORKERS = 40
IDLE_SECONDS = 60.0

_HISTORY = """
    WITH bought AS (
        INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)
        SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 49.90, 'EUR' FROM generate_series(1, %s)
        RETURNING payment_id
    )
    INSERT INTO processed_events (event_id, event_type, outcome, payment_id)
    SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', 'created', payment_id FROM bought
"""


class Worker:
    """Runs the real command in its own process and reads its log records."""

    def __init__(self, conninfo: str, *arguments: str) -> None:
        command = bench.worker_command(*arguments)
        self.process = subprocess.Popen(
            command, env=bench.worker_environment(conninfo), stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.records = [json.loads(next(line for line in self.process.stderr if "worker_started" in line))]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.records += map(json.loads, self.process.stderr)

    @property
    def resident_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024

    def stop(self) -> None:
        self.process.terminate()
        self.wait()

    def wait(self) -> None:
        self._reader.join()
        self.process.wait()

    def settled(self) -> tuple[int, float]:
        """Return the number of purchases, and the seconds from first to last log record."""
        last = self.records[-1]
        begin, end = (datetime.fromisoformat(record["time"]) for record in (self.records[0], last))
        return last.get("created", 0), (end - begin).total_seconds()


def fill(connection: psycopg.Connection[Any], events: int, statement: str = bench.FILL) -> None:
    for begin in range(0, events, 100_000):
        connection.execute(statement, (min(100_000, events - begin),))


def rate_of_worker(conninfo: str) -> float:
    """Run one worker alone for ``SLICE_SECONDS``. Return the events per second."""
    worker = Worker(conninfo)
    time.sleep(SLICE_SECONDS)
    worker.stop()
    made, seconds = worker.settled()
    return made / seconds


def rate_of_bare(conninfo: str) -> float:
    made, begin = 0, time.monotonic()
    with psycopg.connect(conninfo, autocommit=True) as connection:
        while time.monotonic() < begin + SLICE_SECONDS:
            made += connection.execute(BARE).rowcount
        return made / (time.monotonic() - begin)


def ratio(conninfo: str, rounds: int = ROUNDS) -> float:
    """Run the worker and the bare statement in turn on the same tables. Return their rates' ratio.

    The outbox must contain more events than both can settle.
    """
    found = []
    for turn in range(rounds):
        rates = {}
        for each in (rate_of_worker, rate_of_bare) if turn % 2 else (rate_of_bare, rate_of_worker):
            rates[each] = each(conninfo)
        found.append(rates[rate_of_worker] / rates[rate_of_bare])
    print("   ratios", " ".join(f"{each:.2f}" for each in found), flush=True)
    return statistics.median(found)


@contextmanager
def database(guard: str = "index") -> Iterator[tuple[psycopg.Connection[Any], str]]:
    settings = load_settings(database_url=os.environ["OUTBOX_DATABASE_URL"])
    with (
        bench.own_database(settings, bench.Plan(guard=guard)) as conninfo,
        psycopg.connect(conninfo, autocommit=True) as connection,
    ):
        yield connection, conninfo


def loops() -> None:
    """Measure the rates of 1, 2, 4 and 8 claim loops in one process, and of 2, 4 and 8 processes with one loop each."""
    ways = [(loops, 1) for loops in (1, 2, 4, 8)] + [(1, processes) for processes in (2, 4, 8)]
    rates: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    with database() as (connection, conninfo):
        for _ in range(ROUNDS):
            for way in ways:
                bench.fill(connection, EVENTS * 2)
                crew = [Worker(conninfo, "--drain", "--concurrency", str(way[0])) for _ in range(way[1])]
                for worker in crew:
                    worker.wait()
                made, seconds = zip(*(worker.settled() for worker in crew), strict=True)
                rates[way].append(sum(made) / max(seconds))
        deadlocks = connection.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        print(f"   deadlocks {deadlocks.fetchall()[0][0]}")
    one = statistics.median(rates[1, 1])
    for (each, processes), found in rates.items():
        median = statistics.median(found)
        print(f"   {each} loop(s) in {processes} process(es): {median:,.0f} events/s, {median / one:.2f} of one loop")


def history() -> None:
    """Compare the ratio to bare SQL on fresh tables and with ten million marks and purchases."""
    with database() as (connection, conninfo):
        fill(connection, 3_000_000)
        connection.execute("VACUUM ANALYZE")
        fresh = ratio(conninfo)
        fill(connection, HISTORY, _HISTORY)
        fill(connection, 1_500_000)
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
        later = ratio(conninfo)
        print(f"   fresh {fresh:.2f}, with {HISTORY:,} marks and purchases {later:.2f}: {later / fresh:.2f} of it")


def backlog() -> None:
    """Measure the ratio to bare SQL, then a worker's memory, with five million due events."""
    with database() as (connection, conninfo):
        fill(connection, 1_500_000)
        connection.execute("VACUUM ANALYZE")
        fresh = ratio(conninfo, 3)
        fill(connection, BACKLOG)
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")
        later = ratio(conninfo, 3)
        print(f"   fresh {fresh:.2f}, with {BACKLOG:,} due {later:.2f}: {later / fresh:.2f} of it", flush=True)
        fill(connection, BACKLOG - connection.execute("SELECT count(*) FROM outbox").fetchall()[0][0])
        worker, sizes = Worker(conninfo, "--drain"), []
        while worker.process.poll() is None:
            sizes.append(worker.resident_megabytes)
            time.sleep(2)
        worker.wait()
        made, seconds = worker.settled()
        early = sizes[min(5, len(sizes) - 1)]
        print(
            f"   {made:,} events in {seconds:.0f} s; resident {early:.1f} MB after 10 s, {sizes[-1]:.1f} MB at the end"
        )


def horizon() -> None:
    """Measure the time per 1,000 events while an open transaction holds back the vacuum horizon."""
    for name, before, produced in (("behind a backlog", 5_000_000, 1000), ("keeping up", 0, 4000)):
        with database() as (connection, conninfo), psycopg.connect(conninfo) as holder:
            fill(connection, before)
            connection.execute("VACUUM ANALYZE")
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT count(*) FROM payments WHERE false")
            worker = Worker(conninfo)
            samples = [sample(connection)]
            while samples[-1][0] - samples[0][0] < HORIZON_SECONDS:
                produce(connection, produced, seconds=20)
                samples.append(sample(connection))
            worker.stop()
            for stretch, (first, last) in {"first": samples[:2], "last": samples[-2:]}.items():
                seconds, cpu, settled = (end - begin for begin, end in zip(first, last, strict=True))
                print(
                    f"   {name}, the {stretch} 20 s: {settled / seconds:,.0f} events/s,"
                    f" {seconds / settled * 1e6:.1f} ms and {cpu / settled * 1e6:.1f} ms of server CPU per 1,000",
                    flush=True,
                )


def sample(connection: psycopg.Connection[Any]) -> tuple[float, float, int]:
    """Return the time now, the server's CPU seconds, and the number of settled events."""
    connection.execute("SELECT pg_stat_clear_snapshot()")
    marks = connection.execute("SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'processed_events'")
    return time.monotonic(), bench.server_cpu(connection) or 0.0, marks.fetchall()[0][0]


def produce(connection: psycopg.Connection[Any], per_second: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        fill(connection, per_second // 10)
        time.sleep(max(0.0, 0.1 - (time.monotonic() - begin)))


def pages() -> None:
    """Measure WAL per event with random keys, right after a checkpoint and later."""
    with database() as (connection, conninfo):
        fill(connection, HISTORY // 5, _HISTORY)
        for turn in range(4):
            fill(connection, EVENTS)
            if turn in (0, 3):  # after a checkpoint, PostgreSQL logs whole pages
                connection.execute("CHECKPOINT")
            before = bench.wal_bytes(connection)
            worker = Worker(conninfo, "--drain")
            worker.wait()
            made, _ = worker.settled()
            each = (bench.wal_bytes(connection) - before) / made
            print(
                f"   round {turn + 1}{' after a checkpoint' if turn in (0, 3) else ''}: {each:,.0f} B of WAL per event"
            )


def idle() -> None:
    """Measure server CPU for forty workers, idle and with 50 events/s, without and with NOTIFY."""
    for option in (None, "notify"):
        with database() as (connection, conninfo):
            if option:
                bench.migrate(conninfo, option)
            crew = [Worker(conninfo) for _ in range(IDLE_WORKERS)]
            time.sleep(20)
            for name, load in (("idle", time.sleep), ("with 50 events/s", partial(produce, connection, 50))):
                before, begin = bench.server_cpu(connection), time.monotonic()
                load(IDLE_SECONDS)
                after, end = bench.server_cpu(connection), time.monotonic()
                assert before is not None
                assert after is not None
                share = (after - before) / (end - begin)
                print(f"   {IDLE_WORKERS} workers, {name}, {option or 'polling'}: {share:.1%} of one core", flush=True)
            for worker in crew:
                worker.stop()
            clean = sum(worker.settled()[0] for worker in crew)
            print(f"   {clean:,} events settled; by each worker: {sorted(each.settled()[0] for each in crew)[-8:]}")


SCENES = {scene.__name__: scene for scene in (loops, history, backlog, horizon, pages, idle)}

if __name__ == "__main__":
    for name in sys.argv[1:] or SCENES:
        print(f"{name}: {SCENES[name].__doc__}", flush=True)
        SCENES[name]()
