"""Which deaths count as crashes: kills with an event in hand.

Stops, outages and full disks do not.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from outbox_worker.embedded import server as embedded
from tests.support.factories import Payment, Shop
from tests.support.makers import Connect
from tests.support.processes import Given, Process, eventually, finish, start
from tests.support.proxy import proxied
from tests.support.sites import ROLE, Site

QUICK: Given = {"retry_base_seconds": 0.1, "poll_max_seconds": 0.1, "backfill_every_seconds": 0}
NO_PROCESS = 2**22 + 1
"""Larger than any process id."""
FULL_DISK = (
    "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN RAISE 'could not extend file' USING ERRCODE = '53100'; END $$;"
    "CREATE TRIGGER full_disk BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION full_disk()"
)
ROOM_AGAIN = "DROP TRIGGER full_disk ON purchases"


def leave_dead_worker(shop: Shop) -> None:
    """Leave the row of a dead worker. The next worker that starts takes its events one by one."""
    shop.rows(
        "INSERT INTO workers (id, host, pid, version, guard) VALUES (%s, %s, %s, '0', 'index')",
        uuid4(),
        socket.gethostname(),
        NO_PROCESS,
    )


@contextmanager
def held(connection: psycopg.Connection[Any], payment: Payment) -> Iterator[None]:
    """Keep an uncommitted gift for the pair.

    No worker can write the pair's purchase, and the event stays in hand.
    """
    gift = "INSERT INTO purchases (student_id, course_id, amount, currency) VALUES (%s, %s, 0, 'EUR')"
    connection.execute(gift, payment.pair)
    try:
        yield
    finally:
        connection.rollback()


def wait_until_in_hand(shop: Shop) -> int:
    """Wait until a worker has accused and claimed the event."""
    accused = "SELECT isolated_event FROM workers WHERE stopped_at IS NULL AND succeeded_at IS NULL"
    found: int = eventually(lambda: shop.waiting() and shop.scalar(f"{accused} AND isolated_event IS NOT NULL"), "hand")
    return found


def drop_sessions(shop: Shop) -> None:
    """End the sessions of dead workers that still wait for a lock."""
    shop.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


def expect_settled_without_a_count(shop: Shop, url: str) -> None:
    assert shop.rows("SELECT crashes FROM outbox WHERE crashes > 0") == []
    assert finish("run", "--drain", url=url, **QUICK).code == 0
    assert (shop.count("outbox"), shop.count("dead_letters"), shop.count("purchases")) == (0, 0, 1)


def test_a_full_disk_with_four_loops_is_no_death(database_url: str, shop: Shop) -> None:
    leave_dead_worker(shop)
    shop.paid()
    shop.rows(FULL_DISK)
    with start("run", "--concurrency", "4", url=database_url, **QUICK) as worker:
        eventually(lambda: len(worker.told("paused")) >= 8, "every loop has tried, again and again")
        assert shop.rows("SELECT crashes FROM outbox") == [(0,)]
        shop.rows(ROOM_AGAIN)
        eventually(lambda: shop.count("outbox") == 0, "it goes on by itself")
        worker.end_well()
    assert (shop.count("dead_letters"), shop.count("purchases")) == (0, 1)


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_three_stops_are_no_death(signals: int, database_url: str, shop: Shop, connect: Connect) -> None:
    """Each stop comes at the worst moment: the event is accused and in hand.

    A second signal hurries the stop.
    """
    payment, _ = shop.paid()
    for _ in range(3):
        leave_dead_worker(shop)
        impatient: Given = {**QUICK, "database_deadline_seconds": 2}
        with held(connect(), payment), start("run", url=database_url, **impatient) as worker:
            wait_until_in_hand(shop)
            worker.signal()
            if signals > 1:
                worker.wait_for("worker_stopping")
                worker.signal()
            assert worker.wait() == 0
            drop_sessions(shop)
    expect_settled_without_a_count(shop, database_url)


def test_three_kills_with_the_event_in_hand_bury_it(database_url: str, shop: Shop, connect: Connect) -> None:
    """The events of other payments are not charged."""
    payment, event = shop.paid(due_in="-1 hour")
    shop.pay_many(5)
    leave_dead_worker(shop)
    for _ in range(3):
        with held(connect(), payment), start("run", url=database_url, **QUICK) as worker:
            wait_until_in_hand(shop)
            worker.kill()
            drop_sessions(shop)
    drained = finish("run", "--drain", url=database_url, **QUICK)
    assert [record["outbox_id"] for record in drained.records if record.get("event") == "crash_counted"]
    letter = shop.letter_of(event)
    assert (letter.reason, letter.attempts) == ("crashed_worker", 1)
    assert (shop.count("dead_letters"), shop.count("purchases"), shop.count("outbox")) == (1, 5, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_without_database_is_no_death(
    number: signal.Signals, database_url: str, shop: Shop, connect: Connect
) -> None:
    """The accusation stays, because no worker could withdraw it.

    But the process gave the event up before it ended.
    """
    payment, _ = shop.paid()
    leave_dead_worker(shop)
    patient: Given = {**QUICK, "database_deadline_seconds": 1}
    with proxied(database_url) as proxy, start("run", url=proxy.url, **patient) as worker:
        with held(connect(), payment):
            wait_until_in_hand(shop)
            proxy.close()
            worker.wait_for("paused", failure="reconnect")
        eventually(lambda: shop.sessions("usename = current_user AND application_name = 'outbox-worker'") == 0, "gone")
        wait_until_given_up(worker)
        assert shop.scalar("SELECT count(*) FROM workers WHERE isolated_event IS NOT NULL") == 1
        worker.signal(number)
        worker.wait()
    expect_settled_without_a_count(shop, database_url)


def wait_until_given_up(worker: Process) -> None:
    """Wait until every loop reports trouble.

    The claim loop reports it after it gave the event up.
    """
    seen = len(worker.told("paused"))
    eventually(lambda: len(worker.told("paused")) >= seen + 2, "it pauses again")


def test_a_restart_of_the_server_after_the_kill_leaves_doubt(site: Site) -> None:
    """After the kill, the server can have ended the session.

    Somebody can then have killed the process that waited for the session.
    """
    with site.connect() as connection:
        shop = Shop(connection)
        payment, _ = shop.paid()
        leave_dead_worker(shop)
        with site.connect() as holder:
            holder.autocommit = False
            with held(holder, payment), start("run", url=site.url(ROLE), **QUICK) as worker:
                wait_until_in_hand(shop)
                worker.kill()
    embedded.stop_server(site.directory)
    with site.connect() as connection:
        expect_settled_without_a_count(Shop(connection), site.url(ROLE))
