"""The server and the way to it: version, durability, connections, time-outs, clocks, poolers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from outbox_worker.database.engine import APPLICATION_NAME
from outbox_worker.diagnose.doctor.finding import Finding, Subject, ok, problem, warning
from outbox_worker.diagnose.status import condition
from outbox_worker.schema.catalogue import notifies
from outbox_worker.settings import Settings
from outbox_worker.store.workers import list_workers

_TRIED = range(15, 19)
"""Majors of PostgreSQL that the tests run on."""
_ROUNDS = 5
_CLOCK_SECONDS = 1.0
_IDLE_SECONDS = 600.0
"""A shorter idle_session_timeout ends connections that rest between two events."""
_OF_ONE_ROLE = ("user", "database user", "client", "session")
"""Sources of a parameter that leave everybody else's alone."""

# what: which server this is, and as whom we came · lock: none
_SERVER = text(
    "SELECT current_setting('server_version') AS version, CAST(current_setting('server_version_num') AS int) / 10000"
    " AS major, current_database() AS database, current_user AS role"
)

# what: parameters as a session of this role finds them, whatever is set inside this transaction · lock: none
_PARAMETERS = text(
    "SELECT CAST(name AS text), reset_val, source FROM pg_settings WHERE name = ANY(CAST(:names AS text[]))"
)

# what: how many connections there may be, and who has them · lock: none · index: the catalogue's own
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
    """Whether it is one that the worker was tried on."""
    row = subject.session.execute(_SERVER).one()
    evidence = f"PostgreSQL {row.version}, database {row.database}, role {row.role}"
    if row.major < _TRIED.start:
        yield problem(evidence, f"upgrade to PostgreSQL {_TRIED.start} or newer")
    elif row.major not in _TRIED:
        yield warning(f"{evidence}; the newest tried is {_TRIED.stop - 1}", "watch the first days")
    else:
        yield ok(evidence)


def durability(subject: Subject) -> Iterator[Finding]:
    """A COMMIT that was answered must survive a crash of the machine."""
    parameters = _parameters(subject, "fsync", "full_page_writes")
    off = [name for name, parameter in sorted(parameters.items()) if parameter.value == "off"]
    for name in off:
        yield problem(
            f"{name} is off: a crash of the machine can destroy the database",
            f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf();",
        )
    if not off:
        yield ok("fsync and full_page_writes are on")


def synchronous_commit(subject: Subject) -> Iterator[Finding]:
    """Off is safe for a worker's role and nobody else's (docs/explanation/decisions/010)."""
    found = _parameters(subject, "synchronous_commit")["synchronous_commit"]
    if found.value != "off":
        yield ok(found.value)
    elif found.is_of_one_role:
        yield ok("off for this role alone: purchases can be seen a moment before they are durable; none is lost")
    else:
        yield problem(
            f"off for everybody (source: {found.source}): a crash can take back payments that were acknowledged",
            "set it on for server and database; off is safe for the worker's role (docs/explanation/decisions/010)",
        )


def time_outs(subject: Subject) -> Iterator[Finding]:
    """Those of the session that the worker does not set anew in each transaction."""
    parameters = _parameters(subject, "transaction_timeout", "idle_session_timeout")
    seconds = {name: int(parameter.value) / 1000 for name, parameter in parameters.items()}
    deadline = subject.settings.database_deadline_seconds
    whole, idle = seconds.get("transaction_timeout", 0), seconds.get("idle_session_timeout", 0)
    if whole > 0:
        say = problem if whole <= deadline else warning
        yield say(
            f"transaction_timeout is {whole:g} s: it ends batches, and building an index, in the middle",
            f"ALTER ROLE {subject.role} SET transaction_timeout = 0; the worker bounds its transactions itself",
        )
    if 0 < idle < _IDLE_SECONDS:
        yield warning(
            f"idle_session_timeout is {idle:g} s: connections that rest are ended, and made again at the next event",
            f"ALTER ROLE {subject.role} SET idle_session_timeout = 0;",
        )
    if not whole and not 0 < idle < _IDLE_SECONDS:
        yield ok("none that hurts: those of statements, locks and idle transactions are set by the worker itself")


def clock(subject: Subject, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """This machine's against the database's, which alone says what is due."""
    rounds = [_compare(subject, now) for _ in range(_ROUNDS)]
    difference, uncertainty = min(rounds, key=lambda each: each[1])
    evidence = (
        f"this machine is {abs(difference):.3f} s {'behind' if difference > 0 else 'ahead'}, ± {uncertainty:.3f} s"
    )
    if abs(difference) - uncertainty > _CLOCK_SECONDS:
        yield warning(
            f"{evidence}: times in logs and in the database do not agree", "have both set their clocks by NTP"
        )
    else:
        yield ok(evidence)


def _compare(subject: Subject, now: Callable[[], float]) -> tuple[float, float]:
    """How far the database is ahead, and half the time of asking."""
    before = now()
    there: float = subject.session.scalars(_CLOCK).one()
    after = now()
    return there - (before + after) / 2, (after - before) / 2


def connections_of(settings: Settings, *, has_notify: bool) -> dict[str, int]:
    """What one worker process holds at once, at most; ``has_notify``: there is a trigger to listen to."""
    listens = has_notify and (settings.pooler == "none" or settings.listen_conninfo is not None)
    return {
        "for claims": settings.concurrency,
        "for chores": 1,
        "for backfills": int(settings.backfill_every_seconds > 0),
        "to listen": int(listens),
    }


def connections(subject: Subject) -> Iterator[Finding]:
    """Whether the workers, and as many again while they are replaced, find room beside everybody else."""
    row = subject.session.execute(_CONNECTIONS, {"name": APPLICATION_NAME}).one()
    workers = max(1, sum(condition(each) == "running" for each in list_workers(subject.session, subject.tables)))
    of_one = connections_of(subject.settings, has_notify=notifies(subject.session, subject.tables.outbox))
    needed = workers * sum(of_one.values())
    limits = [row.most - row.reserved - row.others, *(limit for limit in (row.of_database, row.of_role) if limit >= 0)]
    room = min(limits)
    formula = " + ".join(f"{count} {name}" for name, count in of_one.items())
    evidence = (
        f"{workers} worker(s) x ({formula}) = {needed}; max_connections {row.most} - {row.reserved} reserved - "
        f"{row.others} of others" + (f", and at most {room} by CONNECTION LIMIT" if room < limits[0] else "")
    )
    if subject.settings.pooler == "transaction":
        yield ok(f"{evidence}; the pooler shares its own among them")
    elif needed > room:
        more = "more max_connections" if room == limits[0] else "ALTER ROLE or DATABASE … CONNECTION LIMIT -1;"
        yield problem(f"{evidence}: not enough", f"fewer workers or OUTBOX_CONCURRENCY; a pooler; {more}")
    elif 2 * needed > room:
        yield warning(f"{evidence}: not enough to start new ones before the old ones end", "more max_connections")
    else:
        yield ok(evidence)


def pooler(subject: Subject) -> Iterator[Finding]:
    """Whether something stands between, and whether a session keeps its backend there.

    A pooler makes up the process id that it tells its clients. In transaction mode a backend that one client has used
    serves another one, which holds it by a transaction, while the first is still there.
    """
    subject.session.rollback()  # gives the backend of this transaction back
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
        return ok("a pooler in transaction mode, as OUTBOX_POOLER says")
    if is_shared:
        return problem(
            "a pooler in transaction mode: what is prepared is not there in the next transaction, and LISTEN hears "
            "nothing",
            "OUTBOX_POOLER=transaction; OUTBOX_LISTEN_DATABASE_URL: a URL that leads past it",
        )
    if is_set and not is_between:
        return warning("none, and nothing is prepared because OUTBOX_POOLER says transaction", "unset OUTBOX_POOLER")
    if is_between:
        return ok("a pooler, and each session kept its backend (session mode, as far as can be told)")
    return ok("none")


def _parameters(subject: Subject, *names: str) -> dict[str, _Parameter]:
    """Those of them that this version knows."""
    rows = subject.session.execute(_PARAMETERS, {"names": list(names)})
    return {name: _Parameter(value, source) for name, value, source in rows}
