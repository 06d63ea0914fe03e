"""Checks the server and the connection: version, durability, time-outs, clocks, poolers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from outbox_worker.database.encodings import SQL_ASCII
from outbox_worker.database.engine import APPLICATION_NAME
from outbox_worker.database.sessions import find_read_only_default, find_standby
from outbox_worker.diagnose.doctor.finding import Finding, Subject, ok, problem, unseen, warning
from outbox_worker.diagnose.status import condition
from outbox_worker.durations import ago, count_of
from outbox_worker.schema.catalogue import notifies
from outbox_worker.settings import Settings
from outbox_worker.store.workers import list_workers

_TRIED = range(15, 19)
"""The major versions of PostgreSQL that the tests run on."""
_ROUNDS = 5
_CLOCK_SECONDS = 1.0
_IDLE_SECONDS = 600.0
"""An ``idle_session_timeout`` of at least this many seconds is harmless. With a shorter time-out,
the server closes connections that wait for events."""
_OF_ONE_ROLE = ("user", "database user", "client", "session")
"""The values of ``pg_settings.source`` for a parameter that is set for one role only."""
_OF_ANOTHER_ROLE = (
    "not checked, because the parameter is set for this role, which is not the worker's",
    "run doctor as the worker's role, with that role's URL in OUTBOX_DATABASE_URL",
)

# what: version, database and role of the session · lock: none
_SERVER = text(
    "SELECT current_setting('server_version') AS version, CAST(current_setting('server_version_num') AS int) / 10000"
    " AS major, current_database() AS database, current_user AS role"
)

# what: parameters, with the values that a new session of this role gets · lock: none
_PARAMETERS = text(
    "SELECT CAST(name AS text), reset_val, source FROM pg_settings WHERE name = ANY(CAST(:names AS text[]))"
)

# what: how many connections are allowed, and how many connections other clients use · lock: none
# index: the catalogue's indexes
_CONNECTIONS = text(
    """
    SELECT CAST(current_setting('max_connections') AS int) AS most,
           CAST(current_setting('superuser_reserved_connections') AS int)
           + CAST(coalesce(current_setting('reserved_connections', true), '0') AS int) AS reserved,
           (SELECT count(*) FROM pg_stat_activity WHERE usesysid IS NOT NULL AND datid IS NOT NULL
            AND NOT (application_name = :name AND datname = current_database())) AS others,
           (SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS of_database,
           (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS of_role
    """
)

_ENCODING = text("SELECT current_setting('server_encoding')")
_DATABASE = text("SELECT quote_ident(current_database())")
_BACKEND = text("SELECT pg_backend_pid()")
_CLOCK = text("SELECT date_part('epoch', clock_timestamp())")


@dataclass(frozen=True, slots=True)
class _Parameter:
    value: str
    source: str

    @property
    def is_of_one_role(self) -> bool:
        return self.source in _OF_ONE_ROLE


def server(subject: Subject) -> Iterator[Finding]:
    """Check whether the tests of the worker run on this version of PostgreSQL."""
    row = subject.session.execute(_SERVER).one()
    evidence = f"PostgreSQL {row.version}, database {row.database}, role {row.role}"
    if standby := find_standby(subject.session):
        behind = "" if standby.behind_seconds is None else f", at most {ago(standby.behind_seconds)} behind the primary"
        yield warning(
            f"this server is a standby{behind}: a worker cannot run on it", "give workers the URL of the primary"
        )
    if row.major < _TRIED.start:
        yield problem(evidence, f"upgrade to PostgreSQL {_TRIED.start} or newer")
    elif row.major not in _TRIED:
        yield warning(f"{evidence}; the newest tested version is {_TRIED.stop - 1}", "watch the worker for a few days")
    else:
        yield ok(evidence)


def read_only(subject: Subject) -> Iterator[Finding]:
    """Check whether sessions of this role are read-only by default (docs/explanation/decisions/032)."""
    found = find_read_only_default(subject.session)
    if found is None:
        yield ok("sessions are not read-only by default")
    elif not subject.is_of_a_worker():
        yield ok(f"default_transaction_read_only is on {found.place}, which is right for a role that only looks")
    else:
        yield warning(
            f"default_transaction_read_only is on {found.place}: the worker overrides it in each of its transactions, "
            "but commands that write refuse to run",
            found.remedy,
        )


def durability(subject: Subject) -> Iterator[Finding]:
    """Check whether committed transactions survive a crash of the machine."""
    parameters = _parameters(subject, "fsync", "full_page_writes")
    off = [name for name, parameter in sorted(parameters.items()) if parameter.value == "off"]
    for name in off:
        yield problem(
            f"{name} is off: if the machine crashes, the database can be corrupted",
            f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf();",
        )
    if not off:
        yield ok("fsync and full_page_writes are on")


def encoding(subject: Subject) -> Iterator[Finding]:
    """Check whether the database can store all characters and guarantees readable texts."""
    name: str = subject.session.scalars(_ENCODING).one()
    if name == SQL_ASCII:
        yield warning(
            "the encoding of the database is SQL_ASCII, so its texts may contain bytes that are not UTF8; commands and "
            "logs show such a byte as an escape, for example \\xe9",
            "move the data to a new database with the encoding UTF8 (createdb --encoding=UTF8 --template=template0)",
        )
    elif name != "UTF8":
        yield ok(f"{name}; the server converts texts, but cannot store characters that {name} lacks")
    else:
        yield ok(name)


def synchronous_commit(subject: Subject) -> Iterator[Finding]:
    """Check whether ``synchronous_commit`` is off.

    The parameter must be on for all roles except the worker's (docs/explanation/decisions/010).
    """
    found = _parameters(subject, "synchronous_commit")["synchronous_commit"]
    if found.is_of_one_role and not subject.is_of_a_worker():
        yield unseen(*_OF_ANOTHER_ROLE)
    elif found.value != "off":
        yield ok(found.value)
    elif found.is_of_one_role:
        yield ok("off for this role only: a crash can undo the last batches, but then their events are settled again")
    else:
        yield problem(
            f"off for all roles (source: {found.source}): a crash can undo payments that were confirmed to customers",
            "set synchronous_commit to on for server and database; off is safe only for the worker's role "
            "(docs/explanation/decisions/010)",
        )


def time_outs(subject: Subject) -> Iterator[Finding]:
    """Check ``transaction_timeout`` and ``idle_session_timeout`` of the role's sessions.

    The worker itself sets all other time-outs in each transaction.
    """
    parameters = _parameters(subject, "transaction_timeout", "idle_session_timeout")
    if not subject.is_of_a_worker() and any(parameter.is_of_one_role for parameter in parameters.values()):
        yield unseen(*_OF_ANOTHER_ROLE)
        return
    seconds = {name: int(parameter.value) / 1000 for name, parameter in parameters.items()}
    deadline = subject.settings.database_deadline_seconds
    whole, idle = seconds.get("transaction_timeout", 0), seconds.get("idle_session_timeout", 0)
    if whole > 0:
        say = problem if whole <= deadline else warning
        yield say(
            f"transaction_timeout is {whole:g} s: the server aborts batches and index builds that take longer",
            f"ALTER ROLE {subject.role} SET transaction_timeout = 0; -- the worker limits its own transactions",
        )
    if 0 < idle < _IDLE_SECONDS:
        yield warning(
            f"idle_session_timeout is {idle:g} s: the server closes idle connections, and the worker must reconnect",
            f"ALTER ROLE {subject.role} SET idle_session_timeout = 0;",
        )
    if not whole and not 0 < idle < _IDLE_SECONDS:
        yield ok("no harmful time-out is set; the worker itself sets those for statements, locks and idle transactions")


def clock(subject: Subject, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Compare the clock of this machine with the clock of the database.

    Only the clock of the database decides which events are due.
    """
    rounds = [_compare(subject, now) for _ in range(_ROUNDS)]
    difference, uncertainty = min(rounds, key=lambda each: each[1])
    evidence = (
        f"this machine is {abs(difference):.3f} s {'behind' if difference > 0 else 'ahead'}, ± {uncertainty:.3f} s"
    )
    if abs(difference) - uncertainty > _CLOCK_SECONDS:
        yield warning(f"{evidence}; times in logs do not match times in the database", "synchronise both clocks by NTP")
    else:
        yield ok(evidence)


def _compare(subject: Subject, now: Callable[[], float]) -> tuple[float, float]:
    """Return how many seconds the clock of the database is ahead, and the uncertainty.

    The uncertainty is half the duration of the query.
    """
    before = now()
    there: float = subject.session.scalars(_CLOCK).one()
    after = now()
    return there - (before + after) / 2, (after - before) / 2


def connections_of(settings: Settings, *, has_notify: bool) -> dict[str, int]:
    """Return how many connections one worker process opens at most, for each purpose.

    ``has_notify``: whether the outbox has the trigger of the option ``notify``.
    """
    listens = has_notify and (settings.pooler == "none" or settings.listen_conninfo is not None)
    return {
        "for claims": settings.concurrency,
        "for chores": 1,
        "for backfills": int(settings.backfill_every_seconds > 0),
        "to listen": int(listens),
    }


def connections(subject: Subject) -> Iterator[Finding]:
    """Check whether the server allows enough connections for all workers.

    During a deployment, twice as many workers can run.
    """
    row = subject.session.execute(_CONNECTIONS, {"name": APPLICATION_NAME}).one()
    workers = max(1, sum(condition(each) == "running" for each in list_workers(subject.session, subject.tables)))
    of_one = connections_of(subject.settings, has_notify=notifies(subject.session, subject.tables.outbox))
    needed = workers * sum(of_one.values())
    of_role = row.of_role if subject.is_of_a_worker() else -1
    limits = [row.most - row.reserved - row.others, *(limit for limit in (row.of_database, of_role) if limit >= 0)]
    room = min(limits)
    formula = " + ".join(f"{count} {name}" for name, count in of_one.items())
    evidence = (
        f"{count_of(workers, 'worker')} x ({formula}) = {needed} needed; max_connections {row.most}"
        f" - {row.reserved} reserved - {row.others} of others"
        + (f"; CONNECTION LIMIT allows {room} in all" if room < limits[0] else "")
    )
    if subject.settings.pooler == "transaction":
        yield ok(f"{evidence}; the pooler needs fewer connections to the server")
    elif needed > room:
        more = _more_connections(subject, room, limits[0], of_role)
        yield problem(f"{evidence}: not enough", f"run fewer workers, lower OUTBOX_CONCURRENCY, add a pooler or {more}")
    elif 2 * needed > room:
        more = _more_connections(subject, room, limits[0], of_role)
        yield warning(f"{evidence}: not enough to start new workers before the old ones end", more)
    else:
        yield ok(evidence)


def _more_connections(subject: Subject, room: int, of_server: int, of_role: int) -> str:
    """Return the remedy that raises the lowest limit of connections."""
    if room == of_server:
        return "raise max_connections"
    if room == of_role:
        return f"ALTER ROLE {subject.role} CONNECTION LIMIT -1;"
    return f"ALTER DATABASE {subject.session.scalar(_DATABASE)} CONNECTION LIMIT -1;"


def pooler(subject: Subject) -> Iterator[Finding]:
    """Check whether a pooler is in use, and whether each session keeps its own backend.

    A backend is a process of the server. A pooler reports an invented process id to its clients. In
    transaction mode, several connected clients can share one backend.
    """
    subject.session.rollback()  # ends the transaction; a pooler can now share the backend
    engine = subject.database.engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as first:
        pid: int = first.scalars(_BACKEND).one()
        is_between = pid != _told_pid(first)
        held = subject.session.scalars(_BACKEND).one() if is_between else 0
        is_shared = is_between and (held == pid or first.scalars(_BACKEND).one() != pid)
    yield _judge_pooler(subject.settings.pooler == "transaction", is_between, is_shared)


def _told_pid(connection: Connection) -> int:
    driver: Any = connection.connection.driver_connection
    return int(driver.info.backend_pid)


def _judge_pooler(is_set: bool, is_between: bool, is_shared: bool) -> Finding:
    if is_shared and is_set:
        return ok("a pooler in transaction mode; OUTBOX_POOLER is set to transaction, which is right")
    if is_shared:
        return problem(
            "a pooler in transaction mode, but OUTBOX_POOLER is not set to transaction: prepared statements fail, and "
            "LISTEN receives nothing",
            "set OUTBOX_POOLER=transaction, and OUTBOX_LISTEN_DATABASE_URL to a URL that bypasses the pooler",
        )
    if is_set and not is_between:
        return warning(
            "no pooler, but OUTBOX_POOLER is transaction, so no statements are prepared", "unset OUTBOX_POOLER"
        )
    if is_between:
        return ok("a pooler, probably in session mode, because each session kept its backend")
    return ok("no pooler")


def _parameters(subject: Subject, *names: str) -> dict[str, _Parameter]:
    """Return the values of these parameters. Leave out parameters that this version of PostgreSQL does not have."""
    rows = subject.session.execute(_PARAMETERS, {"names": list(names)})
    return {name: _Parameter(value, source) for name, value, source in rows}
