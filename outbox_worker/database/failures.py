"""Classifies database errors by SQLSTATE, and describes them for logs without repeating values from rows."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from enum import StrEnum

import psycopg
from sqlalchemy.exc import TimeoutError as PoolTimeout

from outbox_worker.errors import CommitLost, DatabaseUnavailable, KeyMissing, SchemaError


class Failure(StrEnum):
    """The class of an error, which decides what happens to the batch in which the error occurred."""

    RETRY = "retry"
    """Run the transaction again with half the batch; no event is at fault."""
    RECONNECT = "reconnect"
    """Drop the connection and make a new one; no event is at fault."""
    PAUSE = "pause"
    """Log an ERROR and wait, because the database is in trouble; no event is at fault."""
    EVENT = "event"
    """Find the event that the database rejects and count an attempt for it; settle the other events."""
    GUARD = "guard"
    """Check guard and marks again, because the guard has changed or another transaction inserted the same key first."""
    UNCLEAR = "unclear"
    """Try parts of the batch, because either an event or the database is at fault.

    If all events fail, pause. If only some events fail, count an attempt for each of these.
    """
    BUG = "bug"
    """Roll back, log an ERROR and pause, because the worker itself has a bug."""


UNIQUE_VIOLATION = "23505"
"""The SQLSTATE if another transaction inserted the same key first, or the event already has a mark."""

NO_ARBITER = ("42P10", "55000")
"""PostgreSQL raises the first one if no unique index matches ON CONFLICT, the second if only a deferrable one does.

The guard ``index`` is then not in force.
"""

_BY_SQLSTATE: Mapping[str, Failure] = {
    "40001": Failure.RETRY,  # serialization_failure
    "40P01": Failure.RETRY,  # deadlock_detected
    "55P03": Failure.RETRY,  # lock_not_available
    "57014": Failure.RETRY,  # query_canceled, statement_timeout
    "57P01": Failure.RECONNECT,  # admin_shutdown
    "57P02": Failure.RECONNECT,  # crash_shutdown
    "57P03": Failure.RECONNECT,  # cannot_connect_now
    "57P05": Failure.RECONNECT,  # idle_session_timeout
    "25P03": Failure.RECONNECT,  # idle_in_transaction_session_timeout
    "25006": Failure.RECONNECT,  # read_only_sql_transaction: the node was demoted
    "0A000": Failure.RECONNECT,  # cached plan must not change result type
    "26000": Failure.RECONNECT,  # invalid_sql_statement_name: a pooler lost the prepared statement
    "42P05": Failure.RECONNECT,  # duplicate_prepared_statement
    "3D000": Failure.PAUSE,  # invalid_catalog_name
    "2200H": Failure.PAUSE,  # sequence_generator_limit_exceeded
    "23001": Failure.EVENT,  # restrict_violation
    "23502": Failure.EVENT,  # not_null_violation
    "23503": Failure.EVENT,  # foreign_key_violation
    "23514": Failure.EVENT,  # check_violation
    "23P01": Failure.EVENT,  # exclusion_violation
    "44000": Failure.EVENT,  # with_check_option_violation
    "P0001": Failure.EVENT,  # raise_exception, for example by a trigger
    "54000": Failure.EVENT,  # program_limit_exceeded
    "54001": Failure.EVENT,  # statement_too_complex
    "42P10": Failure.GUARD,  # invalid_column_reference: no index matches ON CONFLICT
    "23505": Failure.GUARD,  # unique_violation
    "55000": Failure.GUARD,  # object_not_in_prerequisite_state: a deferrable index
}

_BY_CLASS: Mapping[str, Failure] = {
    "08": Failure.RECONNECT,  # connection exception
    "22": Failure.EVENT,  # data exception
    "28": Failure.PAUSE,  # invalid authorization
    "53": Failure.PAUSE,  # insufficient resources
    "58": Failure.PAUSE,  # system error
    "XX": Failure.PAUSE,  # internal error
}

_PLACES_MAX = 100

_REFUSED = re.compile(r"failed: [^\s:]+:  (?P<sentence>.+)")
"""The form in which libpq repeats a server's answer to a new connection. Its severity word may be in any language."""

_IS_STANDBY = re.compile(
    r"connection to server (?:at|on socket) \"(?P<host>[^\"]*)\"(?: \([^)]*\))?(?:, port (?P<port>\d+))? failed:"
    r" server is in hot standby mode"
)
"""The form in which libpq says that a server is a standby, although the connection needs a primary."""

_PASSES = re.compile(
    r"the database system|recovery|too many|connection slots|terminating|shutting down"
    r"|query_wait_timeout|server[_ ]login|max_client_conn|pgbouncer cannot connect"
)
"""The pattern of refusals that end without the action of a person.

Examples: the server starts, stops or has no free connection, or the server behind a pooler is down.
"""


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of a driver's error, even if SQLAlchemy wrapped the error; None if it has no SQLSTATE."""
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None)


def classify(error: BaseException) -> Failure:
    """Return the class of an error.

    Callers outside the savepoint that settles events must treat ``unclear`` as ``pause``.
    """
    if isinstance(error, KeyMissing):
        return Failure.PAUSE
    state = sqlstate(error)
    if state:
        return _BY_SQLSTATE.get(state) or _BY_CLASS.get(state[:2], Failure.UNCLEAR)
    original = getattr(error, "orig", None) or error
    if isinstance(original, psycopg.OperationalError | psycopg.InterfaceError | PoolTimeout):
        return Failure.RECONNECT  # no SQLSTATE, because the connection broke or was never made
    if isinstance(original, CommitLost | DatabaseUnavailable):
        return Failure.RECONNECT
    return Failure.PAUSE if isinstance(original, SchemaError) else Failure.BUG


def server_message(error: BaseException) -> str:
    """Return the first line of the message from the server or libpq.

    If a database function raised the error, return only the name of the error, because the message may repeat a value.
    """
    original = getattr(error, "orig", None) or error
    if getattr(getattr(original, "diag", None), "context", None):
        return describe(error)
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    return lines[0] if lines else type(original).__name__


def login_refusal(error: BaseException) -> str | None:
    """Return the server's message if it refuses the role, password or database; otherwise None.

    Such a refusal lasts until a person acts. This function searches the text of the error, because the driver reports
    no SQLSTATE for a connection that was not made.
    """
    original = getattr(error, "orig", None) or error
    if not isinstance(original, psycopg.OperationalError) or original.sqlstate is not None:
        return None
    found = _REFUSED.search(server_message(error))
    return None if found is None or _PASSES.search(found["sentence"]) else found["sentence"]


def standbys_among(error: BaseException) -> list[str]:
    """Return the servers that refused a connection because they are standbys. Empty if the error is another one."""
    original = getattr(error, "orig", None) or error
    found = _IS_STANDBY.finditer(str(original))
    return list(dict.fromkeys(_place(each) for each in found))


def _place(found: re.Match[str]) -> str:
    return f"{found['host']} (port {found['port']})" if found["port"] else found["host"]


def trace(error: BaseException) -> list[str]:
    """Return the code lines that led to an error, innermost last, without its message, which may repeat a value.

    The list has at most ``_PLACES_MAX`` lines, because the journal splits lines that are longer than 48 kB.
    """
    frames = traceback.extract_tb(error.__traceback__, limit=-_PLACES_MAX)
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]


def describe(error: BaseException) -> str:
    """Describe an error for logs and dead letters by class, SQLSTATE and constraint, never by a value of a row."""
    original = getattr(error, "orig", None) or error
    state = sqlstate(error)
    constraint = getattr(getattr(original, "diag", None), "constraint_name", None)
    parts = [
        type(original).__name__,
        f"SQLSTATE {state}" if state else "",
        f"constraint {constraint}" if constraint else "",
    ]
    return ", ".join(part for part in parts if part)
