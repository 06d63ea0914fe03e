"""LISTEN: a worker that polls once a minute hears of events at once.

It also hears of events after it lost its connection.
"""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from tests.support.factories import Shop
from tests.support.processes import Given, eventually, finish, start
from tests.support.sites import endure, expect_calm

RARELY: Given = {"poll_min_seconds": 60, "poll_max_seconds": 60}
"""Polling alone would find an event only after a test has given up."""
SOON = 20.0
LISTENERS = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'outbox-worker' AND query LIKE 'LISTEN%%'
"""


def listener(shop: Shop, other_than: int | None = None) -> int:
    """Return the pid of the backend that listens."""

    def found() -> Any:
        return [row.pid for row in shop.rows(LISTENERS) if row.pid != other_than]

    pids = eventually(found, "a connection listens", SOON)
    assert len(pids) == 1
    return int(pids[0])


def settled(shop: Shop, event: Any) -> None:
    eventually(lambda: shop.outcome_of(event) == "created", "the event is settled", SOON)


@pytest.fixture
def told(database_url: str) -> str:
    """Return a database with the option ``notify``."""
    assert finish("migrate", "--with", "notify", url=database_url).code == 0
    return database_url


@pytest.mark.parametrize("concurrency", [1, 3])
def test_an_event_is_settled_when_it_is_told_of(concurrency: int, told: str, shop: Shop) -> None:
    with start("run", url=told, concurrency=concurrency, **RARELY) as process:
        process.wait_for("worker_started")
        listener(shop)
        for _ in range(3):
            settled(shop, shop.paid()[1])
        process.end_well()


def test_a_lost_connection_listens_again_and_looks_for_what_came_meanwhile(told: str, shop: Shop) -> None:
    with start("run", url=told, **RARELY) as process:
        process.wait_for("worker_started")
        before = listener(shop)
        settled(shop, shop.paid()[1])
        shop.rows("ALTER TABLE outbox DISABLE TRIGGER outbox_worker_notify")
        _, untold = shop.paid()
        shop.rows("ALTER TABLE outbox ENABLE TRIGGER outbox_worker_notify")
        assert shop.scalar("SELECT pg_terminate_backend(%s)", before)
        listener(shop, other_than=before)
        settled(shop, untold)
        settled(shop, shop.paid()[1])
        process.wait_for("paused", failure="reconnect")
        process.end_well()


def test_it_begins_to_listen_when_the_option_comes(database_url: str, shop: Shop) -> None:
    with start("run", url=database_url, **RARELY) as process:
        process.wait_for("worker_started")
        assert finish("migrate", "--with", "notify", url=database_url).code == 0
        listener(shop)
        settled(shop, shop.paid()[1])
        process.end_well()


def test_it_listens_where_it_is_told_to(told: str, shop: Shop) -> None:
    """Behind a pooler, LISTEN cannot use the connections for work."""
    role = f"listener_{uuid4().hex[:8]}"
    shop.rows(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'right'")
    try:
        url = make_url(told).set(username=role, password="right")  # noqa: S106
        elsewhere = url.render_as_string(hide_password=False)
        with start("run", url=told, listen_database_url=elsewhere, **RARELY) as process:
            process.wait_for("worker_started")
            listens = listener(shop)
            assert shop.scalar("SELECT usename FROM pg_stat_activity WHERE pid = %s", listens) == role
            settled(shop, shop.paid()[1])
            process.end_well()
    finally:
        shop.rows(f"DROP ROLE {role}")


def test_an_address_to_listen_at_that_does_not_answer_hinders_nothing(told: str, shop: Shop) -> None:
    nowhere = "postgresql://nobody@127.0.0.1:1/nowhere"
    with start("run", url=told, listen_database_url=nowhere, poll_max_seconds=0.1) as process:
        begin = time.monotonic()
        process.wait_for("paused", failure="reconnect")
        settled(shop, shop.paid()[1])
        endure(process)
        seconds = time.monotonic() - begin
        process.end_well()
    expect_calm(shop, seconds, process)


def test_behind_a_pooler_it_listens_only_past_it(told: str, shop: Shop) -> None:
    """LISTEN hears nothing in transaction mode, but polling finds every event.

    With a direct address for LISTEN, the worker hears of events again.
    """
    with start("run", url=told, pooler="transaction", poll_max_seconds=0.2) as worker:
        worker.wait_for("worker_started")
        settled(shop, shop.paid()[1])
        eventually(lambda: shop.rows("SELECT id FROM workers WHERE seen_at > started_at"), "a heartbeat")
        assert shop.rows(LISTENERS) == []
        worker.end_well()
    with start("run", url=told, pooler="transaction", listen_database_url=told, **RARELY) as worker:
        listener(shop)
        settled(shop, shop.paid()[1])
        worker.end_well()
