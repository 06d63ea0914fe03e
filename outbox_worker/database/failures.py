"""Classifies database errors by SQLSTATE, and describes them for logs without repeating values from rows."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from enum import StrEnum

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from outbox_worker.errors import (
    CommitLost,
    DatabaseUnavailable,
    DefaultTaken,
    KeyMissing,
    NothingRecorded,
    NothingWritten,
    SchemaError,
    Swallowed,
)


class Failure(StrEnum):
    """The class of a database error. The class decides what the worker does with the batch."""

    RETRY = "retry"
    """Run the transaction again with half the batch. No event is at fault."""
    RECONNECT = "reconnect"
    """Drop the connection and open a new connection. No event is at fault."""
    PAUSE = "pause"
    """Log an ERROR and wait. The database is in trouble. No event is at fault."""
    EVENT = "event"
    """Find the event that the database rejects. Count a failed attempt for this event only.

    Settle the other events of the batch.
    """
    GUARD = "guard"
    """Check the guard (unique index or locks) again, and read the marks of settled events again.

    Either the guard has changed, or another transaction inserted the same key first.
    """
    UNCLEAR = "unclear"
    """Try parts of the batch. Either an event or the database is at fault.

    If all events fail, pause. If only some events fail, count a failed attempt for each of them.
    """
    BUG = "bug"
    """Roll back, log an ERROR and pause. The worker itself has a bug."""


NO_EVENTS_FAULT = (Failure.RETRY, Failure.RECONNECT, Failure.PAUSE, Failure.BUG)
"""The classes of failure that no event can cause."""

QUERY_CANCELED = "57014"
"""The SQLSTATE of a statement that exceeded ``statement_timeout`` or that somebody cancelled."""
UNIQUE_VIOLATION = "23505"
"""The SQLSTATE of a unique violation.

Either another transaction inserted the same key first, or the event already has a mark (a row of
processed_events).
"""

TIMED_OUT = ("55P03", "57014")
"""The SQLSTATEs of two time-outs: a lock was not released in time, or a statement took too long.

If the worker repeated the transaction at once, it would probably wait equally long again.
"""

_NO_ARBITER = "42P10"
"""The SQLSTATE if no unique index matches ON CONFLICT.

The worker then cannot use the unique index as its guard against second purchases.
"""

_NOT_IN_STATE = "55000"
"""The SQLSTATE if only a deferrable index matches ON CONFLICT.

The worker then cannot use this index as its guard against second purchases. Other errors have the
same SQLSTATE. The worker therefore also reads which function of the server raised the error.
"""

_REFUSES_DEFERRABLE = "ExecCheckIndexConstraints"
"""The function in PostgreSQL that refuses a deferrable index for ON CONFLICT."""

_REFUSES_UNIDENTIFIED = "CheckCmdReplicaIdentity"
"""The function in PostgreSQL that refuses UPDATE and DELETE on a published table without a replica identity."""

_REFUSES_OLD_PLAN = "RevalidateCachedQuery"
"""The function in PostgreSQL that refuses a prepared statement whose result columns have changed."""

_NOT_SUPPORTED = "0A000"
"""The SQLSTATE of a prepared statement whose result columns have changed.

All features that PostgreSQL does not support have the same SQLSTATE. An example is ON CONFLICT on a
table with rules.
"""

_INTERNAL_ERROR = "XX000"

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
    "25P04": Failure.RECONNECT,  # transaction_timeout, from PostgreSQL 17 on
    "25006": Failure.RECONNECT,  # read_only_sql_transaction: the node was demoted
    "26000": Failure.RECONNECT,  # invalid_sql_statement_name: a pooler lost the prepared statement
    "42P05": Failure.RECONNECT,  # duplicate_prepared_statement
    "3D000": Failure.PAUSE,  # invalid_catalog_name
    "2200H": Failure.PAUSE,  # sequence_generator_limit_exceeded
    "23000": Failure.EVENT,  # integrity_constraint_violation, for example WrittenOtherwise
    _INTERNAL_ERROR: Failure.UNCLEAR,  # an extension can raise this error for a single row
    "428C9": Failure.PAUSE,  # generated_always: a written column became a generated column
    "23001": Failure.EVENT,  # restrict_violation
    "23502": Failure.EVENT,  # not_null_violation
    "23503": Failure.EVENT,  # foreign_key_violation
    "23514": Failure.EVENT,  # check_violation
    "23P01": Failure.EVENT,  # exclusion_violation
    "44000": Failure.EVENT,  # with_check_option_violation
    "P0001": Failure.EVENT,  # raise_exception, for example by a trigger
    "54000": Failure.EVENT,  # program_limit_exceeded
    "54001": Failure.EVENT,  # statement_too_complex
    "23505": Failure.GUARD,  # unique_violation
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
"""The pattern that finds the server's own sentence in libpq's message about a refused connection.

The word before this sentence (``FATAL``) can be in any language.
"""

_IS_STANDBY = re.compile(
    r"connection to server (?:at|on socket) \"(?P<host>[^\"]*)\"(?: \([^)]*\))?(?:, port (?P<port>\d+))? failed:"
    r" server is in hot standby mode"
)
"""The pattern of libpq's message if a connection needs a primary, but the server is a standby."""

_PASSES = re.compile(
    r"the database system|recovery|too many|connection slots|terminating|shutting down"
    r"|query_wait_timeout|server[_ ]login|max_client_conn|pgbouncer cannot connect"
)
"""The pattern of messages about refused connections that will work later without human action.

For example, the server starts, stops or has no free connection, or the server behind a pooler is
down.
"""


class WrittenOtherwise(DBAPIError):
    """Raised if a trigger changed the values that a statement wrote to a row.

    The worker handles this error like an error that PostgreSQL itself raises for the event.
    """

    def __init__(self, detail: str) -> None:
        super().__init__(None, None, psycopg.errors.IntegrityConstraintViolation(detail))


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of a driver's error, even if SQLAlchemy wrapped the error.

    Return None if the error has no SQLSTATE.
    """
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None)


def classify(error: BaseException) -> Failure:
    """Return the class of an error.

    Only the code that settles events inside a savepoint can try parts of a batch. All other callers must treat
    ``unclear`` as ``pause``.
    """
    if isinstance(error, KeyMissing | DefaultTaken | NothingWritten):
        return Failure.PAUSE
    if isinstance(error, Swallowed | NothingRecorded):
        return Failure.UNCLEAR
    if sqlstate(error):
        return Failure.UNCLEAR if is_from_function(error) and is_trouble(error) else _by_state(error)
    original = getattr(error, "orig", None) or error
    if isinstance(original, psycopg.OperationalError | psycopg.InterfaceError | PoolTimeout):
        return Failure.RECONNECT  # no SQLSTATE: the connection broke or was never made
    if isinstance(original, CommitLost | DatabaseUnavailable):
        return Failure.RECONNECT
    return Failure.PAUSE if isinstance(original, SchemaError) else Failure.BUG


def _by_state(error: BaseException) -> Failure:
    state = sqlstate(error) or ""
    return _by_function(error) or _BY_SQLSTATE.get(state) or _BY_CLASS.get(state[:2], Failure.UNCLEAR)


def is_trouble(error: BaseException) -> bool:
    """Return True if the SQLSTATE reports trouble of the database instead of a wrong row.

    A database function can raise this SQLSTATE for a single event. The worker then postpones the
    event, but does not count a failed attempt.
    """
    is_internal = sqlstate(error) == _INTERNAL_ERROR
    return sqlstate(error) is not None and (is_internal or _by_state(error) in (Failure.PAUSE, Failure.RECONNECT))


def _by_function(error: BaseException) -> Failure | None:
    """Return the class of an error whose SQLSTATE has several meanings.

    Return None if the SQLSTATE alone decides the class.
    """
    if is_arbiter_lost(error):
        return Failure.GUARD
    return {
        (_NOT_SUPPORTED, _REFUSES_OLD_PLAN): Failure.RECONNECT,
        (_NOT_SUPPORTED, None): Failure.RECONNECT,
        (_NOT_IN_STATE, _REFUSES_UNIDENTIFIED): Failure.PAUSE,
    }.get((sqlstate(error) or "", _raised_by(error)))


def is_from_function(error: BaseException) -> bool:
    """Return whether a function in the database, for example of a trigger, raised the error.

    A database function can raise any SQLSTATE, even for a single row. The connection still works
    afterwards. PostgreSQL ends a connection only with the severity FATAL.
    """
    return bool(_diagnosis(error, "context")) and _diagnosis(error, "severity_nonlocalized") == "ERROR"


def is_arbiter_lost(error: BaseException) -> bool:
    """Return whether the worker's own statement failed because its ON CONFLICT has no usable unique index.

    Return False if the error has a context. The failed statement was then in a database function.
    """
    state = sqlstate(error)
    if state not in (_NO_ARBITER, _NOT_IN_STATE) or _diagnosis(error, "context"):
        return False
    return state == _NO_ARBITER or _raised_by(error) in (None, _REFUSES_DEFERRABLE)


def _raised_by(error: BaseException) -> str | None:
    """Return the name of the function in PostgreSQL that raised the error."""
    return _diagnosis(error, "source_function")


def _diagnosis(error: BaseException, name: str) -> str | None:
    found: str | None = getattr(getattr(getattr(error, "orig", None) or error, "diag", None), name, None)
    return found


def violated(error: BaseException) -> tuple[str | None, str | None, str | None]:
    """Return the schema, the table and the name of the constraint or unique index that refused a row."""
    return _diagnosis(error, "schema_name"), _diagnosis(error, "table_name"), _diagnosis(error, "constraint_name")


def server_message(error: BaseException) -> str:
    """Return the first line of the message from the server or libpq.

    If a database function raised the error, return ``describe(error)`` instead. The message of a
    database function can repeat a value from a row.
    """
    original = getattr(error, "orig", None) or error
    if getattr(getattr(original, "diag", None), "context", None):
        return describe(error)
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    return lines[0] if lines else type(original).__name__


def login_refusal(error: BaseException) -> str | None:
    """Return the server's message if the server refuses the role, the password or the database.

    Return None for other errors. The server refuses the connection until a person acts. The driver
    reports no SQLSTATE for a failed connection. This function therefore searches the text of the
    error.
    """
    original = getattr(error, "orig", None) or error
    if not isinstance(original, psycopg.OperationalError) or original.sqlstate is not None:
        return None
    found = _REFUSED.search(server_message(error))
    return None if found is None or _PASSES.search(found["sentence"]) else found["sentence"]


def standbys_among(error: BaseException) -> list[str]:
    """Return the standbys that refused a connection. Return an empty list for other errors."""
    original = getattr(error, "orig", None) or error
    found = _IS_STANDBY.finditer(str(original))
    return list(dict.fromkeys(_place(each) for each in found))


def _place(found: re.Match[str]) -> str:
    return f"{found['host']} (port {found['port']})" if found["port"] else found["host"]


def trace(error: BaseException) -> list[str]:
    """Return the code lines that led to an error. The line that raised the error is the last.

    The result omits the message. The message can repeat a value from a row. The list has at most
    ``_PLACES_MAX`` code lines. The journal splits log lines that are longer than 48 kB.
    """
    frames = traceback.extract_tb(error.__traceback__, limit=-_PLACES_MAX)
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]


def describe(error: BaseException) -> str:
    """Describe an error by its class, SQLSTATE, table and constraint. The text never contains a value from a row.

    The messages of ``DefaultTaken``, ``NothingRecorded`` and ``Swallowed`` contain no value. The
    text repeats these messages.
    """
    if isinstance(error, DefaultTaken | NothingRecorded | Swallowed):
        return str(error)
    original = getattr(error, "orig", None) or error
    if isinstance(error, WrittenOtherwise):
        return str(original)
    state = sqlstate(error)
    named = {name: _diagnosis(error, f"{name}_name") for name in ("table", "constraint")}
    parts = [
        type(original).__name__,
        f"SQLSTATE {state}" if state else "",
        *(f"{kind} {name}" for kind, name in named.items() if name),
    ]
    return ", ".join(part for part in parts if part)
