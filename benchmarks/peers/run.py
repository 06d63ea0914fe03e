"""Measures the worker, bare SQL and three queues that do the same work for each event, in one run.

    npm install --prefix benchmarks/peers
    .venv/bin/pip install -r benchmarks/peers/requirements.txt
    OUTBOX_DATABASE_URL=… .venv/bin/python benchmarks/peers/run.py

Uses only the benchmark's own database. Prints the rates of all rounds, and writes the chart
docs/images/peers.svg.

Each queue runs in its best form that loses no event. The first comment of each script describes
this form. The measured time ends when the queue's last job is committed. It does not include the
start or the stop of the process. pg-boss needs Node.js 22.12 or later.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg
from chart import draw

from outbox_worker.bench import run as bench
from outbox_worker.bench.baselines import drain_bare
from outbox_worker.settings import load_settings

HERE = Path(__file__).parent
EVENTS = 20_000
ROUNDS = 3
NODE = ["node"]
PEERS: Mapping[str, list[str]] = {
    "pg-boss": [*NODE, str(HERE / "pgboss.mjs")],
    "graphile-worker": [*NODE, str(HERE / "graphile.mjs")],
    "procrastinate": [sys.executable, str(HERE / "procrastinate_peer.py")],
}


def as_uri(conninfo: str) -> str:
    """Return the connection string as a URI. All drivers can read it, also for a Unix socket."""
    given = psycopg.conninfo.conninfo_to_dict(conninfo)
    where = {key: str(given[key]) for key in ("host", "port") if given.get(key)}
    user, password = quote(str(given["user"])), given.get("password")
    login = f"{user}:{quote(str(password))}" if password else user
    return f"postgresql://{login}@/{given['dbname']}?{urlencode(where)}"


def refill(connection: psycopg.Connection) -> None:
    """Fill the outbox, and copy its events to ``peer_events`` for the queues."""
    bench.fill(connection, EVENTS)
    connection.execute("DROP TABLE IF EXISTS peer_events")
    connection.execute(
        "CREATE TABLE peer_events AS"
        " SELECT payload || jsonb_build_object('event_id', event_id) AS event FROM outbox ORDER BY id"
    )


def run_peer(command: list[str], connection: psycopg.Connection, conninfo: str) -> float:
    """Fill the queue with jobs and let it run them. Return the seconds of the run."""
    connection.execute("TRUNCATE outbox")
    given = [*command, as_uri(conninfo)]
    subprocess.run([*given, "fill", str(EVENTS)], check=True)
    connection.execute("VACUUM ANALYZE")
    connection.execute("CHECKPOINT")
    printed = subprocess.run([*given, "drain", str(EVENTS)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(printed.splitlines()[-1])["seconds"])


def contestants(conninfo: str, connection: psycopg.Connection) -> dict[str, Callable[[], float]]:
    plan = bench.Plan(events=EVENTS)
    return {
        "bare statement": lambda: drain_bare(conninfo, 1),
        "outbox-worker": lambda: bench._drain_by_worker(conninfo, plan)[0],
        **{name: partial(run_peer, command, connection, conninfo) for name, command in PEERS.items()},
    }


def main() -> None:
    settings = load_settings()
    with (
        bench.own_database(settings, bench.Plan(events=EVENTS)) as conninfo,
        psycopg.connect(conninfo, autocommit=True) as connection,
    ):
        named = contestants(conninfo, connection)
        rates: dict[str, list[float]] = {name: [] for name in named}
        for turn in range(ROUNDS):
            for name in list(named) if turn % 2 else reversed(list(named)):
                refill(connection)
                rates[name].append(EVENTS / named[name]())
                bought = connection.execute("SELECT count(*) FROM purchases").fetchone()
                if bought != (EVENTS,):
                    raise SystemExit(f"{name} made {bought} purchases of {EVENTS}")
                print(f"round {turn + 1} of {ROUNDS}: {name} {rates[name][-1]:,.0f} events/s", flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, rate in medians.items():
        print(f"{name:16} {rate:10,.0f} events/s {rate / medians['bare statement']:6.2f}")
    draw(medians, HERE.parent.parent / "docs" / "images" / "peers.svg", events=EVENTS, rounds=ROUNDS)


if __name__ == "__main__":
    main()
