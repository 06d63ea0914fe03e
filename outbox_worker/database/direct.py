"""Runs one transaction directly on a psycopg connection, without SQLAlchemy.

SQLAlchemy would take a third of the time of a batch of one event. The client sends BEGIN, the
parameters of the transaction and the first statement together. A transaction with one statement
waits for the server only twice: after the statement, and after COMMIT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import psycopg
from psycopg.rows import namedtuple_row

from outbox_worker.database.planner import SET_LOCAL
from outbox_worker.database.statements import Statement

_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
_SET_LOCAL = SET_LOCAL.replace("%(parameters)s", "$1")


class Direct:
    """One transaction on a psycopg connection. ``Database.direct`` opens the transaction.

    If ``queues`` is true, the client sends the first statement together with BEGIN and the
    parameters. If ``looks`` is also true, the client sends no BEGIN. The transaction then ends with
    the first statement. The first statement must only read.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], parameters: Mapping[str, str], *, queues: bool, looks: bool = False
    ) -> None:
        self._connection, self._parameters, self._queues = connection, parameters, queues
        self._begins = not (queues and looks)
        self._may_prepare = connection.prepare_threshold is not None
        self._cursor = psycopg.RawCursor(connection, row_factory=namedtuple_row)
        self._queue = ExitStack()

    def __enter__(self) -> Self:
        self._connection.autocommit = True  # otherwise psycopg sends BEGIN and waits
        if self._queues:
            self._queue.enter_context(self._connection.pipeline())
        if self._begins:
            self._cursor.execute(_BEGIN, prepare=False)
        self._cursor.execute(_SET_LOCAL, [json.dumps(self._parameters)], prepare=self._may_prepare)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._queue.close()
        finally:
            if not self._connection.closed:
                self._connection.rollback()
                self._connection.autocommit = False

    def fetch(self, statement: Statement, values: Mapping[str, Any]) -> Any:
        """Execute a statement that returns one row, and return the row as a named tuple."""
        sql, given = statement.numbered(values)
        self._cursor.execute(sql, given, prepare=self._may_prepare)
        self._queue.close()  # sends the queued statements, and waits for the answers
        return self._cursor.fetchone()

    def commit(self) -> None:
        self._connection.commit()

    def close(self) -> None:
        """Close the lost connection."""
        self._connection.close()
