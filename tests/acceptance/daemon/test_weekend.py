"""A weekend in two minutes: two workers that are restarted, and one fault after the other."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import psycopg
import pytest

from tests.support.factories import Shop
from tests.support.faults import FAULTS, PATIENT
from tests.support.processes import Process, eventually, finish, start
from tests.support.sites import ROLE, Site, expect_exactly_once, expect_settled, watch_charges

ROUNDS = 2


@contextmanager
def paying(site: Site) -> Iterator[None]:
    """Run a payments service that pays whenever the database allows it."""
    over = threading.Event()

    def pay() -> None:
        while not over.is_set():
            with suppress(psycopg.Error), site.connect() as connection:
                Shop(connection).pay_many(20)
            over.wait(0.1)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pay)
        try:
            yield
        finally:
            over.set()
        running.result()


def is_up(site: Site) -> bool:
    with suppress(psycopg.OperationalError), site.connect() as connection:
        return connection.execute("SELECT 1").fetchone() == (1,)
    return False


@pytest.mark.slow
def test_nobody_is_on_duty(site: Site) -> None:
    chance, turn = random.Random(7), threading.Event()
    with site.connect() as connection:
        watch_charges(Shop(connection))
        connection.execute(f"GRANT INSERT ON charged TO {ROLE}")
    with ExitStack() as stack, paying(site):

        def hire() -> Process:
            return stack.enter_context(start("run", url=site.url(ROLE), batch_size=50, **PATIENT))

        workers = [hire(), hire()]
        for name in [name for name in FAULTS if name != "too_many_connections"] * ROUNDS:
            fault, _, _ = FAULTS[name]
            with fault(site):
                turn.wait(chance.uniform(0.5, 3))
            eventually(partial(is_up, site), "the server takes connections")
            victim = workers.pop(0)
            victim.signal(chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP]))
            turn.wait(chance.uniform(0.1, 1))
            victim.kill()
            workers.append(hire())
    assert finish("run", "--drain", url=site.url(ROLE), **PATIENT).code == 0
    with site.connect() as connection:
        shop = Shop(connection)
        expect_settled(shop)
        assert shop.rows("SELECT * FROM charged") == []
        assert shop.count("payments") > 100 * ROUNDS
        expect_exactly_once(shop)
    assert finish("audit", "--json", url=site.url(ROLE)).object["ok"] is True
