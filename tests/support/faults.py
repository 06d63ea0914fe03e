"""Faults between a worker and its server, as context managers. Entering causes the fault, leaving
repairs it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import psycopg

from tests.support.factories import Shop
from tests.support.processes import Given, eventually
from tests.support.sites import ROLE, Site

DEADLINE = 2


NO_PLACE = "too many clients|slots are reserved"


GUESTS_HOLD_ALL = """
    SELECT count(*) = current_setting('max_connections')::integer
        - current_setting('superuser_reserved_connections')::integer
        - coalesce(current_setting('reserved_connections', true), '0')::integer - 1
    FROM pg_stat_activity WHERE usename = 'guest'
"""
"""The 1 is this connection. A worker that is just connecting uses a connection before it has a user
name."""


PATIENT: Given = {"database_deadline_seconds": DEADLINE, "poll_max_seconds": 0.2, "retry_base_seconds": 0.5}


# --- faults: entering causes the fault, leaving repairs it


@contextmanager
def stopped(site: Site, number: int) -> Iterator[None]:
    site.signal(number)
    yield
    site.start()


@contextmanager
def backend_killed(site: Site) -> Iterator[None]:
    """Kill a backend. The postmaster then ends all sessions and recovers."""
    with site.connect() as connection:
        os.kill(eventually(lambda: site.backends(connection), "a backend")[0], signal.SIGKILL)
    yield


@contextmanager
def thrown_out(site: Site) -> Iterator[None]:
    site.throw_out()
    yield


@contextmanager
def refused(site: Site, how: str, mended: str) -> Iterator[None]:
    """Alter the worker's role with ``how``, and end its sessions. At the end, alter the role with
    ``mended``."""
    site.execute(f"ALTER ROLE {ROLE} {how}")
    site.throw_out()
    pay(site)
    yield
    site.execute(f"ALTER ROLE {ROLE} {mended}")


@contextmanager
def crowded(site: Site) -> Iterator[None]:
    """Let other sessions use every connection that the server has for ordinary roles."""
    site.execute("CREATE ROLE guest LOGIN")
    with site.connect() as own, ExitStack() as guests:

        def is_full() -> bool:
            site.throw_out()
            fill(site, guests)
            return bool(Shop(own).scalar(GUESTS_HOLD_ALL))

        eventually(is_full, "no place is left")
        Shop(own).pay_many(1)
        yield


@contextmanager
def held(site: Site, table: str) -> Iterator[None]:
    """Lock a table, like DDL of another session, for longer than any statement waits."""
    with site.connect() as other, other.transaction():
        other.execute(f"LOCK TABLE {table}")
        if table != "outbox":
            pay(site)
        yield


@contextmanager
def changed(site: Site, how: str, mended: str) -> Iterator[None]:
    site.execute(how)
    pay(site)
    yield
    site.execute(mended)


def fill(site: Site, guests: ExitStack) -> None:
    """Open connections until none is left for ordinary roles. The reserved connections of
    superusers stay free."""
    where = site.start() | {"user": "guest"}
    try:
        while True:
            guests.enter_context(psycopg.connect(**where))  # type: ignore[arg-type]
    except psycopg.OperationalError as error:
        if not re.search(NO_PLACE, str(error)):
            raise


def pay(site: Site) -> None:
    with site.connect() as connection:
        Shop(connection).pay_many(1)


Fault = Callable[[Site], AbstractContextManager[None]]


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "fast_stop": (partial(stopped, number=signal.SIGINT), "reconnect", ""),
    "immediate_stop": (partial(stopped, number=signal.SIGQUIT), "reconnect", ""),
    "backend_killed": (backend_killed, "reconnect", ""),
    "thrown_out": (thrown_out, "reconnect", ""),
    "connection_limit": (
        partial(refused, how="CONNECTION LIMIT 0", mended="CONNECTION LIMIT -1"),
        "reconnect",
        "too many connections for role",
    ),
    "no_login": (partial(refused, how="NOLOGIN", mended="LOGIN"), "reconnect", "not permitted to log in"),
    "too_many_connections": (crowded, "reconnect", NO_PLACE),
    "purchases_held": (partial(held, table="purchases"), "retry", "55P03"),
    "marks_held": (partial(held, table="processed_events"), "retry", "55P03"),
    "outbox_held": (partial(held, table="outbox"), "retry", "55P03"),
    "privilege_revoked": (
        partial(
            changed,
            how=f"REVOKE INSERT ON purchases FROM {ROLE}",
            mended=f"GRANT INSERT ON purchases TO {ROLE}",
        ),
        "unclear",
        "42501",
    ),
    "table_lost": (
        partial(
            changed,
            how="ALTER TABLE processed_events RENAME TO elsewhere",
            mended="ALTER TABLE elsewhere RENAME TO processed_events",
        ),
        "unclear",
        "42P01",
    ),
}
"""Each fault has the class of failure and the text that the log must show."""
