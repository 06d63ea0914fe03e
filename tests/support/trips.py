"""Counts what the worker sends to the server."""

from __future__ import annotations

from functools import partial

from outbox_worker.database.engine import Database
from tests.support.watching import on_begin, on_commit, on_rollback, on_statement


class RoundTrips:
    """Records what the worker sends to the server, in order."""

    def __init__(self, database: Database) -> None:
        self.sent: list[str] = []
        self.statements: list[str] = []
        on_begin(database, partial(self.sent.append, "begin"))
        on_commit(database, partial(self.sent.append, "commit"))
        on_rollback(database, partial(self.sent.append, "rollback"))
        on_statement(database, self._execute)

    def _execute(self, statement: str) -> None:
        words = {"set_config": "set", "won AS": "fast", "SKIP LOCKED": "claim", "INTO public.purchases": "insert"}
        words |= {"INTO public.processed_events": "mark", "DELETE FROM public.outbox": "delete"}
        words |= {"ROLLBACK TO": "rollback to", "SAVEPOINT": "savepoint"}
        self.statements.append(statement)
        self.sent.append(next((name for word, name in words.items() if word in statement), statement))

    def transactions(self) -> list[list[str]]:
        """Return what the worker sent in each transaction, including BEGIN and COMMIT or
        ROLLBACK."""
        starts = [at for at, sent in enumerate(self.sent) if sent == "begin"]
        return [self.sent[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]

    def savepoints(self) -> list[int]:
        """Return the number of savepoints in each transaction."""
        return [sent.count("savepoint") for sent in self.transactions()]
