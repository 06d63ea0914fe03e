"""Counts the savepoints of one transaction, and checks deferred constraints inside a savepoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.orm import Session

from outbox_worker.database.engine import check_deferred, savepoint

MAX_SAVEPOINTS = 32
"""The largest number of savepoints in one transaction.

A transaction with more than 64 subtransactions slows down all sessions.
"""


@dataclass
class Savepoints:
    """The number of savepoints that one transaction can still use."""

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
        check_deferred(self.session)
