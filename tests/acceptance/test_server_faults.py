"""A server that stops, crashes, throws everybody out or refuses: the worker resumes alone and charges nobody."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import psycopg
import pytest
from factories import Shop
from processes import Process, eventually, finish, start
from sites import ROLE, Site, endure, expect_calm, expect_exactly_once, expect_settled, settle_some

DEADLINE = 2
KEY = 4242
"""Of the advisory lock at which an insert waits."""
NO_PLACE = "too many clients|slots are reserved"
PATIENT = {"database_deadline_seconds": DEADLINE, "poll_max_seconds": 0.2, "retry_base_seconds": 0.5}


# --- faults: entered, they are there; left, they are mended


@contextmanager
def stopped(site: Site, number: int) -> Iterator[None]:
    site.signal(number)
    yield
    site.start()


@contextmanager
def backend_killed(site: Site) -> Iterator[None]:
    """The postmaster throws everybody out and recovers."""
    with site.connect() as connection:
        os.kill(eventually(lambda: site.backends(connection), "a backend")[0], signal.SIGKILL)
    yield


@contextmanager
def thrown_out(site: Site) -> Iterator[None]:
    site.throw_out()
    yield


@contextmanager
def refused(site: Site, how: str, mended: str) -> Iterator[None]:
    """Nobody is admitted any more, or only to look on."""
    site.execute(f"ALTER ROLE {ROLE} {how}")
    site.throw_out()
    pay(site)
    yield
    site.execute(f"ALTER ROLE {ROLE} {mended}")


@contextmanager
def crowded(site: Site) -> Iterator[None]:
    """Others hold every connection that the server has for ordinary roles."""
    site.execute("CREATE ROLE guest LOGIN")
    with site.connect() as own, ExitStack() as guests:

        def is_full() -> bool:
            site.throw_out()
            fill(site, guests)
            return not site.backends(own)

        eventually(is_full, "no place is left")
        Shop(own).pay_many(1)
        yield


@contextmanager
def held(site: Site, table: str) -> Iterator[None]:
    """Somebody's DDL holds a table for longer than anybody waits."""
    with site.connect() as other, other.transaction():
        other.execute(f"LOCK TABLE {table}")
        if table != "outbox":
            pay(site)
        yield


@contextmanager
def changed(site: Site, how: str, mended: str) -> Iterator[None]:
    site.execute(how)
    pay(site)
    yield
    site.execute(mended)


def fill(site: Site, guests: ExitStack) -> None:
    """Take places until there is none for an ordinary role; the superuser's are left."""
    where = site.start() | {"user": "guest"}
    try:
        while True:
            guests.enter_context(psycopg.connect(**where))  # type: ignore[arg-type]
    except psycopg.OperationalError as error:
        if not re.search(NO_PLACE, str(error)):
            raise


def pay(site: Site) -> None:
    with site.connect() as connection:
        Shop(connection).pay_many(1)


Fault = Callable[[Site], AbstractContextManager[None]]
FAULTS: dict[str, tuple[Fault, str, str]] = {
    "fast_stop": (partial(stopped, number=signal.SIGINT), "reconnect", ""),
    "immediate_stop": (partial(stopped, number=signal.SIGQUIT), "reconnect", ""),
    "backend_killed": (backend_killed, "reconnect", ""),
    "thrown_out": (thrown_out, "reconnect", ""),
    "connection_limit": (
        partial(refused, how="CONNECTION LIMIT 0", mended="CONNECTION LIMIT -1"),
        "reconnect",
        "too many connections for role",
    ),
    "no_login": (partial(refused, how="NOLOGIN", mended="LOGIN"), "reconnect", "not permitted to log in"),
    "read_only": (
        partial(refused, how="SET default_transaction_read_only = on", mended="RESET default_transaction_read_only"),
        "reconnect",
        "read-only",
    ),
    "too_many_connections": (crowded, "reconnect", NO_PLACE),
    "purchases_held": (partial(held, table="purchases"), "retry", "55P03"),
    "marks_held": (partial(held, table="processed_events"), "retry", "55P03"),
    "outbox_held": (partial(held, table="outbox"), "retry", "55P03"),
    "privilege_revoked": (
        partial(
            changed,
            how=f"REVOKE INSERT ON purchases FROM {ROLE}",
            mended=f"GRANT INSERT ON purchases TO {ROLE}",
        ),
        "unclear",
        "42501",
    ),
    "table_lost": (
        partial(
            changed,
            how="ALTER TABLE processed_events RENAME TO elsewhere",
            mended="ALTER TABLE elsewhere RENAME TO processed_events",
        ),
        "unclear",
        "42P01",
    ),
}
"""Each with the class of failure that the operator is told of, and with the words."""


# --- the worker outlasts them


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
    """Whoever inserts a purchase waits while somebody else has the key."""
    shop.rows(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({KEY}); RETURN NEW; END $$"
    )
    shop.rows("CREATE TRIGGER gate BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION wait()")


def stop_at_the_gate(shop: Shop, holder: psycopg.Connection[Any], worker: Process) -> None:
    """Stop it (SIGSTOP) while a statement of its transaction waits, then let the statement go on."""
    waits = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = {KEY} AND NOT granted"
    eventually(lambda: shop.scalar(waits), "it came to the gate")
    worker.signal(signal.SIGSTOP)
    holder.execute("SELECT pg_advisory_unlock(%s)", [KEY])


def test_it_outlasts_being_thrown_out_for_idling_in_its_transaction(site: Site) -> None:
    with site.connect() as connection, site.connect() as holder:
        shop = Shop(connection)
        gate(shop)
        holder.execute("SELECT pg_advisory_lock(%s)", [KEY])
        shop.pay_many(10)
        with start("run", url=site.url(ROLE), **PATIENT) as worker:
            stop_at_the_gate(shop, holder, worker)
            begin = time.monotonic()
            eventually(lambda: "terminating connection due to idle-in-transaction timeout" in site.log(), "the end")
            assert shop.count("purchases") == 0
            worker.signal(signal.SIGCONT)
            expect_settled(shop)
            seconds = time.monotonic() - begin
            worker.end_well()
        assert {record["failure"] for record in worker.told("paused")} == {"reconnect"}
        assert shop.counted('outbox_transactions_total{result="rollback"}') == 1
        expect_exactly_once(shop)
        expect_calm(shop, seconds, worker)


def test_a_zombie_writes_nothing(
    database_url: str, shop: Shop, connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """Stopped in its transaction for longer than the server allows, while another settles its events."""
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
