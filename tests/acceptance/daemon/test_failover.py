"""A primary is lost and a standby takes its place: the worker goes on there by itself."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.support.factories import Shop
from tests.support.processes import Given, Process, eventually, finish, start
from tests.support.sites import (
    ROLE,
    Site,
    await_replication,
    endure,
    expect_calm,
    expect_exactly_once,
    settle_some,
    standby_of,
    url_of,
)

DEADLINE = 2
PATIENT: Given = {"database_deadline_seconds": DEADLINE, "poll_max_seconds": 0.2}


@pytest.fixture
def standby(site: Site, tmp_path: Path) -> Iterator[Site]:
    """Make a streaming standby of ``site``."""
    with standby_of(site, tmp_path / "standby") as running:
        yield running


def make_synchronous(primary: Site) -> None:
    """Let the primary acknowledge a COMMIT only after the standby has it."""
    primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    primary.execute("SELECT pg_reload_conf()")
    await_replication(primary, "sync_state = 'sync'")


def promote(standby: Site) -> None:
    standby.execute("SELECT pg_promote()")


@contextmanager
def paying(site: Site) -> Iterator[Future[int]]:
    """Run a payments service until its server is gone.

    Return the number of acknowledged payments.
    """
    over = threading.Event()

    def pay(connection: psycopg.Connection) -> int:
        paid = 0
        while not over.is_set():
            try:
                Shop(connection).pay_many(10)
            except psycopg.OperationalError:
                return paid
            paid += 10
        raise AssertionError("the server never went away")

    with site.connect() as connection, ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(pay, connection)
        finally:
            over.set()


@pytest.mark.parametrize("is_synchronous", [True, False], ids=["synchronous", "asynchronous"])
def test_it_goes_on_at_the_promoted_standby(is_synchronous: bool, site: Site, standby: Site) -> None:
    """The worker is under load, and either host is named first.

    A transaction that was not replicated vanishes as a whole.
    """
    if is_synchronous:
        make_synchronous(site)
    url = url_of(ROLE, site, standby) if is_synchronous else url_of(ROLE, standby, site)
    with start("run", url=url, batch_size=50, **PATIENT) as worker:
        worker.wait_for("worker_started")
        settle_some(site)
        begin = time.monotonic()
        with paying(site) as payments, site.connect() as connection:
            eventually(lambda: Shop(connection).count("purchases") > 200, "it settles while payments come")
            site.signal(signal.SIGQUIT)
            acknowledged = payments.result(30)
        worker.wait_for("paused", failure="reconnect")
        endure(worker)
        promote(standby)
        settle_some(standby)
        seconds = time.monotonic() - begin
        worker.end_well()
    assert {told["failure"] for told in worker.told("paused")} == {"reconnect"}
    with standby.connect() as connection:
        shop = Shop(connection)
        assert not is_synchronous or shop.count("payments") >= 40 + acknowledged
        expect_exactly_once(shop)
        expect_calm(shop, seconds, worker)
    audited = finish("audit", "--json", url=url_of(ROLE, standby))
    assert (audited.code, audited.object["ok"]) == (0, True)


def test_it_waits_for_a_standby_to_be_promoted(site: Site, standby: Site) -> None:
    """The worker can reach only the standby.

    It says so, goes on trying without a busy loop, and starts after the promotion.
    """
    url = url_of(ROLE, standby)
    with site.connect() as connection:
        Shop(connection).pay_many(20)
    await_replication(site)
    with start("run", url=url, **PATIENT) as worker:
        begin = time.monotonic()
        endure(worker)
        expect_told_of_a_standby(worker)
        drained = finish("run", "--drain", url=url, **PATIENT)
        assert (drained.code, "standby" in drained.stderr) == (69, True)
        assert worker.told("worker_started") == []
        site.signal(signal.SIGQUIT)
        promote(standby)
        worker.wait_for("worker_started")
        settle_some(standby)
        seconds = time.monotonic() - begin
        worker.end_well()
    with standby.connect() as connection:
        expect_exactly_once(Shop(connection))
        assert Shop(connection).count("purchases") == 40
        expect_calm(Shop(connection), seconds, worker)


def expect_told_of_a_standby(worker: Process) -> None:
    for told in worker.told("paused"):
        assert told["failure"] == "reconnect"
        assert "standby" in told["error"]
