"""A PostgreSQL of a test's own, which may be broken; and what is asked of a worker, whatever breaks."""

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
"""Workers come as a role that is not the owner's."""
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
"""Starts the server of a directory again whenever it ends, as a supervisor does."""


@dataclass
class Site:
    """Its server runs until it is broken, and again when it is asked for."""

    directory: Path
    binaries: Path

    def start(self) -> dict[str, str]:
        return embedded.ensure_server(self.directory, bin_dir=self.binaries)

    def url(self, role: str) -> str:
        return url_of(role, self)

    def connect(self) -> psycopg.Connection[Any]:
        """As the owner; a recovery is waited out."""
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
        """To the postmaster: SIGINT is a fast stop, SIGQUIT an immediate one."""
        pid = int(self.postmaster()[0])
        os.kill(pid, number)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "the postmaster is gone")

    def postmaster(self) -> list[str]:
        """The lines of ``postmaster.pid``; none where no server runs."""
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
    """Its server belongs to a process of its own, in a world of its own if need be, which starts it again by itself."""

    keeper: subprocess.Popen[bytes]

    def start(self) -> dict[str, str]:
        """Wait for it; a standby that takes connections is up, too."""
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
    """A keeper for the directory of ``site``, whose server must not run; ``world``: a command that it is run by."""
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
    """A streaming standby of ``site``."""
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
    """The standby has all that the primary has."""
    with primary.connect() as connection:
        shop = Shop(connection)
        eventually(lambda: shop.rows(f"SELECT pid FROM pg_stat_replication WHERE {condition}"), "the standby follows")


def url_of(role: str, *sites: Site) -> str:
    """Several sites: whichever of them takes writes."""
    places: Sequence[dict[str, str]] = [site.start() for site in sites]
    query = {key: ",".join(place[key] for place in places) for key in ("host", "port")}
    url = URL.create("postgresql+psycopg", username=role, database=places[0]["dbname"], query=query)
    return url.render_as_string(hide_password=False)


def settle_some(site: Site, n: int = 20) -> None:
    """So many more events: settled, none of them ever charged."""
    with site.connect() as connection:
        shop = Shop(connection)
        shop.pay_many(n)
        expect_settled(shop)


def expect_settled(shop: Shop, patience: float = 30) -> None:
    """Nothing is left in the outbox in the end, and nothing in it was ever charged."""

    def done() -> bool:
        assert shop.rows("SELECT id FROM outbox WHERE attempts > 0") == []
        return shop.count("outbox") == 0

    eventually(done, "all is settled", patience)


def expect_exactly_once(shop: Shop) -> None:
    """Every payment has its purchase and its mark, no event is dead."""
    assert shop.count("purchases") == shop.count("processed_events") == shop.count("payments")
    assert shop.owed() == shop.doubled() == shop.count("outbox") == shop.count("dead_letters") == 0


def endure(worker: Process, pauses: int = 4) -> None:
    """Let the trouble last until the worker has told of so many pauses, and long enough for one that spins to show."""
    threading.Event().wait(TROUBLE_SECONDS)
    eventually(lambda: len(worker.told("paused")) >= pauses, "it pauses again and again")


def expect_calm(shop: Shop, seconds: float, *workers: Process, loops: int = 1) -> None:
    """The trouble of ``seconds`` was no reason to spin: neither told pauses nor counted failures are many.

    To be asked of workers that have ended: the last heartbeat brings all of the counters. Pauses of each claim loop
    double from a tenth of a second on, with jitter.
    """
    most = len(workers) * loops * (6 + 2 * seconds)
    assert sum(len(worker.told("paused")) for worker in workers) <= most
    assert shop.counted("outbox_database_errors_total") <= most


def watch_charges(shop: Shop) -> None:
    """Write down every change that counts a failed try: a crash is nobody's fault."""
    shop.rows("CREATE TABLE charged (event_id uuid, attempts int)")
    shop.rows(
        "CREATE FUNCTION charge() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO charged VALUES (NEW.event_id, NEW.attempts); RETURN NEW; END $$"
    )
    shop.rows(
        "CREATE TRIGGER charge AFTER UPDATE ON outbox FOR EACH ROW"
        " WHEN (NEW.attempts > OLD.attempts) EXECUTE FUNCTION charge()"
    )
