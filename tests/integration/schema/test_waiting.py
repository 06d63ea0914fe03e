"""A build that waits for an open transaction says whose transaction it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import psycopg
import pytest
from loguru import logger
from sqlalchemy import text

from outbox_worker.schema import waiting
from tests.support import servers
from tests.support.installations import Installation
from tests.support.processes import eventually

Told = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    """Return the log records of waits so far, with their messages. The looks follow fast."""
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.1)
    found: list[dict[str, Any]] = []

    def take(message: Any) -> None:
        record = message.record
        found.append({**record["extra"], "level": record["level"].name, "message": record["message"]})

    sink = logger.add(take, level="DEBUG")
    yield lambda: [record for record in found if record.get("event") == "migration_waiting"]
    logger.remove(sink)


def test_it_says_whose_transaction_it_waits_for_and_again(
    migrated: Installation, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "REPEAT_SECONDS", 0.3)
    holder = psycopg.connect(servers.libpq(migrated.url), application_name="report")
    with ThreadPoolExecutor(1) as pool, closing(holder):
        holder.execute("SELECT count(*) FROM purchases")
        holder.execute("LOCK TABLE purchases IN ROW SHARE MODE")
        pid = holder.info.backend_pid
        building = pool.submit(migrated.migrate, "unique_index")
        eventually(lambda: len(told()) > 1, "it is told, and again")
        holder.execute(str(told()[0]["message"]).partition("To see it: ")[2].partition(";")[0])
        with psycopg.connect(servers.libpq(migrated.url), autocommit=True) as other:
            other.execute(str(told()[0]["message"]).partition("end it: ")[2])
        assert building.result(timeout=30).built == ("unique_index",)
        first = told()[0]
        assert (first["pid"], first["application"], first["state"]) == (pid, "report", "idle in transaction")
        assert first["level"] == "WARNING"
        assert first["user"] == holder.info.user
        assert first["since"] is not None


def test_a_prepared_transaction_has_no_process(
    migrated: Installation, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server must be configured for prepared transactions.

    The test fakes the answer of the server.
    """
    monkeypatch.setattr(waiting, "_BLOCKERS", text(
        "SELECT 0 AS pid, CAST(NULL AS name) AS user, CAST(NULL AS text) AS application,"
        " CAST(NULL AS timestamptz) AS since, CAST(NULL AS text) AS state WHERE :pid > 0"
    ))  # fmt: skip
    with ThreadPoolExecutor(1) as pool, psycopg.connect(servers.libpq(migrated.url)) as holder:
        holder.execute("LOCK TABLE purchases IN ROW SHARE MODE")
        building = pool.submit(migrated.migrate, "unique_index")
        eventually(told, "it is told")
        holder.rollback()
        building.result(timeout=30)
    assert "pg_prepared_xacts" in told()[0]["message"]


def test_nobody_waits_and_nothing_is_told(migrated: Installation, told: Told) -> None:
    migrated.migrate("unique_index")
    assert told() == []
