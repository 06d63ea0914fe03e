"""The command ``doctor``: output, exit codes, and the checks that need a server of their own."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

from outbox_worker.database.engine import Database
from outbox_worker.diagnose.doctor.finding import Finding, Subject
from outbox_worker.diagnose.doctor.report import CHECKS
from outbox_worker.diagnose.doctor.server import connections_of
from outbox_worker.diagnose.doctor.vacuum import horizon
from outbox_worker.embedded import server as embedded
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import load_settings
from tests.support import servers
from tests.support.factories import Shop
from tests.support.premises import Premises, opened, settle_in
from tests.support.processes import eventually, finish, finish_on_terminal, start
from tests.support.sites import ROLE, Site

Found = dict[str, list[dict[str, str]]]


def examined(url: str, **settings: Any) -> Found:
    """Return the doctor's findings by check."""
    done = finish("doctor", "--json", url=url, **settings)
    assert done.code in (0, 1), done
    found = done.object
    assert found["ok"] == (done.code == 0) == all(each["verdict"] != "problem" for each in found["checks"])
    by_name: Found = {}
    for each in found["checks"]:
        assert list(each) == ["name", "verdict", "evidence", "remedy"]
        by_name.setdefault(each["name"], []).append(each)
    assert list(by_name) == list(CHECKS), "every check is told of"
    return by_name


def verdicts(found: Found) -> dict[str, str]:
    """Return the verdicts that are not ok. Each check has its worst verdict."""
    order = ("problem", "warning", "unseen", "ok")
    worst = {name: min((each["verdict"] for each in listed), key=order.index) for name, listed in found.items()}
    return {name: verdict for name, verdict in worst.items() if verdict != "ok"}


def heal(site: Site, found: list[dict[str, str]]) -> None:
    """Run the statements of the remedies."""
    for each in found:
        for statement in re.findall(r"(?:ALTER|SELECT|ROLLBACK) [^;]+;", each["remedy"]):
            site.execute(statement)


@pytest.fixture
def durable(site: Site) -> Site:
    """Return a server with ``fsync``, as a real one has."""
    site.execute("ALTER SYSTEM SET fsync = on")
    site.execute("SELECT pg_reload_conf()")
    return site


# --- the command


@pytest.fixture(scope="module")
def premises(server: servers.Server) -> Iterator[Premises]:
    with opened(server) as made:
        settle_in(made, "unique_index", "notify")
        yield made


def test_as_a_role_that_may_do_what_it_needs(premises: Premises) -> None:
    """Durability is off on a test's server.

    Nothing else is wrong, and the doctor says what it cannot see.
    """
    assert finish("backfill", url=premises.url_of("operator")).code == 0
    found = verdicts(examined(premises.url_of("worker")))
    assert {name: verdict for name, verdict in found.items() if name not in ("durability", "synchronous_commit")} == {
        "horizon": "unseen"
    }


def test_as_a_role_that_only_reads(premises: Premises) -> None:
    """The role needs only SELECT, because the doctor writes nothing.

    It does not need a worker's privileges.
    """
    found = examined(premises.url_of("reader"))
    (told,) = found["grants"]
    assert (told["verdict"], "GRANT" in told["remedy"]) == ("unseen", False)
    assert found["guard"][0]["verdict"] == "ok"


def test_all_is_well_and_nothing_is_written(durable: Site) -> None:
    url = durable.url("postgres")
    assert finish("backfill", url=url).code == 0
    with durable.connect() as connection:
        asked = "SELECT CAST(CAST(pg_current_xact_id() AS text) AS bigint)"
        first = connection.execute(asked).fetchone()
        done = finish("doctor", "--json", url=url)
        second = connection.execute(asked).fetchone()
    assert done.code == 0, done
    assert first is not None
    assert second == (first[0] + 1,), "no transaction of the doctor took an id"
    assert verdicts(examined(url)) == {"grants": "warning"}
    shown = finish_on_terminal("doctor", url=url)
    assert all(len(line) <= 80 for line in shown.splitlines()), shown
    assert "0 problems, 1 warning." in shown
    assert "\n        " in shown, "evidence is folded"
    assert re.search(r"^ +→ ", shown, re.MULTILINE), "each remedy begins a line"


def test_all_problems_are_told_and_the_code_is_1(durable: Site) -> None:
    durable.execute("DROP TABLE workers")
    durable.execute("ALTER TABLE outbox DROP COLUMN crashes")
    durable.execute("ALTER SYSTEM SET full_page_writes = off")
    durable.execute("SELECT pg_reload_conf()")
    shown = finish("doctor", url=durable.url(ROLE))
    assert shown.code == 1
    for said in ("this table is missing: public.workers", "outbox.crashes is missing", "full_page_writes"):
        assert re.search(said, shown.stdout), said
    assert "→ run `outbox-worker migrate`" in shown.stdout
    found = examined(durable.url(ROLE))
    assert found["connections"][0]["verdict"] == "unseen"
    assert "workers" in found["connections"][0]["evidence"]


def test_an_empty_database(durable: Site) -> None:
    durable.execute("CREATE DATABASE empty")
    found = verdicts(examined(durable.url("postgres").replace("/postgres?", "/empty?")))
    assert found["tables"] == "problem"
    assert found["guard"] == found["backfill"] == found["autovacuum"] == "unseen"


@pytest.mark.parametrize(
    ("code", "url", "settings"),
    [
        (69, "postgresql://127.0.0.1:1/nowhere", {}),
        (78, None, {}),
        (78, "postgresql://127.0.0.1:1/nowhere", {"batch_size": "many"}),
        (78, "no url", {}),
    ],
)
def test_how_it_ends_where_it_cannot_look(code: int, url: str | None, settings: dict[str, Any]) -> None:
    done = finish("doctor", "--json", url=url, **settings)
    assert (done.code, done.object["ok"]) == (code, False), done
    assert done.object["error"] in done.stderr
    assert "Traceback" not in done.stderr


# --- checks that need a server of their own


def test_durability(site: Site) -> None:
    url = site.url("postgres")
    found = examined(url)["durability"]
    assert [(each["verdict"], "fsync" in each["evidence"]) for each in found] == [("problem", True)]
    heal(site, found)
    eventually(lambda: examined(url)["durability"][0]["verdict"] == "ok", "it is on again")


def test_whose_commits_need_not_be_durable(durable: Site) -> None:
    url = durable.url(ROLE)
    assert examined(url)["synchronous_commit"][0]["evidence"] == "on"
    durable.execute(f"ALTER ROLE {ROLE} SET synchronous_commit = off")
    (alone,) = examined(url)["synchronous_commit"]
    assert alone["verdict"] == "ok"
    assert "this role only" in alone["evidence"]
    durable.execute(f"ALTER ROLE {ROLE} RESET synchronous_commit")
    durable.execute("ALTER DATABASE postgres SET synchronous_commit = off")
    assert examined(url)["synchronous_commit"][0]["verdict"] == "problem"


def test_autovacuum_of_the_server(durable: Site) -> None:
    url = durable.url(ROLE)
    for change in ("autovacuum = off", "autovacuum_naptime = '1s'", "autovacuum_vacuum_threshold = 0"):
        durable.execute(f"ALTER SYSTEM SET {change}")
    durable.execute("SELECT pg_reload_conf()")
    (found,) = eventually(
        lambda: [each for each in examined(url)["autovacuum"] if each["verdict"] == "problem"], "it is off"
    )
    assert "off on this server" in found["evidence"]
    with durable.connect() as connection:
        shop = Shop(connection)
        shop.pay_many(100)
        shop.rows("DELETE FROM outbox")
        heal(durable, [found])
        ran = "SELECT autovacuum_count > 0 FROM pg_stat_user_tables WHERE relname = 'outbox'"
        eventually(lambda: shop.scalar(ran), "it came by itself")
    (found,) = examined(url)["autovacuum"]
    assert found["verdict"] == "ok"
    assert not re.search("ran 0 times|never", found["evidence"])


def horizon_of(site: Site, **patience: Any) -> list[Finding]:
    """Return who holds back the vacuum. The options allow for a short time."""
    settings = load_settings(database_url=site.url("postgres"))
    database = Database(settings, deadline_seconds=10)
    try:
        with database.snapshot() as session:
            return list(horizon(Subject(session, settings, build_tables(settings), database), **patience))
    finally:
        database.close()


def test_a_prepared_transaction(durable: Site) -> None:
    durable.execute("ALTER SYSTEM SET max_prepared_transactions = 2")
    embedded.stop_server(durable.directory)
    durable.execute("BEGIN; CREATE TABLE made_in_it (); PREPARE TRANSACTION 'left''behind'")
    assert [each.verdict for each in horizon_of(durable)] == ["ok"], "not for long yet"
    (found,) = horizon_of(durable, seconds=0)
    assert found.verdict == "problem"
    assert "'left''behind' of postgres" in found.evidence
    rollback = re.search(r"ROLLBACK PREPARED [^;]+;", found.remedy)
    assert rollback is not None
    durable.execute(rollback[0])
    assert [each.verdict for each in horizon_of(durable, seconds=0)] == ["ok"]


def test_a_replication_slot_that_nobody_reads(durable: Site) -> None:
    url = durable.url("postgres")
    durable.execute("SELECT pg_create_physical_replication_slot('gone', true)")
    (found,) = examined(url)["horizon"]
    assert found["verdict"] == "warning"
    assert "'gone'" in found["evidence"]
    assert "disk" in found["evidence"]
    heal(durable, [found])
    assert examined(url)["horizon"][0]["verdict"] == "ok"


@contextmanager
def standby(site: Site, slot: str) -> Iterator[None]:
    """Read from a slot like a standby whose query needs all rows of this moment."""
    where = psycopg.conninfo.make_conninfo("", **site.start(), replication="true")
    with closing(psycopg.connect(where, autocommit=True)) as connection, site.connect() as other:
        asked = "SELECT CAST(CAST(pg_current_xact_id() AS text) AS bigint), CAST(pg_current_wal_flush_lsn() AS text)"
        ((oldest, place),) = other.execute(asked).fetchall()
        begun = connection.pgconn.exec_(f"START_REPLICATION SLOT {slot} PHYSICAL {place}".encode())
        assert begun.status == psycopg.pq.ExecStatus.COPY_BOTH, begun.error_message
        feedback = struct.pack("!cqIIII", b"h", 0, oldest, 0, 0, 0)
        connection.pgconn.put_copy_data(feedback)
        connection.pgconn.flush()
        yield


def test_a_standby_that_holds_it_back(durable: Site) -> None:
    durable.execute("SELECT pg_create_physical_replication_slot('fed', true)")
    with standby(durable, "fed"):
        held = "SELECT FROM pg_replication_slots WHERE slot_name = 'fed' AND active AND xmin IS NOT NULL"
        with durable.connect() as connection:
            eventually(lambda: connection.execute(held).fetchall(), "it holds")
            connection.execute("SELECT pg_current_xact_id()")
        assert [each.verdict for each in horizon_of(durable)] == ["ok"], "by no more than is usual"
        (found,) = horizon_of(durable, transaction_ids=0)
    assert found.verdict == "warning"
    assert re.search(r"'fed' holds back vacuum by \d+ transactions?$", found.evidence)


def test_what_one_process_holds(premises: Premises) -> None:
    """The formula gives the number of connections that a real worker opens."""
    url = premises.url_of("worker")
    settings: dict[str, Any] = {"concurrency": 3, "backfill_every_seconds": 1, "poll_max_seconds": 0.1}
    expected = sum(connections_of(load_settings(database_url=url, **settings), has_notify=True).values())
    counted = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
    with start("run", url=url, **settings) as worker, premises.shop() as shop:
        worker.wait_for("worker_started")
        seen = 0

        def grown() -> bool:
            nonlocal seen
            shop.pay_many(50)
            seen = max(seen, shop.scalar(counted, premises.names["worker"]))
            return bool(seen >= expected)

        eventually(grown, "as many as the formula says")
        for _ in range(20):
            grown()
        assert seen == expected
        worker.end_well()
