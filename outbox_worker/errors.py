"""All errors of the program, as a tree; each line says how the program ends, or what happens to the batch.

    OutboxWorkerError
    ├── SettingError          exit 78   a setting or a URL cannot be used
    │   └── WrongUsage        exit 2    an option of the command line cannot be used
    ├── SchemaError           exit 78   a table, column or privilege is missing (at the start; later the worker pauses)
    ├── DatabaseUnavailable   exit 69   no connection to the database (the daemon waits instead of ending)
    ├── EmbeddedServerError   exit 69   the private PostgreSQL cannot be started
    ├── NoAnswer              exit 69   no daemon answers over HTTP
    ├── Refused               exit 1    a command found a reason not to act, and changed nothing
    ├── CommitLost            (reconnect) the connection broke during COMMIT, and nothing was committed, as far as known
    ├── KeyMissing            (pause)   a unique key that an upsert needs was dropped; the guard has another one
    └── Inconsistent          (pause)   a statement changed another number of rows than it must: a bug

Errors that the database reports are not wrapped: ``classify`` names their class, and the processor acts on that.
"""

from __future__ import annotations

from typing import ClassVar


class OutboxWorkerError(Exception):
    """Base of all errors whose message is a sentence for the operator; ``exit_code`` is the process's exit status."""

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
    """There is no connection to the database."""

    exit_code = 69


class EmbeddedServerError(DatabaseUnavailable):
    """The private PostgreSQL could not be started."""


class NoAnswer(OutboxWorkerError):
    """No daemon answers over HTTP, or it does not answer in time."""

    exit_code = 69


class Refused(OutboxWorkerError):
    """A command found a reason not to act, and changed nothing."""

    exit_code = 1


class KeyMissing(OutboxWorkerError):
    """A unique key that an upsert needs was dropped while the worker runs; ``find_problems`` names it."""

    sqlstate: ClassVar[str] = "42P10"


class Inconsistent(OutboxWorkerError):
    """A statement changed another number of rows than it must: a bug of the worker, never the fault of an event."""


class CommitLost(OutboxWorkerError):
    """The connection broke during COMMIT; the transaction was rolled back, or the server no longer knows."""


def in_one_line(error: OutboxWorkerError) -> str:
    """The message of an error and the list below it as one line, for a log record."""
    first, *others = (line.strip() for line in str(error).splitlines())
    return f"{first} {'; '.join(others)}".rstrip()
