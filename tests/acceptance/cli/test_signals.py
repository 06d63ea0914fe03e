"""Signals of a supervisor: the daemon ends its batch, or stops at once after a second signal."""

from __future__ import annotations

import signal
from typing import Any

import psycopg
import pytest

from tests.support.factories import Shop
from tests.support.makers import Connect
from tests.support.processes import (
    eventually,
    finish,
    start,
)

GATE = 4242


def close_gate(shop: Shop, holder: psycopg.Connection[Any]) -> None:
    """Let every insert into ``purchases`` wait until the holder releases its lock."""
    shop.rows(
        f"CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NEW; END $$"
    )
    shop.rows("CREATE TRIGGER gate BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION wait_at_gate()")
    holder.execute("SELECT pg_advisory_lock(%s)", [GATE])


def is_at_gate(shop: Shop) -> bool:
    return bool(
        shop.scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'outbox-worker' AND wait_event = 'advisory'"
        )
    )


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_idle(number: int, times: int, database_url: str, shop: Shop) -> None:
    with start("run", url=database_url) as process:
        process.wait_for("worker_started")
        for _ in range(times):
            process.signal(number)
        assert process.wait(10) == 0, process.stderr
        process.wait_for("worker_stopped")
        assert "Traceback" not in process.stderr
    assert shop.rows("SELECT stopped_at IS NOT NULL FROM workers") == [(True,)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_within_a_batch_it_finishes_the_batch_and_no_other(
    number: int, database_url: str, shop: Shop, connect: Connect
) -> None:
    holder = connect(autocommit=True)
    close_gate(shop, holder)
    shop.pay_many(10)
    with start("run", url=database_url, batch_size=4, database_deadline_seconds=60) as process:
        eventually(lambda: is_at_gate(shop), "the batch is under way")
        process.signal(number)
        process.wait_for("worker_stopping", patience=10)
        assert process.popen.poll() is None
        holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])
        assert process.wait() == 0, process.stderr
        assert "Traceback" not in process.stderr
    assert (shop.count("purchases"), shop.count("outbox"), shop.count("processed_events")) == (4, 6, 4)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_does_not_wait_for_the_batch(
    numbers: tuple[int, int], database_url: str, shop: Shop, connect: Connect
) -> None:
    """The transaction that was not committed is rolled back, and no event is charged."""
    holder = connect(autocommit=True)
    close_gate(shop, holder)
    shop.pay_many(10)
    before = shop.rows("SELECT * FROM outbox ORDER BY id")
    with start("run", url=database_url, database_deadline_seconds=60) as process:
        eventually(lambda: is_at_gate(shop), "the batch is under way")
        process.signal(numbers[0])
        process.wait_for("worker_stopping", patience=10)
        process.signal(numbers[1])
        assert process.wait(10) == 0, process.stderr
        assert "Traceback" not in process.stderr
    holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    eventually(lambda: not is_at_gate(shop), "the server notices")
    assert shop.rows("SELECT * FROM outbox ORDER BY id FOR UPDATE") == before
    assert shop.count("purchases") == 0
    assert finish("run", "--drain", url=database_url).code == 0
    assert shop.count("purchases") == 10
