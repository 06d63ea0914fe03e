"""A full disk: the worker pauses, charges no event, and goes on by itself after there is room.

The disk is a small tmpfs in a mount namespace of the server. An ordinary user can make one, too.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from outbox_worker.embedded import server as embedded
from tests.support.factories import Shop
from tests.support.processes import Given, eventually, start
from tests.support.sites import (
    ROLE,
    KeptSite,
    Site,
    endure,
    expect_calm,
    expect_exactly_once,
    expect_settled,
    kept,
    settle_some,
)

WORLD = ("unshare", "--map-root-user", "--mount", "sh", "-ec")
MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2"; cp -a "$3/." "$2"; shift 3; exec "$@"'
PATIENT: Given = {"database_deadline_seconds": 2, "poll_max_seconds": 0.2}


@dataclass
class SmallDisk:
    """The small disk as seen from outside, through the root of the process that mounted it."""

    path: Path

    def fill(self) -> None:
        """Fill the disk to the last byte."""
        with (self.path / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(65536))

    def make_room(self) -> None:
        (self.path / "filler").unlink()


@contextmanager
def on_small_disk(site: Site, size: str, contents: Path) -> Iterator[tuple[KeptSite, SmallDisk]]:
    """Start the server of ``site`` again.

    The directory ``small`` is a disk of that size with these contents.
    """
    embedded.stop_server(site.directory)
    small = site.directory / "small"
    small.mkdir()
    with kept(site, *WORLD, MOUNT, "sh", size, str(small), str(contents)) as server:
        yield server, SmallDisk(Path(f"/proc/{server.keeper.pid}/root{small}"))


@pytest.fixture(autouse=True)
def _needs_mounts(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "trial").mkdir()
    command = [*WORLD, MOUNT, "sh", "1m", str(tmp_path / "trial"), str(tmp_path / "nothing"), "true"]
    if shutil.which("unshare") is None or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody make a small disk (unshare --map-root-user --mount)")


def move_tables(site: Site) -> None:
    """Move the tables that the worker writes to the small disk. Those of producers stay."""
    small = site.directory / "small"
    with site.connect() as connection:
        connection.execute(f"CREATE TABLESPACE small LOCATION '{small}/tables'")
        for table in ("purchases", "processed_events"):
            connection.execute(f"ALTER TABLE {table} SET TABLESPACE small")
            indexes = connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = %s", [table])
            for (index,) in indexes.fetchall():
                connection.execute(f"ALTER INDEX {index} SET TABLESPACE small")


def test_tables_that_cannot_grow(site: Site, tmp_path: Path) -> None:
    """SQLSTATE 53100: the whole batch waits until there is room again."""
    events = 5000
    (tmp_path / "contents" / "tables").mkdir(parents=True)
    with on_small_disk(site, "16m", tmp_path / "contents") as (server, disk):
        move_tables(server)
        with server.connect() as connection, start("run", url=server.url(ROLE), **PATIENT) as worker:
            shop = Shop(connection)
            worker.wait_for("worker_started")
            settle_some(server)
            disk.fill()
            begin = time.monotonic()
            shop.pay_many(events)
            endure(worker)
            pauses = worker.told("paused")
            assert {(told["failure"], told["level"]) for told in pauses} == {("pause", "ERROR")}
            assert all("SQLSTATE 53100" in told["error"] for told in pauses)
            assert shop.count("outbox") > 0
            assert shop.rows("SELECT id FROM outbox WHERE attempts > 0") == []
            disk.make_room()
            expect_settled(shop)
            seconds = time.monotonic() - begin
            worker.end_well()
            expect_exactly_once(shop)
            assert shop.count("purchases") == 20 + events
            assert shop.counted('outbox_database_errors_total{class="pause"}') >= 4
            expect_calm(shop, seconds, worker)


def test_a_write_ahead_log_that_cannot_grow(site: Site, tmp_path: Path) -> None:
    """The server panics. It cannot even recover before there is room."""
    site.execute("ALTER SYSTEM SET max_wal_size = '32MB'")
    site.execute("ALTER SYSTEM SET min_wal_size = '32MB'")
    embedded.stop_server(site.directory)
    log = site.directory / "data" / "pg_wal"
    (tmp_path / "contents").mkdir()
    shutil.move(log, tmp_path / "contents" / "log")
    log.symlink_to(site.directory / "small" / "log")
    with on_small_disk(site, "192m", tmp_path / "contents") as (server, disk):
        with start("run", url=server.url(ROLE), **PATIENT) as worker:
            worker.wait_for("worker_started")
            settle_some(server)
            disk.fill()
            begin = time.monotonic()
            acknowledged = pay_until_it_breaks(server)
            endure(worker)
            assert "PANIC" in server.log()
            eventually(lambda: server.log().count("No space left on device") > 1, "it cannot even recover")
            disk.make_room()
            settle_some(server)
            seconds = time.monotonic() - begin
            worker.end_well()
            assert {told["failure"] for told in worker.told("paused")} == {"reconnect"}
        with server.connect() as connection:
            shop = Shop(connection)
            assert shop.count("payments") >= 40 + acknowledged
            expect_exactly_once(shop)
            expect_calm(shop, seconds, worker)


def pay_until_it_breaks(server: Site) -> int:
    """Return how many payments were acknowledged before the server was gone."""
    paid = 0
    with suppress(psycopg.OperationalError), server.connect() as connection:
        shop = Shop(connection)
        while True:
            shop.pay_many(20)
            paid += 20
            shop.rows("SELECT pg_switch_wal()")
    return paid
