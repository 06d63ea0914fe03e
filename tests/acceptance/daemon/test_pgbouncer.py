"""PgBouncer in transaction mode: each transaction can meet another backend.

The worker depends on nothing that belongs to a session.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL

from outbox_worker.embedded.launcher import enter_namespace, namespace_permitted
from tests.support.factories import Shop
from tests.support.processes import Given, eventually, finish, start
from tests.support.servers import libpq
from tests.support.sites import endure, expect_calm, expect_exactly_once, expect_settled

PROGRAM = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
CONFIG = """
[databases]
shop = {target}
[pgbouncer]
unix_socket_dir = {directory}
listen_port = 6432
auth_type = any
pool_mode = {mode}
default_pool_size = {backends}
"""
BACKENDS = 2
SOON = 20.0

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed here")


@dataclass
class Pooler:
    """PgBouncer before the database of a URL. It has fewer backends than the worker connections."""

    target: str
    directory: Path
    mode: str = "transaction"
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        query = {"host": str(self.directory), "port": "6432"}
        return URL.create("postgresql+psycopg", database="shop", query=query).render_as_string()

    def start(self) -> None:
        given = psycopg.conninfo.conninfo_to_dict(libpq(self.target))
        target = {key: given[key] for key in ("host", "port", "dbname", "user", "password") if key in given}
        words = {"target": psycopg.conninfo.make_conninfo("", **target), "directory": self.directory, "mode": self.mode}
        config = self.directory / "pgbouncer.ini"
        config.write_text(CONFIG.format(**words, backends=BACKENDS))
        is_root = os.geteuid() == 0  # PgBouncer refuses to be root
        command = [str(PROGRAM), "--quiet", str(config)]
        self.processes.append(subprocess.Popen(command, preexec_fn=enter_namespace if is_root else None))  # noqa: PLW1509
        eventually(self._answers, "PgBouncer answers")

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError):
            psycopg.connect(libpq(self.url)).close()
            return True
        return False

    def kill(self) -> None:
        self.processes[-1].kill()
        self.processes[-1].wait()
        (self.directory / ".s.PGSQL.6432").unlink(missing_ok=True)


@pytest.fixture
def pooler(request: pytest.FixtureRequest, database_url: str) -> Iterator[Pooler]:
    """Start PgBouncer in transaction mode, or in the mode of an indirect parameter."""
    if os.geteuid() == 0 and not namespace_permitted():
        pytest.skip("PgBouncer refuses to run as root, and this machine permits no other name")
    with tempfile.TemporaryDirectory(prefix="bouncer-") as directory:
        made = Pooler(database_url, Path(directory), getattr(request, "param", "transaction"))
        made.start()
        try:
            yield made
        finally:
            made.kill()


def test_a_drain(pooler: Pooler, shop: Shop) -> None:
    """There are more claim loops than backends. Statements repeat often enough to be prepared."""
    shop.pay_many(600)
    url = pooler.url
    done = finish("run", "--drain", url=url, pooler="transaction", concurrency=4, batch_size=20)
    assert done.code == 0, done.stderr
    assert [record for record in done.records if record.get("event") == "paused"] == []
    expect_exactly_once(shop)
    assert shop.count("purchases") == 600
    assert finish("audit", "--json", url=url, pooler="transaction").object["ok"] is True


def test_a_daemon_that_polls(pooler: Pooler, shop: Shop) -> None:
    """A worker polls through PgBouncer, and goes on after PgBouncer was gone for a while."""
    with start("run", url=pooler.url, pooler="transaction", concurrency=3, poll_max_seconds=0.2) as worker:
        worker.wait_for("worker_started")
        for _ in range(20):
            shop.pay_many(3)
            expect_settled(shop)
        assert worker.told("paused") == []
        begin = time.monotonic()
        pooler.kill()
        shop.pay_many(20)
        endure(worker)
        pooler.start()
        expect_settled(shop)
        seconds = time.monotonic() - begin
        worker.end_well()
    assert {told["failure"] for told in worker.told("paused")} == {"reconnect"}
    expect_exactly_once(shop)
    expect_calm(shop, seconds, worker, loops=3)


def test_a_daemon_that_listens_past_it(pooler: Pooler, database_url: str, shop: Shop) -> None:
    """The worker polls once a minute.

    A notification must tell it of each event that is settled sooner.
    """
    assert finish("migrate", "--with", "notify", url=database_url).code == 0
    rarely: Given = {"poll_min_seconds": 60, "poll_max_seconds": 60}
    listens = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%%'"
    with start("run", url=pooler.url, listen_database_url=database_url, pooler="transaction", **rarely) as worker:
        worker.wait_for("worker_started")
        eventually(lambda: shop.rows(listens), "it listens", SOON)
        for _ in range(5):
            shop.pay_many(1)
            expect_settled(shop, SOON)
        worker.end_well()
    assert worker.told("paused") == []
    expect_exactly_once(shop)


def seen_by_the_doctor(behind: Pooler, check: str, **settings: Any) -> dict[str, str]:
    found = finish("doctor", "--json", url=behind.url, **settings).object["checks"]
    (one,) = [each for each in found if each["name"] == check]
    return dict(one)


def test_the_doctor_knows_it(pooler: Pooler, database_url: str) -> None:
    """The doctor finds the pooler even if no setting names it, and other clients come and go."""
    found = seen_by_the_doctor(pooler, "pooler")
    assert found["verdict"] == "problem"
    assert "OUTBOX_POOLER=transaction" in found["remedy"]
    assert seen_by_the_doctor(pooler, "pooler", pooler="transaction")["verdict"] == "ok"
    assert finish("migrate", "--with", "notify", url=database_url).code == 0
    assert "through a pooler" in seen_by_the_doctor(pooler, "notify")["evidence"]
    assert "does not pass them to workers" in seen_by_the_doctor(pooler, "notify", pooler="transaction")["evidence"]
    past: Given = {"pooler": "transaction", "listen_database_url": database_url}
    assert seen_by_the_doctor(pooler, "notify", **past)["verdict"] == "ok"


@pytest.mark.parametrize("pooler", ["session"], indirect=True)
def test_the_doctor_knows_one_that_leaves_sessions_alone(pooler: Pooler) -> None:
    found = seen_by_the_doctor(pooler, "pooler")
    assert found["verdict"] == "ok"
    assert "session mode" in found["evidence"]
