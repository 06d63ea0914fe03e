"""A private PostgreSQL that a test can break, and assertions on a worker after any failure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL

from outbox_worker.embedded import server as embedded
from tests.support import ROOT
from tests.support.factories import Shop
from tests.support.premises import find_program
from tests.support.processes import Process, eventually

TROUBLE_SECONDS = 3.0
ROLE = "clerk"
"""Workers log in as this role. It does not own the tables."""
_KEEPER = """
import select, sys
from pathlib import Path
from outbox_worker.embedded import server as embedded
from outbox_worker.errors import EmbeddedServerError
directory, binaries = map(Path, sys.argv[1:])
while not select.select([sys.stdin], [], [], 0.2)[0]:
    try:
        embedded.ensure_server(directory, bin_dir=binaries)
    except EmbeddedServerError:
        pass
"""
"""A script that restarts the server of a directory each time the server ends."""


@dataclass
class Site:
    """A server that a test can break. ``start`` starts the server if it does not run."""

    directory: Path
    binaries: Path

    def start(self) -> dict[str, str]:
        return embedded.ensure_server(self.directory, bin_dir=self.binaries)

    def url(self, role: str) -> str:
        return url_of(role, self)

    def connect(self) -> psycopg.Connection[Any]:
        """Connect as the owner. Wait until the server has recovered."""
        connection: psycopg.Connection[Any] = eventually(self._admitted, "the server admits its owner", patience=60)
        return connection

    def _admitted(self) -> psycopg.Connection[Any] | None:
        try:
            return psycopg.connect(make_conninfo(**self.start()), autocommit=True)
        except psycopg.OperationalError as error:
            if "the database system is" not in str(error):
                raise
        return None

    def execute(self, statement: str) -> None:
        with self.connect() as connection:
            connection.execute(statement)

    def signal(self, number: int) -> None:
        """Send a signal to the postmaster. SIGINT stops fast, SIGQUIT stops immediately."""
        pid = int(self.postmaster()[0])
        os.kill(pid, number)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "the postmaster is gone")

    def postmaster(self) -> list[str]:
        """Return the lines of ``postmaster.pid``, or no lines if the file does not exist."""
        path = self.directory / "data" / "postmaster.pid"
        return path.read_text().split("\n") if path.exists() else []

    def backends(self, connection: psycopg.Connection[Any]) -> list[int]:
        query = "SELECT pid FROM pg_stat_activity WHERE usename = %s"
        return [pid for (pid,) in connection.execute(query, [ROLE])]

    def throw_out(self) -> None:
        with self.connect() as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [ROLE])

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")


@dataclass
class KeptSite(Site):
    """A site whose server has a keeper. The keeper is a process that restarts the server."""

    keeper: subprocess.Popen[bytes]

    def start(self) -> dict[str, str]:
        """Wait until the server takes connections. It can be a standby."""
        where: dict[str, str] = eventually(self._address, "the server takes connections", patience=60)
        return where

    def _address(self) -> dict[str, str] | None:
        lines = self.postmaster()
        if len(lines) < 8 or lines[7].strip() not in ("ready", "standby"):
            return None
        where = {"host": lines[4], "port": lines[3], "user": "postgres", "dbname": "postgres"}
        try:
            psycopg.connect(**where).close()  # type: ignore[arg-type]
        except psycopg.OperationalError:
            return None
        return where


@contextmanager
def kept(site: Site, *world: str) -> Iterator[KeptSite]:
    """Run a keeper for the directory of ``site``. The command ``world`` starts the keeper. Before
    this, the server must not run."""
    command = [*world, sys.executable, "-c", _KEEPER, str(site.directory), str(site.binaries)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as keeper:
        try:
            yield KeptSite(site.directory, site.binaries, keeper)
        finally:
            keeper.kill()
            keeper.wait()
            embedded.stop_server(site.directory)


@contextmanager
def standby_of(site: Site, directory: Path) -> Iterator[KeptSite]:
    """Make and run a streaming standby of ``site``."""
    copy = Site(directory, site.binaries)
    copy.directory.mkdir()
    (copy.directory / "lock").touch()
    where = site.start()
    words = ["--pgdata", str(copy.directory / "data"), "--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
    address = ["--host", where["host"], "--port", where["port"], "--username", where["user"]]
    subprocess.run([find_program("pg_basebackup"), *words, *address], check=True, capture_output=True)
    with kept(copy) as running:
        running.start()
        yield running


def await_replication(primary: Site, condition: str = "replay_lsn >= pg_current_wal_insert_lsn()") -> None:
    """Wait until the standby has replayed all WAL of the primary."""
    with primary.connect() as connection:
        shop = Shop(connection)
        eventually(lambda: shop.rows(f"SELECT pid FROM pg_stat_replication WHERE {condition}"), "the standby follows")


def url_of(role: str, *sites: Site) -> str:
    """Return a URL that lists the hosts of all sites. The worker connects to the site that accepts
    writes."""
    places: Sequence[dict[str, str]] = [site.start() for site in sites]
    query = {key: ",".join(place[key] for place in places) for key in ("host", "port")}
    url = URL.create("postgresql+psycopg", username=role, database=places[0]["dbname"], query=query)
    return url.render_as_string(hide_password=False)


def settle_some(site: Site, n: int = 20) -> None:
    """Write ``n`` events. Wait until they are settled, and assert that no event has a failed
    try."""
    with site.connect() as connection:
        shop = Shop(connection)
        shop.pay_many(n)
        expect_settled(shop)


def expect_settled(shop: Shop, patience: float = 30) -> None:
    """Wait until the outbox is empty. Assert that no event in it ever has a failed try."""

    def done() -> bool:
        assert shop.rows("SELECT id FROM outbox WHERE attempts > 0") == []
        return shop.count("outbox") == 0

    eventually(done, "all is settled", patience)


def expect_exactly_once(shop: Shop) -> None:
    """Assert that every payment has its purchase and its mark, and that there is no dead letter."""
    assert shop.count("purchases") == shop.count("processed_events") == shop.count("payments")
    assert shop.owed() == shop.doubled() == shop.count("outbox") == shop.count("dead_letters") == 0


def endure(worker: Process, pauses: int = 4) -> None:
    """Wait until the worker has logged ``pauses`` pauses, and long enough to reveal a busy loop."""
    threading.Event().wait(TROUBLE_SECONDS)
    eventually(lambda: len(worker.told("paused")) >= pauses, "it pauses again and again")


def expect_calm(shop: Shop, seconds: float, *workers: Process, loops: int = 1) -> None:
    """Assert that the workers logged few pauses and counted few failures, so they did not
    busy-loop.

    Call this only after the workers have ended, because the last heartbeat writes all counters.
    Pauses of a claim loop begin at a tenth of a second and double each time, with jitter.
    """
    most = len(workers) * loops * (6 + 2 * seconds)
    assert sum(len(worker.told("paused")) for worker in workers) <= most
    assert shop.counted("outbox_database_errors_total") <= most


def watch_charges(shop: Shop) -> None:
    """Record every change that counts a failed try. A crash must not count as a failed try."""
    shop.rows("CREATE TABLE charged (event_id uuid, attempts int)")
    shop.rows(
        "CREATE FUNCTION charge() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO charged VALUES (NEW.event_id, NEW.attempts); RETURN NEW; END $$"
    )
    shop.rows(
        "CREATE TRIGGER charge AFTER UPDATE ON outbox FOR EACH ROW"
        " WHEN (NEW.attempts > OLD.attempts) EXECUTE FUNCTION charge()"
    )
