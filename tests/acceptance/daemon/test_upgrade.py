"""From the previous version to this one and back, while events come.

No purchase is lost or made twice, and no event is charged.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support import versions
from tests.support.factories import Shop
from tests.support.history import assert_never_twice_active, keep_history
from tests.support.processes import Process, eventually, finish, start
from tests.support.refunding import Pair, check, tell_at_random
from tests.support.servers import libpq
from tests.support.sites import watch_charges

pytestmark = pytest.mark.slow

HANDS = 2
SETTINGS: dict[str, Any] = {"batch_size": 50, "retry_base_seconds": 0.1}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the code of the previous version."""
    commit = versions.last_version()
    if commit is None:
        pytest.skip("this copy of the repository does not have the version before")
    return versions.unpack(commit, tmp_path_factory.mktemp("before"))


@pytest.fixture
def url(before: Path, make_url: Callable[[str | None], str]) -> str:
    """Make a database that the previous version has migrated."""
    made = make_url(None)
    done = versions.finish_of(before, "migrate", "--with", "unique_index", url=made)
    assert done.code == 0, done.stderr
    return made


@pytest.fixture
def buyers(url: str) -> Iterator[Shop]:
    with psycopg.connect(libpq(url), autocommit=True) as connection:
        yield Shop(connection)


@contextmanager
def telling(url: str, pairs: list[Pair]) -> Iterator[None]:
    """Run a payments service that writes events of payments and refunds until the end."""
    chance, over = random.Random(4), threading.Event()

    def tell_on() -> None:
        with psycopg.connect(libpq(url), autocommit=True) as connection:
            shop = Shop(connection)
            while not over.is_set():
                if shop.count("outbox") < 200:
                    tell_at_random(shop, pairs, chance, 50)
                over.wait(0.05)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(tell_on)
        try:
            yield
        finally:
            over.set()
        running.result()


def settle_more(shop: Shop, *workers: Process) -> None:
    """Wait until two hundred more events are marked.

    Check that none of ``workers`` is in trouble.
    """
    marked = shop.count("processed_events")
    eventually(lambda: shop.count("processed_events") >= marked + 200, "they settle events", patience=60)
    for worker in workers:
        assert worker.told("paused") == worker.told("schema_problems") == [], worker.stderr


def test_a_worker_of_this_version_does_not_start_before_migrate(url: str) -> None:
    done = finish("run", url=url)
    assert done.code == 78
    assert "outbox-worker migrate" in done.stderr


def test_there_and_back(before: Path, url: str, buyers: Shop) -> None:
    pairs: list[Pair] = []
    watch_charges(buyers)
    keep_history(buyers)
    with ExitStack() as stack, telling(url, pairs):

        def of_before() -> Process:
            worker = stack.enter_context(versions.start_of(before, "run", url=url, **SETTINGS))
            worker.wait_for("worker_started")
            return worker

        def of_now() -> Process:
            worker = stack.enter_context(start("run", url=url, **SETTINGS))
            worker.wait_for("worker_started")
            return worker

        old = [of_before() for _ in range(HANDS)]
        settle_more(buyers, *old)
        migrated = finish("migrate", url=url)
        assert migrated.code == 0, migrated.stderr
        settle_more(buyers, *old)
        new = [of_now() for _ in range(HANDS)]
        settle_more(buyers, *old, *new)
        for worker in old:
            worker.end_well()
        settle_more(buyers, *new)
        old = [of_before() for _ in range(HANDS)]
        settle_more(buyers, *old, *new)
        for worker in new:
            worker.end_well()
        settle_more(buyers, *old)
        for worker in old:
            worker.end_well()
    drained = versions.finish_of(before, "run", "--drain", url=url)
    assert drained.code == 0, drained.stderr
    assert buyers.count("outbox") == 0
    assert buyers.rows("SELECT * FROM charged") == []
    check(buyers, pairs)
    assert assert_never_twice_active(url) > 100
    for audit in (finish("audit", "--json", url=url), versions.finish_of(before, "audit", "--json", url=url)):
        assert audit.object["ok"] is True
    assert buyers.count("workers WHERE stopped_at IS NULL") == 0
