"""A server stops, crashes, ends all sessions or refuses.

The worker resumes and charges no event.
"""

from __future__ import annotations

import itertools
import re
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from tests.support.factories import Shop
from tests.support.faults import DEADLINE, FAULTS, NO_PLACE, PATIENT, crowded
from tests.support.processes import Process, eventually, finish, start
from tests.support.sites import ROLE, Site, endure, expect_calm, expect_exactly_once, expect_settled, settle_some

KEY = 4242
"""Key of the advisory lock at which an insert waits."""


# --- the worker survives these faults


@pytest.mark.parametrize("name", FAULTS)
def test_it_resumes_alone_and_charges_nobody(name: str, site: Site) -> None:
    fault, failure, words = FAULTS[name]
    with start("run", url=site.url(ROLE), log_level="DEBUG", **PATIENT) as worker:
        worker.wait_for("worker_started")
        settle_some(site)
        begin = time.monotonic()
        with fault(site):
            endure(worker, pauses=0)
            if failure == "unclear":
                assert worker.wait_for("schema_problems")["level"] == "ERROR"
        settle_some(site)
        seconds = time.monotonic() - begin
        worker.end_well()
    troubles = worker.told("paused") + worker.told("transaction_rolled_back")
    assert {record["failure"] for record in troubles} == {failure}
    assert any(re.search(words, record["error"]) for record in troubles)
    with site.connect() as connection:
        shop = Shop(connection)
        expect_exactly_once(shop)
        expect_calm(shop, seconds, worker)


def test_it_waits_for_a_place_at_the_start(site: Site) -> None:
    url = site.url(ROLE)
    with ExitStack() as crowd:
        crowd.enter_context(crowded(site))
        with start("run", url=url, **PATIENT) as worker:
            begin = time.monotonic()
            endure(worker)
            assert all(re.search(NO_PLACE, record["error"]) for record in worker.told("paused"))
            drained = finish("run", "--drain", url=url, **PATIENT)
            assert (drained.code, "No connection to the database" in drained.stderr) == (69, True)
            assert worker.told("worker_started") == []
            crowd.close()
            worker.wait_for("worker_started")
            settle_some(site)
            seconds = time.monotonic() - begin
            worker.end_well()
    with site.connect() as connection:
        expect_exactly_once(Shop(connection))
        expect_calm(Shop(connection), seconds, worker)


# --- a worker that is stopped in its transaction


def gate(shop: Shop) -> None:
    """Let each insert of a purchase wait while another session holds the lock."""
    shop.rows(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({KEY}); RETURN NEW; END $$"
    )
    shop.rows("CREATE TRIGGER gate BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION wait()")


def stop_at_the_gate(shop: Shop, holder: psycopg.Connection[Any], worker: Process) -> int:
    """Stop the worker (SIGSTOP) while a statement of its transaction waits, then let it go on.

    On a busy machine, ``lock_timeout`` can cancel the statement before. Then try again. Return the
    number of tries.
    """
    waits = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = {KEY} AND NOT granted"
    left = "SELECT state FROM pg_stat_activity WHERE datname = current_database() AND starts_with(state, 'idle in')"
    for tries in itertools.count(1):
        eventually(lambda: shop.scalar(waits), "it came to the gate")
        worker.signal(signal.SIGSTOP)
        holder.execute("SELECT pg_advisory_unlock(%s)", [KEY])
        if eventually(lambda: shop.scalar(left), "it stopped in its transaction") == "idle in transaction":
            return tries
        holder.execute("SELECT pg_advisory_lock(%s)", [KEY])
        worker.signal(signal.SIGCONT)
    raise AssertionError


def test_it_outlasts_being_thrown_out_for_idling_in_its_transaction(site: Site) -> None:
    with site.connect() as connection, site.connect() as holder:
        shop = Shop(connection)
        gate(shop)
        holder.execute("SELECT pg_advisory_lock(%s)", [KEY])
        shop.pay_many(10)
        with start("run", url=site.url(ROLE), **PATIENT) as worker:
            tries = stop_at_the_gate(shop, holder, worker)
            begin = time.monotonic()
            eventually(lambda: "terminating connection due to idle-in-transaction timeout" in site.log(), "the end")
            assert shop.count("purchases") == 0
            worker.signal(signal.SIGCONT)
            expect_settled(shop)
            seconds = time.monotonic() - begin
            worker.end_well()
        assert {record["failure"] for record in worker.told("paused")} == {"reconnect"}
        assert shop.counted('outbox_transactions_total{result="rollback"}') == tries
        expect_exactly_once(shop)
        expect_calm(shop, seconds, worker)


def test_a_zombie_writes_nothing(
    database_url: str, shop: Shop, connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """The worker is stopped in its transaction for longer than the server allows.

    Meanwhile another worker settles its events.
    """
    gate(shop)
    holder = connect(autocommit=True)
    holder.execute("SELECT pg_advisory_lock(%s)", [KEY])
    shop.pay_many(10)
    with start("run", url=database_url, database_deadline_seconds=DEADLINE) as zombie:
        stop_at_the_gate(shop, holder, zombie)
        begin = time.monotonic()
        with start("run", url=database_url, poll_max_seconds=0.2) as other:
            other.wait_for("worker_started")
            eventually(lambda: shop.count("outbox") == 0, "the other one settles them", patience=DEADLINE + 30)
            before = shop.rows("SELECT * FROM purchases ORDER BY id"), shop.rows("SELECT * FROM processed_events")
            zombie.signal(signal.SIGCONT)
            zombie.wait_for("paused", failure="reconnect")
            assert before[0] == shop.rows("SELECT * FROM purchases ORDER BY id")
            assert before[1] == shop.rows("SELECT * FROM processed_events")
            shop.pay_many(5)
            eventually(lambda: shop.count("outbox") == 0, "both go on")
            other.end_well()
        zombie.end_well()
        seconds = time.monotonic() - begin
    assert shop.count("purchases") == 15
    assert shop.doubled() == 0
    assert shop.count("dead_letters") == 0
    expect_calm(shop, seconds, zombie, other)
