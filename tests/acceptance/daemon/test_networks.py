"""Networks that fail: the answer to COMMIT never comes, or a line swallows requests or replies."""

from __future__ import annotations

import time
from typing import Literal

import pytest

from tests.support.factories import Shop
from tests.support.processes import eventually, finish, start
from tests.support.proxy import proxied
from tests.support.sites import expect_calm

DEADLINE = 2
BACK_OFF = 10
"""The longest pause between two tries."""


@pytest.mark.parametrize("guard_kind", ["index", "lock"], indirect=True)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_cut_off_is_neither_lost_nor_doubled(
    when: Literal["before", "after"], database_url: str, shop: Shop
) -> None:
    """The line breaks before or after the COMMIT. The worker cannot tell which.

    It reconnects and asks for the result of the transaction.
    """
    with proxied(database_url) as proxy, start("run", url=proxy.url, poll_max_seconds=0.2) as worker:
        worker.wait_for("worker_started")
        proxy.cut_next_commit(when)
        begin = time.monotonic()
        shop.pay_many(30)
        eventually(lambda: proxy.cuts == 1 and shop.count("outbox") == 0, "cut off, and all is settled")
        shop.pay_many(30)
        eventually(lambda: shop.count("outbox") == 0, "it goes on")
        seconds = time.monotonic() - begin
        worker.end_well()
    assert shop.active_pairs().total() == shop.count("purchases") == shop.count("processed_events") == 60
    assert shop.count("dead_letters") == 0
    assert shop.counted('outbox_transactions_total{result="unknown"}') == 1
    assert shop.counted('outbox_events_total{event_type="PURCHASE_CONFIRMED",outcome="created"}') == 60
    assert shop.counted('outbox_events_total{event_type="PURCHASE_CONFIRMED",outcome="retried"}') == 0
    expect_calm(shop, seconds, worker)


@pytest.mark.parametrize(
    "what", [("requests",), ("replies",), ("requests", "replies")], ids=["requests", "replies", "both"]
)
def test_a_line_that_swallows_is_given_up_within_the_deadline(
    what: tuple[Literal["requests", "replies"], ...], database_url: str, shop: Shop
) -> None:
    with (
        proxied(database_url) as proxy,
        start("run", url=proxy.url, database_deadline_seconds=DEADLINE, poll_max_seconds=0.2) as worker,
    ):
        worker.wait_for("worker_started")
        shop.pay_many(5)
        eventually(lambda: shop.count("outbox") == 0, "it works")
        proxy.swallow(*what)
        shop.pay_many(5)
        begin = time.monotonic()
        eventually(lambda: shop.count("outbox") == 0, "it works again", patience=DEADLINE + BACK_OFF + 5)
        assert time.monotonic() - begin < DEADLINE + BACK_OFF
        paused = worker.wait_for("paused")
        assert (paused["failure"], paused["level"]) == ("reconnect", "WARNING")
        seconds = time.monotonic() - begin
        worker.end_well()
    assert shop.count("purchases") == 10
    assert shop.count("dead_letters") == 0
    expect_calm(shop, seconds, worker)


def test_a_one_shot_command_gives_up_on_a_dead_line(database_url: str, shop: Shop) -> None:
    """The proxy accepts the connection and never answers."""
    shop.pay_many(1)
    with proxied(database_url) as proxy:
        proxy.mute = True
        begin = time.monotonic()
        done = finish("run", "--drain", url=proxy.url, database_deadline_seconds=DEADLINE)
        assert time.monotonic() - begin < DEADLINE + BACK_OFF
    assert done.code == 69
    assert "No connection to the database" in done.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_it_while_the_database_hangs(times: int, database_url: str, shop: Shop) -> None:
    """After one signal the worker ends within two deadlines.

    One is for the batch, one for its last message. After two signals it ends at once.
    """
    deadline = DEADLINE if times == 1 else 60
    with (
        proxied(database_url) as proxy,
        start("run", url=proxy.url, database_deadline_seconds=deadline, poll_max_seconds=0.2) as worker,
    ):
        worker.wait_for("worker_started")
        proxy.swallow("requests", "replies")
        proxy.mute = True
        shop.pay_many(5)
        eventually(lambda: proxy.swallowed > 0, "the line is dead")
        worker.signal()
        worker.wait_for("worker_stopping")
        if times == 2:
            worker.signal()
        assert worker.wait(2 * deadline + BACK_OFF if times == 1 else BACK_OFF) == 0
        assert "Traceback" not in worker.stderr
    assert shop.scalar("SELECT max(attempts) FROM outbox") == 0
    assert shop.count("outbox") == 5
