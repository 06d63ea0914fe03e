"""Reports to a test what a ``Database`` sends to its server, through SQLAlchemy or directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event as listener

from outbox_worker.database.direct import Direct
from outbox_worker.database.engine import Database
from outbox_worker.database.statements import Statement


def on_statement(database: Database, tell: Callable[[str], object]) -> None:
    """Call ``tell`` with each statement before it is sent. This includes SAVEPOINT and
    ``set_config``."""
    listener.listen(database.engine, "before_cursor_execute", lambda *given: tell(given[2]))
    _on_direct(database, statement=tell)


def on_begin(database: Database, tell: Callable[[], object]) -> None:
    listener.listen(database.engine, "begin", lambda *_: tell())
    _on_direct(database, begin=tell)


def on_commit(database: Database, tell: Callable[[], object]) -> None:
    """Call ``tell`` before each COMMIT."""
    listener.listen(database.engine, "commit", lambda *_: tell())
    _on_direct(database, commit=tell)


def on_rollback(database: Database, tell: Callable[[], object]) -> None:
    listener.listen(database.engine, "rollback", lambda *_: tell())
    _on_direct(database, rollback=tell)


def _on_direct(
    database: Database,
    *,
    begin: Callable[[], object] | None = None,
    statement: Callable[[str], object] | None = None,
    commit: Callable[[], object] | None = None,
    rollback: Callable[[], object] | None = None,
) -> None:
    opens = database.direct

    @contextmanager
    def watched(**parameters: str) -> Iterator[Direct]:
        if begin:
            begin()
        if statement:
            statement("set_config")
        try:
            with opens(**parameters) as transaction:
                _watch(transaction, statement, commit)
                yield transaction
        except BaseException:
            if rollback:
                rollback()
            raise

    database.direct = watched  # type: ignore[method-assign]


def _watch(transaction: Direct, statement: Callable[[str], object] | None, commit: Callable[[], object] | None) -> None:
    fetch, ends = transaction.fetch, transaction.commit

    def fetch_and_tell(asked: Statement, values: Mapping[str, Any]) -> Any:
        if statement:
            statement(str(asked))
        return fetch(asked, values)

    def commit_and_tell() -> None:
        if commit:
            commit()
        ends()

    transaction.fetch = fetch_and_tell  # type: ignore[assignment, method-assign]
    transaction.commit = commit_and_tell  # type: ignore[method-assign]
