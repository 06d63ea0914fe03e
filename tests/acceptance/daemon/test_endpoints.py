"""/livez, /readyz and /metrics of the real command, and the command for containers without curl."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from outbox_worker.embedded import server as embedded
from tests.support.factories import Shop
from tests.support.processes import Given, environment, eventually, finish, start
from tests.support.sites import ROLE, Site
from tests.support.watchers import address_of, ask, eventually_answers

ANY: Given = {"http_listen": "127.0.0.1:0"}
NAMES = {
    "outbox_events_total",
    "outbox_dead_letters_total",
    "outbox_constraint_fallback_total",
    "outbox_transactions_total",
    "outbox_database_errors_total",
    "outbox_batch_duration_seconds",
    "outbox_settle_latency_seconds",
    "outbox_batch_size",
    "outbox_due_events",
    "outbox_oldest_due_seconds",
    "outbox_open_dead_letters",
    "outbox_ignored_events",
    "outbox_set_aside_events",
    "outbox_guard",
    "outbox_unexplained_payments",
    "outbox_value_at_risk",
    "outbox_since_poll_seconds",
    "outbox_vacuum_horizon_seconds",
    "outbox_build_info",
}
"""The metrics of the contract."""


def test_alive_and_ready(database_url: str) -> None:
    with start("run", url=database_url, **ANY) as process:
        process.wait_for("worker_started")
        address = address_of(process)
        assert eventually_answers(address, "/readyz", 200).body == "ready\n"
        assert ask(address, "/livez")[:2] == (200, "alive\n")
        assert ask(address, "/livez", "HEAD")[:2] == (200, "")
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert [ask(address, path, method).status for path in ("/livez", "/readyz", "/metrics")] == [405] * 3
        assert [ask(address, path).status for path in ("/", "/livez/", "/docs")] == [404] * 3
        process.end_well()


def test_only_its_own_names_are_answered(database_url: str) -> None:
    """A page in somebody's browser must not read what is meant for this machine."""
    foreign = "rebound.example:80"
    with start("run", url=database_url, **ANY) as process:
        address = address_of(process)
        for host in ("localhost", "127.0.0.1:9464", "[::1]:9464", "LOCALHOST:1"):
            assert ask(address, "/livez", Host=host).status == 200
        assert [ask(address, path, Host=foreign).status for path in ("/livez", "/readyz", "/metrics")] == [400] * 3
        process.end_well()
    with start("run", url=database_url, **ANY, http_hosts="worker.example, *.shop.example") as process:
        address = address_of(process)
        for host, status in (("worker.example", 200), ("a.shop.example:9464", 200), ("localhost", 200), (foreign, 400)):
            assert ask(address, "/livez", Host=host).status == status
        process.end_well()


def test_alive_but_not_ready_without_database(site: Site) -> None:
    with start("run", url=site.url(ROLE), **ANY, database_deadline_seconds=2) as process:
        address = address_of(process)
        eventually_answers(address, "/readyz", 200)
        embedded.stop_server(site.directory)
        assert eventually_answers(address, "/readyz", 503).body == "without database: no usable connection\n"
        assert ask(address, "/livez").status == 200
        site.start()
        eventually_answers(address, "/readyz", 200)
        process.end_well()


def test_the_database_is_missed_by_loops_that_rest_for_an_hour(site: Site) -> None:
    rests: Given = {"poll_min_seconds": 60, "poll_max_seconds": 3600}
    with start("run", url=site.url(ROLE), **ANY, **rests, database_deadline_seconds=2) as process:
        address = address_of(process)
        eventually_answers(address, "/readyz", 200)
        embedded.stop_server(site.directory)
        eventually_answers(address, "/readyz", 503, "without database")
        process.end_well()


def test_from_the_first_moment_while_the_database_is_awaited() -> None:
    with start("run", url="postgresql://nobody@127.0.0.1:1/nowhere", **ANY) as process:
        address = address_of(process)
        eventually_answers(address, "/readyz", 503, "starting: without database")
        assert ask(address, "/livez").status == 200
        process.end_well()


def test_not_ready_while_paused_and_says_why(database_url: str, shop: Shop) -> None:
    with start("run", url=database_url, **ANY) as process:
        address = address_of(process)
        eventually_answers(address, "/readyz", 200)
        shop.rows("ALTER TABLE outbox RENAME TO outbox_away")
        answer = eventually_answers(address, "/readyz", 503)
        assert answer.body == "paused: UndefinedTable, SQLSTATE 42P01\n"
        shop.rows("ALTER TABLE outbox_away RENAME TO outbox")
        eventually_answers(address, "/readyz", 200)
        process.end_well()


def test_alive_but_not_ready_while_stopping(database_url: str, shop: Shop, connect: Any) -> None:
    shop.paid()
    blocker: psycopg.Connection[Any] = connect()
    blocker.execute("LOCK TABLE processed_events")
    with start("run", url=database_url, **ANY) as process:
        address = address_of(process)
        process.wait_for("worker_started")
        eventually(shop.waiting, "a batch waits")
        process.signal()
        assert eventually_answers(address, "/readyz", 503, "stopping").body == "stopping\n"
        assert ask(address, "/livez").status == 200
        blocker.rollback()
        assert process.wait() == 0


# --- addresses


def test_an_address_in_use_hinders_nothing(database_url: str, shop: Shop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with start("run", url=database_url, http_listen=listen) as process:
            refused = process.wait_for("http_unavailable")
            assert (refused["level"], refused["address"]) == ("ERROR", listen)
            _, event = shop.paid()
            eventually(lambda: shop.outcome_of(event) == "created", "the event is settled")
            taken.close()
            assert address_of(process) == listen
            assert ask(listen, "/livez").status == 200
            assert len(process.told("http_unavailable")) == 1
            process.end_well()


def test_a_unix_socket(database_url: str, tmp_path: Path) -> None:
    """A new worker replaces the socket of a killed worker. A stopped worker removes its socket.

    Two workers do not share one socket.
    """
    path = tmp_path / "http.sock"
    listen: Given = {"http_listen": f"unix:{path}"}
    with start("run", url=database_url, **listen) as fallen:
        address_of(fallen)
        fallen.kill()
    assert path.is_socket()
    with start("run", url=database_url, **listen) as process:
        assert address_of(process) == f"unix:{path}"
        eventually_answers(f"unix:{path}", "/readyz", 200)
        assert finish("healthcheck", "--ready", **listen).stdout == "ready\n"
        with start("run", url=database_url, **listen) as second:
            second.wait_for("http_unavailable")
            second.end_well()
        assert ask(f"unix:{path}", "/livez").status == 200
        process.end_well()
    assert not path.exists()
    path.write_text("somebody's")
    with start("run", url=database_url, **listen) as process:
        process.wait_for("http_unavailable")
        process.end_well()
    assert path.read_text() == "somebody's"


def test_ip6(database_url: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with start("run", url=database_url, http_listen="[::1]:0") as process:
        address = address_of(process)
        assert ask(address, "/livez", Host=address).status == 200
        assert finish("healthcheck", http_listen=address).code == 0
        process.end_well()


def test_exit_codes_of_healthcheck(database_url: str) -> None:
    with start("run", url=database_url, **ANY) as process:
        listen = address_of(process)
        eventually_answers(listen, "/readyz", 200)
        every = "0.0.0.0:" + listen.rpartition(":")[2]
        assert [finish("healthcheck", http_listen=each).code for each in (listen, every)] == [0, 0]
        process.end_well()
    nobody = finish("healthcheck", http_listen=listen)
    assert nobody.code == 69
    assert nobody.sentences().startswith(f"outbox-worker: No answer from {listen}:")
    assert [finish("healthcheck", http_listen=each).code for each in ("off", "127.0.0.1:0", "nowhere")] == [78] * 3
    assert finish("healthcheck", "--nonsense").code == 2


def test_what_serves_no_http_does_not_load_it(database_url: str) -> None:
    """A drain and all commands that end by themselves serve no HTTP."""
    script = """
import os, sys
os.environ.update(OUTBOX_DATABASE_URL=sys.argv[1], OUTBOX_HTTP_LISTEN=sys.argv[2])
sys.argv[1:] = ["run", "--drain"]
from outbox_worker.cli.app import run_command
code = run_command()
print(code, sorted({"uvicorn", "starlette", "anyio"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, database_url, "127.0.0.1:0"]  # the forking server has loaded them
    done = subprocess.run(command, env=environment(None, {}), capture_output=True, text=True, check=False)
    assert done.stdout == "0 []\n", done.stderr
    assert "http_" not in done.stderr


# --- metrics


def test_metrics_are_the_contract_and_few(database_url: str, shop: Shop) -> None:
    """Ten thousand event types do not add metrics."""
    shop.pay_many(20)
    shop.rows(
        "INSERT INTO outbox (event_id, event_type, payload)"
        " SELECT gen_random_uuid(), 'TYPE_' || n, '{}' FROM generate_series(1, 10000) n"
    )
    with start("run", url=database_url, **ANY) as process:
        address = address_of(process)
        eventually(lambda: shop.count("outbox") == 0, "all are settled", 60)
        eventually_answers(address, "/metrics", 200, "outbox_open_dead_letters 10000.0")
        text = ask(address, "/metrics").body
        open_metrics = ask(address, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
        process.end_well()
    described = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert described == NAMES
    series = [line for line in text.splitlines() if not line.startswith("#")]
    assert 50 < len(series) <= 200
    assert 'outbox_events_total{event_type="other",outcome="dead"} 10000.0' in series
    assert not [line for line in series if "TYPE_" in line]
    assert open_metrics.body.endswith("# EOF\n")
    check_by_promtool(text)


def check_by_promtool(text: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_scrape_asks_nothing_of_the_database(site: Site) -> None:
    with start("run", url=site.url(ROLE), **ANY) as process:
        address = address_of(process)
        eventually_answers(address, "/metrics", 200, "outbox_due_events 0.0")
        embedded.stop_server(site.directory)
        process.wait_for("paused")
        began = time.monotonic()
        assert "outbox_due_events 0.0" in ask(address, "/metrics").body
        assert time.monotonic() - began < 10
        process.end_well()
