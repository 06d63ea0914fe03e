"""A server that stops, crashes, throws everybody out or refuses: the worker resumes alone and charges nobody."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from factories import Shop
from processes import Process, eventually, start
from sqlalchemy import URL

from outbox_worker import embedded, migration
from outbox_worker.database import Database
from outbox_worker.schema import build_tables
from outbox_worker.settings import load_settings

DEADLINE = 2
TROUBLE_SECONDS = 3.0
ROLE = "clerk"


@dataclass
class Site:
    """A PostgreSQL of this test's own, which may be broken; workers come as a role that is not its owner's."""

    directory: Path
    bin_dir: Path | None

    def start(self) -> dict[str, str]:
        return embedded.ensure_server(self.directory, bin_dir=self.bin_dir)

    def url(self, role: str) -> str:
        where = self.start()
        query = {"host": where["host"], "port": where["port"]}
        url = URL.create("postgresql+psycopg", username=role, database=where["dbname"], query=query)
        return url.render_as_string(hide_password=False)

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(**self.start(), autocommit=True)

    def execute(self, statement: str) -> None:
        with self.connect() as connection:
            connection.execute(statement)

    def signal(self, number: int) -> None:
        """To the postmaster: SIGINT is a fast stop, SIGQUIT an immediate one."""
        pid = int((self.directory / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, number)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "the postmaster is gone")

    def backends(self, connection: psycopg.Connection[Any]) -> list[int]:
        query = "SELECT pid FROM pg_stat_activity WHERE usename = %s"
        return [pid for (pid,) in connection.execute(query, [ROLE])]

    def throw_out(self) -> None:
        with self.connect() as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [ROLE])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    given = os.environ.get("OUTBOX_TEST_PG_BIN")
    made = Site(tmp_path / "pg", Path(given) if given else None)
    settings = load_settings(database_url=made.url("postgres"))
    database = Database(settings, deadline_seconds=None)
    migration.upgrade(database, settings, build_tables(settings), ["unique_index"])
    database.close()
    made.execute(f"CREATE ROLE {ROLE} LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}")
    yield made
    embedded.stop_server(made.directory)


def stop_fast(site: Site) -> None:
    site.signal(signal.SIGINT)


def stop_at_once(site: Site) -> None:
    site.signal(signal.SIGQUIT)


def kill_a_backend(site: Site) -> None:
    """The postmaster throws everybody out and recovers."""
    with site.connect() as connection:
        os.kill(eventually(lambda: site.backends(connection), "a backend")[0], signal.SIGKILL)


def terminate(site: Site) -> None:
    site.throw_out()


def admit_nobody(site: Site) -> None:
    site.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT 0")
    site.throw_out()


def refuse_to_log_in(site: Site) -> None:
    site.execute(f"ALTER ROLE {ROLE} NOLOGIN")
    site.throw_out()


def become_read_only(site: Site) -> None:
    site.execute(f"ALTER ROLE {ROLE} SET default_transaction_read_only = on")
    site.throw_out()


def revoke(site: Site) -> None:
    site.execute(f"REVOKE INSERT ON purchases FROM {ROLE}")


def lose_a_table(site: Site) -> None:
    site.execute("ALTER TABLE processed_events RENAME TO elsewhere")


REPAIRS = {
    admit_nobody: f"ALTER ROLE {ROLE} CONNECTION LIMIT -1",
    refuse_to_log_in: f"ALTER ROLE {ROLE} LOGIN",
    become_read_only: f"ALTER ROLE {ROLE} RESET default_transaction_read_only",
    revoke: f"GRANT INSERT ON purchases TO {ROLE}",
    lose_a_table: "ALTER TABLE elsewhere RENAME TO processed_events",
}
PAY = """
    WITH paid AS (
        INSERT INTO payments (student_id, course_id, amount, currency, status)
        VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'EUR', 'succeeded') RETURNING id
    )
    INSERT INTO outbox (event_id, event_type, payload)
    SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', jsonb_build_object('payment_id', id) FROM paid
"""
FAULTS = (stop_fast, stop_at_once, kill_a_backend, terminate, *REPAIRS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_it_resumes_alone_and_charges_nobody(fault: Callable[[Site], None], site: Site) -> None:
    with start("run", url=site.url(ROLE), database_deadline_seconds=DEADLINE, poll_max_seconds=0.2) as worker:
        worker.wait_for("worker_started")
        settle_some(site)
        begin = time.monotonic()
        fault(site)
        if fault in REPAIRS:
            site.execute(PAY)
        threading.Event().wait(TROUBLE_SECONDS)
        site.start()
        if fault in (revoke, lose_a_table):
            assert worker.wait_for("schema_problems")["level"] == "ERROR"
        if fault in REPAIRS:
            site.execute(REPAIRS[fault])
        settle_some(site)
        spun = [record for record in worker.records if record.get("event") == "paused"]
        seconds = time.monotonic() - begin
        assert len(spun) <= 6 + 2 * seconds, "pauses double from a tenth of a second on"
        expect_told(worker, fault)
        worker.signal()
        assert worker.wait() == 0
    with site.connect() as connection:
        shop = Shop(connection)
        assert shop.count("purchases") == shop.count("processed_events") == shop.count("payments")
        assert shop.count("payments") == 40 + (fault in REPAIRS)
        assert shop.count("dead_letters") == 0


def settle_some(site: Site) -> None:
    """Twenty more events: settled, none of them ever charged."""
    with site.connect() as connection:
        shop = Shop(connection)
        shop.pay_many(20)
        charged: list[Any] = []

        def done() -> bool:
            charged.extend(shop.rows("SELECT id FROM outbox WHERE attempts > 0"))
            return shop.count("outbox") == 0

        eventually(done, "all is settled")
        assert charged == []


def expect_told(worker: Process, fault: Callable[[Site], None]) -> None:
    """The operator was told what kind of trouble it was; a connection that was replaced in time is no trouble."""
    told = {record["failure"] for record in worker.records if record.get("event") == "paused"}
    expected = {
        admit_nobody: {"pause", "reconnect"},
        refuse_to_log_in: {"pause", "reconnect"},
        become_read_only: {"reconnect"},
        revoke: {"unclear"},
        lose_a_table: {"unclear"},
    }
    assert told <= expected.get(fault, {"reconnect"}), told


def test_a_zombie_writes_nothing(
    database_url: str, shop: Shop, connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """Stopped in its transaction for longer than the server allows, while another settles its events."""
    shop.rows(
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock_shared(4242); RETURN NEW; END $$"
    )
    shop.rows("CREATE TRIGGER gate BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION wait()")
    holder = connect(autocommit=True)
    holder.execute("SELECT pg_advisory_lock(4242)")
    shop.pay_many(10)
    with start("run", url=database_url, database_deadline_seconds=DEADLINE) as zombie:
        at_the_gate = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4242 AND NOT granted"
        eventually(lambda: shop.scalar(at_the_gate), "it came to the gate")
        zombie.signal(signal.SIGSTOP)
        holder.execute("SELECT pg_advisory_unlock(4242)")
        with start("run", url=database_url, poll_max_seconds=0.2) as other:
            other.wait_for("worker_started")
            eventually(lambda: shop.count("outbox") == 0, "the other one settles them", patience=DEADLINE + 30)
            before = shop.rows("SELECT * FROM purchases ORDER BY id"), shop.rows("SELECT * FROM processed_events")
            zombie.signal(signal.SIGCONT)
            zombie.wait_for("paused", failure="reconnect")
            assert before[0] == shop.rows("SELECT * FROM purchases ORDER BY id")
            assert before[1] == shop.rows("SELECT * FROM processed_events")
            shop.pay_many(5)
            eventually(lambda: shop.count("outbox") == 0, "both go on")
        zombie.signal()
        assert zombie.wait() == 0
    assert shop.count("purchases") == 15
    assert shop.doubled() == 0
    assert shop.count("dead_letters") == 0
