"""kill -9 at any moment: no purchase is lost or made twice, and no event is charged."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.factories import Shop
from tests.support.history import assert_never_twice_active, keep_history
from tests.support.makers import Connect
from tests.support.processes import Process, eventually, finish, start
from tests.support.refunding import Pair, tell_at_random
from tests.support.refunding import check as check_pairs
from tests.support.sites import watch_charges

BATCH = 100


@contextmanager
def producing(shop: Shop, backlog: int) -> Iterator[None]:
    """Run a payments service that keeps a backlog.

    Half of its payments have two events each. Of the other half, two payments share a pair.
    """
    over = threading.Event()

    def produce() -> None:
        while not over.is_set():
            if shop.count("outbox") < backlog:
                shop.pay_many(BATCH, events=2)
                shop.pay_many(BATCH, pairs=BATCH // 2)
            over.wait(0.02)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(produce)
        try:
            yield
        finally:
            over.set()
        running.result()


def in_a_transaction(shop: Shop) -> bool:
    """Tell whether a worker has claimed and not committed yet."""
    return bool(
        shop.scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'outbox-worker' AND backend_xid IS NOT NULL"
        )
    )


def kill_again_and_again(url: str, shop: Shop, kills: int, chance: random.Random, hands: int = 2) -> int:
    """Keep workers running and kill one of them at random moments.

    Return how many of them were killed inside a transaction.
    """
    caught = 0
    turn = threading.Event()
    with ExitStack() as stack:

        def hire() -> Process:
            # An event that a killed worker took alone is due again soon: the last drain finds it.
            return stack.enter_context(start("run", url=url, batch_size=BATCH, retry_base_seconds=0.1))

        workers = [hire() for _ in range(hands)]
        for worker in workers:
            worker.wait_for("worker_started")
        for _ in range(kills):
            spare = hire()  # starts while the others work
            spare.wait_for("worker_started")
            # Half of the kills come at any moment. The others come between a claim and its commit.
            turn.wait(chance.uniform(0, 0.15))
            if chance.random() < 0.5:
                eventually(lambda: in_a_transaction(shop), "a transaction", patience=10)
            caught += in_a_transaction(shop)
            victim = workers.pop(chance.randrange(hands))
            victim.signal(signal.SIGKILL)
            workers.append(spare)
            assert victim.wait() == -signal.SIGKILL, victim.stderr
        for worker in workers:
            worker.signal()
        for worker in workers:
            assert worker.wait() == 0, worker.stderr
    return caught


def check(url: str, shop: Shop, kills: int) -> None:
    """Check after a last drain that everything is as if no worker had been killed."""
    sent = shop.scalar("SELECT count(*) FROM sent")
    drained = finish("run", "--drain", url=url, patience=240)
    assert drained.code == 0, drained.stderr
    assert shop.count("outbox") == 0
    assert shop.rows("SELECT * FROM charged") == []
    assert shop.count("dead_letters") == 0
    assert shop.count("processed_events") == sent
    pairs = shop.scalar("SELECT count(*) FROM (SELECT DISTINCT student_id, course_id FROM payments) AS d")
    assert shop.active_pairs().total() == len(shop.active_pairs()) == shop.count("purchases") == pairs
    assert shop.owed() == 0
    assert assert_never_twice_active(url) == pairs
    # Purchase and mark are in one transaction: no mark is without its purchase, no purchase without
    # its mark.
    outcomes = dict(shop.rows("SELECT outcome, count(*) FROM processed_events GROUP BY 1"))
    assert outcomes.keys() == {"created", "already_exists", "duplicate_payment"}
    assert outcomes["created"] == pairs
    assert finish("audit", "--json", url=url).object["ok"] is True
    silent = shop.scalar("SELECT count(*) FROM workers WHERE stopped_at IS NULL")
    assert silent == kills, "each killed worker, and no other, left without a word"


def prove(url: str, shop: Shop, connect: Connect, kills: int, guard: str) -> None:
    chance = random.Random(f"{guard} {kills}")
    watch_charges(shop)
    keep_history(shop)
    shop.rows("CREATE TABLE sent (event_id uuid)")
    shop.rows(
        "CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO sent VALUES (NEW.event_id); RETURN NEW; END $$"
    )
    shop.rows("CREATE TRIGGER remember AFTER INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION remember()")
    with producing(Shop(connect(autocommit=True)), 10 * BATCH):
        caught = kill_again_and_again(url, shop, kills, chance)
    assert caught >= kills // 4, "hardly anybody was killed at work; the test proves little"
    check(url, shop, kills)


@pytest.mark.slow
@pytest.mark.parametrize("hands", [2, 4])
def test_kills_among_confirmations_and_refunds(
    both_guards: str, hands: int, database_url: str, shop: Shop, connect: Connect
) -> None:
    """Every pair ends as the model says, whatever the order of events and whoever was killed."""
    chance, pairs, kills = random.Random(f"{both_guards} {hands}"), list[Pair](), 20
    watch_charges(shop)
    keep_history(shop)
    own, over = Shop(connect(autocommit=True)), threading.Event()

    def produce() -> None:
        while not over.is_set():
            if own.count("outbox") < 5 * BATCH:
                tell_at_random(own, pairs, chance, BATCH)
            over.wait(0.02)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(produce)
        try:
            caught = kill_again_and_again(database_url, shop, kills, random.Random(hands), hands)
        finally:
            over.set()
        running.result()
    assert caught >= kills // 4, "hardly anybody was killed at work; the test proves little"
    drained = finish("run", "--drain", url=database_url)
    assert drained.code == 0, drained.stderr
    assert shop.count("outbox") == 0
    assert shop.rows("SELECT * FROM charged") == []
    check_pairs(shop, pairs)
    assert assert_never_twice_active(database_url) > 0
    outcomes = dict(shop.rows("SELECT outcome, count(*) FROM processed_events GROUP BY 1"))
    assert outcomes.keys() >= {"created", "suppressed", "revoked", "duplicate_payment"}
    assert finish("audit", "--json", url=database_url).object["ok"] is True


def test_five_kills(both_guards: str, database_url: str, shop: Shop, connect: Connect) -> None:
    prove(database_url, shop, connect, 5, both_guards)


@pytest.mark.slow
def test_fifty_kills(both_guards: str, database_url: str, shop: Shop, connect: Connect) -> None:
    prove(database_url, shop, connect, 50, both_guards)
