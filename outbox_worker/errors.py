"""All errors of the program, as a tree.

Each line shows the exit code of a command that raises the error, and the meaning of the error.
Parentheses contain the reaction of a running worker, or the class of failure. The class of failure
decides what happens to the batch in which the error was raised.

    OutboxWorkerError         exit 70   an error of the program itself
    ├── SettingError          exit 78   a setting or a URL cannot be used
    │   └── WrongUsage        exit 2    an option of the command line cannot be used
    ├── SchemaError           exit 78   a table, column or privilege is missing (a running worker pauses)
    ├── DatabaseUnavailable   exit 69   no connection to the database (a running worker waits)
    ├── EmbeddedServerError   exit 69   the private PostgreSQL cannot be started
    ├── NoAnswer              exit 69   no worker answers over HTTP
    ├── Refused               exit 1    a command found a reason not to act, and changed nothing
    ├── NotProved             exit 1    a demonstration or benchmark failed, so it proves nothing
    ├── CommitLost            exit 69   the connection broke during COMMIT, so perhaps nothing is committed (reconnect)
    ├── KeyMissing            exit 78   a unique key that an upsert needs was dropped (a running worker pauses)
    ├── NothingWritten        exit 1    a trigger, a rule or another program prevented the write of a row (pause)
    ├── DefaultTaken          exit 78   a column default, such as a sequence, gives new rows a used key (pause)
    ├── NothingRecorded       exit 69   the database refuses to record the outcome of any event of a batch (unclear)
    ├── PairTaken             exit 69   another transaction made a purchase of this student and course first (retry)
    └── Inconsistent          exit 70   a statement did not change as many rows as it must (a bug)
        └── Swallowed         exit 1    a trigger, rule or row security made a statement change too few rows (unclear)

The program does not wrap errors that the database reports. ``database.failures.classify`` returns
the class of failure of each of these errors. ``settle`` uses the class to decide what to do.
"""

from __future__ import annotations

from typing import ClassVar


class OutboxWorkerError(Exception):
    """The base of all errors whose message is written for the operator.

    A command that raises an ``OutboxWorkerError`` exits with the error's ``exit_code``. Scripts
    read the code 1 as a finding, for example as a payment that `audit` cannot explain. An error of
    the program itself therefore never has the code 1.
    """

    exit_code: ClassVar[int] = 70


class SettingError(OutboxWorkerError):
    """A setting or a URL that cannot be used."""

    exit_code = 78


class WrongUsage(SettingError):
    """An option of the command line that cannot be used."""

    exit_code = 2


class SchemaError(OutboxWorkerError):
    """A missing table, column or privilege that the worker needs."""

    exit_code = 78


class DatabaseUnavailable(OutboxWorkerError):
    """A failure to connect to the database."""

    exit_code = 69


class EmbeddedServerError(DatabaseUnavailable):
    """A failure to start or stop the private PostgreSQL."""


class NoAnswer(OutboxWorkerError):
    """A missing HTTP answer: no worker listens, or the worker does not answer in time."""

    exit_code = 69


class Refused(OutboxWorkerError):
    """A refusal: a command found a reason not to act, and changed nothing."""

    exit_code = 1


class NotProved(OutboxWorkerError):
    """A demonstration or benchmark that failed, so it proves nothing."""

    exit_code = 1


class KeyMissing(OutboxWorkerError):
    """A missing unique key that an upsert needs. Somebody dropped the key while the worker was running.

    ``find_problems`` finds out which key was dropped.
    """

    exit_code = 78
    sqlstate: ClassVar[str] = "42P10"


class DefaultTaken(OutboxWorkerError):
    """A key from a column default, such as a sequence, that another row already has. No event is at fault."""

    exit_code = 78


class NothingRecorded(OutboxWorkerError):
    """A refusal of the database to record the outcome of any event of a batch."""

    exit_code = 69


class NothingWritten(OutboxWorkerError):
    """A write that changed fewer rows than it must, because of a trigger, a rule or another program.

    A command that raises this error has rolled back its last transaction, and exits with 1.
    """

    exit_code = 1


class PairTaken(OutboxWorkerError):
    """A second active purchase of a student and course, found before COMMIT. The worker runs the transaction again.

    Another transaction can insert a second purchase only while DROP INDEX CONCURRENTLY drops the
    unique index.
    """

    exit_code = 69

    sqlstate: ClassVar[str] = "40001"


class Again(OutboxWorkerError):
    """Numbers of written rows that do not match. The batch is rolled back, and settled in a careful transaction."""

    exit_code = 69


class Inconsistent(OutboxWorkerError):
    """A statement that did not change as many rows as it must. This is a bug of the worker; no event is at fault."""

    exit_code = 70


class Swallowed(Inconsistent):
    """A statement that changed fewer rows than it must, and raised no error.

    The cause is a trigger that returns NULL, a rule, or row security.
    """

    exit_code = 1

    def __init__(self, command: str, relation: str, touched: int, rows: int) -> None:
        super().__init__(f"{command} on {relation} changed {touched} of {rows} rows and raised no error")
        self.command, self.relation = command, relation


class CommitLost(OutboxWorkerError):
    """A COMMIT without an answer, because the connection broke.

    Raised if the transaction was rolled back, or if the server no longer knows whether the
    transaction was committed.
    """

    exit_code = 69


def in_one_line(error: OutboxWorkerError) -> str:
    """Join the lines of an error's message into one line for a log record."""
    first, *others = (line.strip() for line in str(error).splitlines())
    return f"{first} {'; '.join(others)}".rstrip()
