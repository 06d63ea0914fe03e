"""Statements that are rendered once and executed many times, and writes whose row count is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    ClauseElement,
    CursorResult,
)
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler

from outbox_worker.database.arrays import Keys, array_literal
from outbox_worker.database.failures import sqlstate
from outbox_worker.errors import Inconsistent, KeyMissing


@contextmanager
def relying_on_a_key() -> Iterator[None]:
    """For an upsert on a unique key. Raises KeyMissing if no unique index on it exists."""
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) == KeyMissing.sqlstate:
            raise KeyMissing("A unique key that the worker needs does not exist.") from None
        raise


class Statement:
    """A statement that is rendered once and executed many times.

    SQLAlchemy's work for each execution of a construct would cost a batch of a thousand a tenth of its SQL time.
    """

    def __init__(self, clause: ClauseElement) -> None:
        compiled = clause.compile(dialect=PGDialect_psycopg())  # type: ignore[no-untyped-call]
        assert isinstance(compiled, SQLCompiler)  # noqa: S101 - a statement's always is
        self._sql = str(compiled)
        self._constants = {name: bind.value for name, bind in compiled.binds.items()}
        self._keys = {name for name, bind in compiled.binds.items() if isinstance(bind.type, Keys)}

    def __str__(self) -> str:
        return self._sql

    def execute(self, session: Session, values: Mapping[str, Any]) -> CursorResult[Any]:
        """Run it in the session's transaction; ``values`` by the names of its parameters."""
        written = {name: array_literal(value) if name in self._keys else value for name, value in values.items()}
        return session.connection().exec_driver_sql(self._sql, self._constants | written)


def write(session: Session, statement: Statement, values: Mapping[str, Any], rows: int) -> None:
    """Execute a write that must change exactly ``rows`` rows.

    Raises Inconsistent, and KeyMissing.
    """
    with relying_on_a_key():
        touched = statement.execute(session, values).rowcount
    if touched != rows:
        raise Inconsistent(f"A statement changed {touched} rows instead of {rows}: {str(statement)[:60]} …")
