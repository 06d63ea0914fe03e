"""Counts the savepoints of one transaction, and checks deferred constraints inside a savepoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.orm import Session

from outbox_worker.database.engine import savepoint

MAX_SAVEPOINTS = 32
"""The largest number of savepoints in one transaction.

There is a limit because a transaction with more than 64 subtransactions slows down all sessions.
"""

# what: checks deferred constraints inside the savepoint instead of at COMMIT · lock: none
_CHECK_DEFERRED = text("SET CONSTRAINTS ALL IMMEDIATE")
# what: defers the constraints again, until the next check · lock: none
_DEFER_AGAIN = text("SET CONSTRAINTS ALL DEFERRED")


@dataclass
class Savepoints:
    """The number of savepoints that one transaction may still use."""

    session: Session
    left: int = MAX_SAVEPOINTS

    @contextmanager
    def take(self) -> Iterator[None]:
        """Run the ``with`` block in a savepoint. If the block raises an error, roll back to the savepoint."""
        self.left -= 1
        with savepoint(self.session):
            yield

    def check_deferred(self) -> None:
        """Raise the error that COMMIT would raise because of a deferred constraint."""
        self.session.execute(_CHECK_DEFERRED)
        self.session.execute(_DEFER_AGAIN)
