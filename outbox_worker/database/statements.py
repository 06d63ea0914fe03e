"""Executes statements that SQLAlchemy renders to SQL only once. Checks the row count of writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import ClauseElement, CursorResult, UpdateBase
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler

from outbox_worker.database.arrays import Keys, array_literal
from outbox_worker.database.failures import sqlstate
from outbox_worker.errors import Inconsistent, KeyMissing, Swallowed

_PARAMETER = re.compile(r"%\((\w+)\)s")
"""The pattern of a named parameter in the SQL that SQLAlchemy renders for psycopg."""


@contextmanager
def relying_on_a_key() -> Iterator[None]:
    """Raise KeyMissing if an upsert in the ``with`` block finds no unique index on its key."""
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) == KeyMissing.sqlstate:
            raise KeyMissing("A unique key that the worker needs does not exist.") from None
        raise


class _Rendered(NamedTuple):
    """The SQL of a statement, the values of its constant lists, and the element types of its array parameters."""

    sql: str
    constants: Mapping[str, Any]
    keys: Mapping[str, str]

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of all parameters in the form that psycopg takes."""
        keys = {name: array_literal(given[name], item) for name, item in self.keys.items() if name in given}
        return {**self.constants, **given, **keys}


class Statement:
    """A statement that SQLAlchemy renders to SQL only once, when the SQL is first needed.

    The SQL contains the constants. Each execution sends only the parameters that vary.
    If SQLAlchemy rendered the statement at each execution, a batch of 1,000 events would take 10 % longer.
    """

    def __init__(self, clause: ClauseElement) -> None:
        self._clause = clause
        self.target = _target_of(clause)

    def __str__(self) -> str:
        return self._rendered.sql

    @cached_property
    def _rendered(self) -> _Rendered:
        compiled = self._clause.compile(dialect=PGDialect_psycopg())  # type: ignore[no-untyped-call]
        assert isinstance(compiled, SQLCompiler)  # noqa: S101 - always true for a statement
        sql, constants = str(compiled), {name: bind.value for name, bind in compiled.binds.items()}
        for name, bind in compiled.binds.items():
            if isinstance(bind.value, str | int | float):
                written = compiled.render_literal_value(bind.value, bind.type)
                sql = sql.replace(f"%({name})s", written.replace("%", "%%"))
                del constants[name]
        keys = {name: bind.type.item for name, bind in compiled.binds.items() if isinstance(bind.type, Keys)}
        return _Rendered(sql, constants, keys)

    def execute(self, session: Session, values: Mapping[str, Any]) -> CursorResult[Any]:
        """Execute the statement in the transaction of the session. ``values`` maps parameter names to values."""
        return session.connection().exec_driver_sql(self._rendered.sql, self._rendered.values(values))

    def numbered(self, values: Mapping[str, Any]) -> tuple[str, list[Any]]:
        """Return the SQL with the parameters $1, $2, … and the values of these parameters."""
        sql, names = self._numbered
        given = self._rendered.values(values)
        return sql, [given[name] for name in names]

    @cached_property
    def _numbered(self) -> tuple[str, list[str]]:
        names = list(dict.fromkeys(_PARAMETER.findall(self._rendered.sql)))
        sql = _PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", self._rendered.sql)
        return sql.replace("%%", "%"), names


Fetch = Callable[[Statement, Mapping[str, Any]], Any]
"""A function that executes a statement with the given values, and returns the only row."""


def fetching(session: Session) -> Fetch:
    """Return a function that executes statements in the transaction of the session."""
    return lambda statement, values: statement.execute(session, values).one()


def write(session: Session, statement: Statement, values: Mapping[str, Any], rows: int) -> None:
    """Execute a write that must change exactly ``rows`` rows.

    Raises Swallowed if the statement changed fewer rows. Raises Inconsistent if the statement
    changed more rows. Raises KeyMissing if an upsert finds no unique index on its key.
    """
    with relying_on_a_key():
        touched = statement.execute(session, values).rowcount
    if touched < rows:
        raise Swallowed(*statement.target, touched, rows)
    if touched != rows:
        raise Inconsistent(f"A statement changed {touched} rows instead of {rows}: {str(statement)[:60]} …")


def _target_of(clause: ClauseElement) -> tuple[str, str]:
    """Return the command of a write, for example ``DELETE``, and the table that it changes."""
    if not isinstance(clause, UpdateBase):
        return "SELECT", ""
    return clause.__visit_name__.upper(), str(clause.table)
