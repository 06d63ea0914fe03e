"""Logs which transactions a migration waits for.

CREATE INDEX CONCURRENTLY waits until all older transactions have ended. A migration can therefore
take long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from loguru import logger
from sqlalchemy import Connection, Engine, Row, text
from sqlalchemy.exc import DBAPIError

LOOK_SECONDS = 2.0
"""The seconds before the first check, and between two checks.

The watching thread does not log most short waits.
"""
REPEAT_SECONDS = 30.0

# what: the transactions for which a session waits. An ordinary role cannot see the state and times
# of sessions of other roles. A prepared transaction has process 0 · lock: none
# index: none, a function of the server
_BLOCKERS = text(
    """
    SELECT b.pid, a.usename AS user, a.application_name AS application, a.xact_start AS since, a.state
    FROM unnest(pg_blocking_pids(:pid)) AS b (pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid
    WHERE b.pid <> pg_backend_pid()
    GROUP BY b.pid, a.usename, a.application_name, a.xact_start, a.state ORDER BY b.pid
    """
)


@contextmanager
def telling_waits(engine: Engine, connection: Connection) -> Iterator[None]:
    """Log which transactions ``connection`` waits for inside the ``with`` block.

    A second thread finds and logs these transactions over another connection.
    """
    pid = connection.scalar(text("SELECT pg_backend_pid()"))
    connection.rollback()
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(engine, pid, done), name="migration-waits", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def _watch(engine: Engine, pid: int, done: threading.Event) -> None:
    """Log each blocking transaction when found, and again every ``REPEAT_SECONDS``.

    Ignore a check that raises a database error.
    """
    logged_at: dict[int, float] = {}
    while not done.wait(LOOK_SECONDS):
        with suppress(DBAPIError):
            for blocker in _blockers(engine, pid):
                now = time.monotonic()
                if now - logged_at.get(blocker.pid, -REPEAT_SECONDS) >= REPEAT_SECONDS:
                    logged_at[blocker.pid] = now
                    _log(blocker)


def _blockers(engine: Engine, pid: int) -> list[Row[Any]]:
    """Return the transactions for which the migration waits.

    End the transaction of this query at once. The migration would also wait for this transaction.
    """
    with engine.connect() as connection:
        return [*connection.execute(_BLOCKERS, {"pid": pid})]


def _log(blocker: Row[Any]) -> None:
    since = blocker.since and blocker.since.isoformat(timespec="seconds")
    logger.bind(
        event="migration_waiting",
        pid=blocker.pid,
        user=blocker.user,
        application=blocker.application,
        since=since,
        state=blocker.state,
    ).warning("the migration waits until {}", _described(blocker, since))


def _described(blocker: Row[Any], since: str | None) -> str:
    if blocker.pid == 0:
        return "a prepared transaction ends. To see it: TABLE pg_prepared_xacts"
    return (
        f"a transaction of process {blocker.pid} ends (user {blocker.user}, application {blocker.application or '?'}, "
        f"{blocker.state or 'state hidden'}, open since {since or 'a time that is hidden'}). "
        f"To see it: TABLE pg_stat_activity; to end it: SELECT pg_terminate_backend({blocker.pid})"
    )
