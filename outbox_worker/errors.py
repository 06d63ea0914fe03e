"""What can go wrong, drawn as a tree; each branch says what happens to the event, or how the program ends.

    OutboxWorkerError
    ├── SettingError          exit 78   a setting or a URL that cannot be used
    │   └── WrongUsage        exit 2    all of them stand on the command line
    ├── SchemaError           exit 78   a table, column or privilege is missing (at start; while running: pause)
    ├── DatabaseUnavailable   exit 69   no connection (one-shot commands; the daemon waits)
    ├── EmbeddedServerError   exit 69   the private PostgreSQL cannot be started
    ├── NoAnswer              exit 69   no daemon answers by HTTP
    ├── Refused               exit 1    a command looked, found a reason not to act, and did not act
    ├── CommitLost            (reconnect) the answer to a COMMIT was lost, and the transaction did not take effect
    ├── KeyMissing            (pause)   a unique key that an upsert relies on is gone; no matter of the guard's
    └── Inconsistent          (pause)   a statement touched another number of rows than it must: a bug

Failures that the database reports are not wrapped: ``classify`` names their class, and the processor acts on it.
"""

from __future__ import annotations

from typing import ClassVar


class OutboxWorkerError(Exception):
    """Base of every error with a sentence for the operator; ``exit_code`` is the process's exit status."""

    exit_code: ClassVar[int] = 1


class SettingError(OutboxWorkerError):
    """A setting or a URL cannot be used."""

    exit_code = 78


class WrongUsage(SettingError):
    """An option of the command line cannot be used."""

    exit_code = 2


class SchemaError(OutboxWorkerError):
    """A table, a column or a privilege that the worker needs is missing."""

    exit_code = 78


class DatabaseUnavailable(OutboxWorkerError):
    """No usable connection could be made."""

    exit_code = 69


class EmbeddedServerError(DatabaseUnavailable):
    """The private PostgreSQL could not be started."""


class NoAnswer(OutboxWorkerError):
    """No daemon answers by HTTP, or not in time."""

    exit_code = 69


class Refused(OutboxWorkerError):
    """A command looked, found a reason not to act, and changed nothing."""

    exit_code = 1


class KeyMissing(OutboxWorkerError):
    """A unique key that an upsert relies on was dropped while the worker runs; ``find_problems`` names it."""

    sqlstate: ClassVar[str] = "42P10"


class Inconsistent(OutboxWorkerError):
    """A statement touched another number of rows than it must: ours to mend, never an event's fault."""


class CommitLost(OutboxWorkerError):
    """The answer to a COMMIT was lost, and the transaction did not take effect or cannot be asked about any more."""


def in_one_line(error: OutboxWorkerError) -> str:
    """A sentence and the list below it, for a log record."""
    first, *others = (line.strip() for line in str(error).splitlines())
    return f"{first} {'; '.join(others)}".rstrip()
