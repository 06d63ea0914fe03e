"""What each failure means for the events of its batch.

The description of a failure never repeats a row's values.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from outbox_worker import errors
from outbox_worker.database.failures import Failure, classify, describe, server_message, sqlstate, trace

BY_SQLSTATE = {
    # run the transaction again
    "40001": Failure.RETRY,
    "40P01": Failure.RETRY,
    "55P03": Failure.RETRY,
    "57014": Failure.RETRY,
    # drop the connection
    "08000": Failure.RECONNECT,
    "08001": Failure.RECONNECT,
    "08006": Failure.RECONNECT,
    "08P01": Failure.RECONNECT,
    "57P01": Failure.RECONNECT,
    "57P02": Failure.RECONNECT,
    "57P03": Failure.RECONNECT,
    "57P05": Failure.RECONNECT,
    "25P03": Failure.RECONNECT,
    "25006": Failure.RECONNECT,
    "0A000": Failure.RECONNECT,
    "26000": Failure.RECONNECT,
    "42P05": Failure.RECONNECT,
    # the database is in trouble: nobody is charged
    "53000": Failure.PAUSE,
    "53100": Failure.PAUSE,
    "53200": Failure.PAUSE,
    "53300": Failure.PAUSE,
    "58000": Failure.PAUSE,
    "58030": Failure.PAUSE,
    "58P01": Failure.PAUSE,
    "XX000": Failure.UNCLEAR,
    "XX001": Failure.PAUSE,
    "XX002": Failure.PAUSE,
    "28000": Failure.PAUSE,
    "28P01": Failure.PAUSE,
    "3D000": Failure.PAUSE,
    "2200H": Failure.PAUSE,
    # this event only
    "22001": Failure.EVENT,
    "22003": Failure.EVENT,
    "22008": Failure.EVENT,
    "22012": Failure.EVENT,
    "22021": Failure.EVENT,
    "22P02": Failure.EVENT,
    "22P05": Failure.EVENT,
    "23001": Failure.EVENT,
    "23502": Failure.EVENT,
    "23503": Failure.EVENT,
    "23514": Failure.EVENT,
    "23P01": Failure.EVENT,
    "44000": Failure.EVENT,
    "P0001": Failure.EVENT,
    "54000": Failure.EVENT,
    "54001": Failure.EVENT,
    # the guard
    "42P10": Failure.GUARD,
    "23505": Failure.GUARD,
    "55000": Failure.GUARD,
    # row-level security of one row or grants of the table: only bisection can tell
    "42501": Failure.UNCLEAR,
    "42P01": Failure.UNCLEAR,
    "42703": Failure.UNCLEAR,
    "25P02": Failure.UNCLEAR,
    "P0002": Failure.UNCLEAR,
    "99999": Failure.UNCLEAR,
}


def of_state(state: str | None, *words: str) -> psycopg.Error:
    kind = type("Refusal", (psycopg.Error,), {"sqlstate": state})
    made: psycopg.Error = kind(*words)
    return made


@pytest.mark.parametrize(("state", "failure"), BY_SQLSTATE.items())
@pytest.mark.parametrize("wrapped", [False, True])
def test_each_sqlstate_has_its_class(state: str, failure: Failure, wrapped: bool) -> None:
    error: Exception = of_state(state)
    if wrapped:
        error = DBAPIError("INSERT", {}, error)
    assert sqlstate(error) == state
    assert classify(error) is failure


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (psycopg.OperationalError("the connection is lost"), Failure.RECONNECT),
        (psycopg.InterfaceError("the connection is closed"), Failure.RECONNECT),
        (OperationalError("SELECT 1", {}, psycopg.OperationalError("server closed the connection")), Failure.RECONNECT),
        (PoolTimeout("QueuePool limit"), Failure.RECONNECT),
        (errors.CommitLost("no answer"), Failure.RECONNECT),
        (errors.DatabaseUnavailable("no server"), Failure.RECONNECT),
        (errors.EmbeddedServerError("no server"), Failure.RECONNECT),
        (errors.SchemaError("no table"), Failure.PAUSE),
        (errors.Inconsistent("2 rows instead of 1"), Failure.BUG),
        (errors.PairTaken("a second purchase"), Failure.RETRY),
        (psycopg.ProgrammingError("no placeholder"), Failure.BUG),
        (psycopg.DataError("cannot adapt"), Failure.BUG),
        (DBAPIError("SELECT 1", {}, psycopg.DataError("cannot dump")), Failure.BUG),
        (TypeError("ours"), Failure.BUG),
        (RecursionError("a nested document"), Failure.BUG),
    ],
    ids=repr,
)
def test_without_a_sqlstate(error: Exception, failure: Failure) -> None:
    assert classify(error) is failure


def test_psycopgs_own_classes_are_told_by_their_state() -> None:
    """A read-only node answers with an InternalError. The driver says nothing more about it."""
    assert classify(psycopg.errors.ReadOnlySqlTransaction("cannot execute")) is Failure.RECONNECT
    assert classify(psycopg.errors.InvalidColumnReference("no unique constraint")) is Failure.GUARD
    assert classify(psycopg.errors.UniqueViolation("duplicate key")) is Failure.GUARD


class Told(psycopg.errors.ForeignKeyViolation):
    """An error of the server for a row that it refuses, with the values of the row."""

    @property
    def diag(self) -> Any:
        return SimpleNamespace(
            constraint_name="purchases_student_fkey",
            message_detail="Key (student_id)=(hunter2secret) is not present",
            message_primary="hunter2secret",
            context="COPY hunter2secret",
        )


@pytest.mark.parametrize("wrapped", [False, True])
def test_describe_names_the_error_and_no_value(wrapped: bool) -> None:
    error: Exception = Told("Key (student_id)=(hunter2secret) is not present in table students")
    if wrapped:
        error = DBAPIError("INSERT INTO purchases VALUES ('hunter2secret')", {"student_id": "hunter2secret"}, error)
    assert describe(error) == "Told, SQLSTATE 23503, constraint purchases_student_fkey"


@pytest.mark.parametrize(
    "error",
    [ValueError("hunter2secret"), psycopg.OperationalError("hunter2secret"), of_state("22P02", "hunter2secret")],
)
def test_describe_keeps_every_message_to_itself(error: Exception) -> None:
    assert "hunter2secret" not in describe(error)
    assert type(error).__name__ in describe(error)


def test_said_repeats_the_server_and_libpq_but_no_function() -> None:
    refused = psycopg.OperationalError("connection to server failed: FATAL:  no pg_hba.conf entry\nIs it running?")
    assert server_message(refused) == "connection to server failed: FATAL:  no pg_hba.conf entry"
    assert server_message(psycopg.OperationalError("")) == "OperationalError"
    assert server_message(Told("hunter2secret")) == "Told, SQLSTATE 23503, constraint purchases_student_fkey"


def test_trace_names_places_and_no_message() -> None:
    with pytest.raises(ValueError, match="hunter2secret") as raised:
        int("hunter2secret")
    places = trace(raised.value)
    assert len(places) == 1
    assert "test_errors.py:" in places[0]
    assert places[0].endswith("in test_trace_names_places_and_no_message")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SettingError, 78),
        (errors.SchemaError, 78),
        (errors.DatabaseUnavailable, 69),
        (errors.EmbeddedServerError, 69),
        (errors.Refused, 1),
        (errors.NotProved, 1),
        (errors.KeyMissing, 78),
        (errors.OutboxWorkerError, 70),
        (errors.Inconsistent, 70),
        (errors.CommitLost, 69),
    ],
)
def test_exit_codes_are_a_contract(error: type[errors.OutboxWorkerError], code: int) -> None:
    assert error.exit_code == code
