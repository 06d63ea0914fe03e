"""Options and helpers that all commands share: open the database, suggest the next command, print an error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from loguru import logger
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database, unavailable
from outbox_worker.database.failures import Failure, classify, describe, server_message, sqlstate
from outbox_worker.database.sessions import Standby, find_read_only_default, find_standby
from outbox_worker.durations import ago
from outbox_worker.errors import DatabaseUnavailable, OutboxWorkerError, Refused, SchemaError, SettingError
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings, load_settings, unknown_variables
from outbox_worker.telemetry.logs import configure_logging

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file with settings (default: OUTBOX_CONFIG).", show_default=False),
]
Limit = Annotated[
    int, typer.Option(metavar="N", min=0, help="Show the oldest N payments of each list; --json shows all.")
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")]


def open_database(
    config: Path | None, *, patient: bool = False, deadline_seconds: float = 0.0, looks: bool = False
) -> tuple[Settings, Database, Tables]:
    """Load the settings and connect to the database.

    The time limit of a statement is ``deadline_seconds`` or the setting
    ``database_deadline_seconds``, whichever is longer. If ``patient`` is True, statements have no
    time limit. If ``looks`` is True, the command only reads. The server can then be a standby.
    Raises SettingError and DatabaseUnavailable.
    """
    settings = load_settings(config=config)
    start_logging(settings)
    longest = max(settings.database_deadline_seconds, deadline_seconds)
    database = Database(settings, deadline_seconds=None if patient else longest, looks=looks)
    database.check()
    if not looks:
        _expect_writable(database)
    return settings, database, build_tables(settings)


def _expect_writable(database: Database) -> None:
    """Raise SettingError if default_transaction_read_only is on.

    Somebody has probably set it on purpose. Only the daemon overrides it.
    """
    with database.snapshot() as session:
        found = find_read_only_default(session)
    if found is not None:
        raise SettingError(
            f"This command writes, but default_transaction_read_only is on {found.place}. Use a role for which it is "
            f"off, or: {found.remedy}"
        )


def print_object(database: Database, value: Mapping[str, Any]) -> None:
    """Print a command's JSON object. If the server is a standby, add the key ``standby``."""
    from outbox_worker import terminal

    standby = _standby_of(database)
    terminal.print_json(value if standby is None else {**value, "standby": standby})


def mention_standby(database: Database, *, on_stderr: bool = False) -> None:
    """Print how far a standby is behind the primary. Print nothing if the server is a primary."""
    from outbox_worker import terminal

    if (standby := _standby_of(database)) is None:
        return
    if standby.behind_seconds is None:
        line = "Looked at a standby; how far it is behind the primary is unknown."
    else:
        line = f"Looked at a standby, which is at most {ago(standby.behind_seconds)} behind the primary."
    if on_stderr:
        terminal.complain(line)
    else:
        terminal.line(line, "yellow")


def _standby_of(database: Database) -> Standby | None:
    with database.snapshot() as session:
        return find_standby(session)


def start_logging(settings: Settings) -> None:
    """Configure the log, and warn about OUTBOX_ variables that are not settings."""
    configure_logging(settings.log_level, settings.log_format)
    for name, near in unknown_variables(os.environ).items():
        hint = f"; did you mean {near}?" if near else ""
        logger.bind(event="unknown_setting", variable=name).warning("{} is not a setting{}", name, hint)


def suggest(config: Path | None, *commands: Sequence[str]) -> None:
    """Print the commands to run next, with the same ``--config`` as this command.

    Ids are the last words of a command. Put ``--`` before an id that begins with a hyphen. Without
    ``--``, the command would read this id as an option.
    """
    from outbox_worker import terminal

    ending = ["--config", str(config)] if config else []
    printed = []
    for words in commands:
        options, ids = _split_at_ids(words)
        printed.append(["outbox-worker", *options, *ending, *ids] if ids else ["outbox-worker", *words, *ending])
    terminal.next_commands(printed)


def as_ids(ids: Sequence[str]) -> list[str]:
    """Return ids as command-line words, after ``--`` if one of them begins with a hyphen."""
    return ["--", *ids] if any(each.startswith("-") for each in ids) else [*ids]


def _split_at_ids(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Split a command before the ids that must follow ``--``.

    The second part is empty if no id must follow ``--``.
    """
    if "--" in words:
        at = words.index("--")
        return words[:at], words[at:]
    *options, last = words
    return (options, as_ids([last])) if last.startswith("-") and not last.startswith("--") else (words, ())


_REMEDIES = {
    "42P01": "Run `outbox-worker migrate`, or name your table in OUTBOX_TABLES.",
    "3F000": "Run `outbox-worker migrate`, or name your schema in OUTBOX_SCHEMA.",
    "42703": "Name your column in OUTBOX_COLUMNS.",
    "42501": "",
}
"""The remedy to print for each SQLSTATE. If the text is empty, no remedy is printed."""
_UNSTORABLE = ("22021", "22P05")
"""The SQLSTATEs of errors about a character that the encoding of the database cannot store."""

_AGAIN = "Run the command again."
_TROUBLES = {
    "55P03": "Another transaction holds a lock that this command needs, and did not release it in time. Wait until "
    "that transaction ends, or end it. Then run the command again.",
    "57014": "PostgreSQL cancelled a statement of this command: it took longer than statement_timeout or "
    "OUTBOX_DATABASE_DEADLINE_SECONDS allows, or a person cancelled it. Run the command again.",
    "40P01": f"This command and another transaction waited for each other's locks, again and again. {_AGAIN}",
    "40001": f"Another transaction changed the same rows at the same time, again and again. {_AGAIN}",
    "25006": "This server or this role accepts no writes, but the command must write: the server is a standby, or "
    "default_transaction_read_only is on.",
}
"""The sentence for each SQLSTATE of an error that can be temporary. Omits lost connections."""


def in_a_sentence(error: DBAPIError) -> OutboxWorkerError:
    """Convert a database error into an error that has one sentence, a remedy and an exit code."""
    if sentence := _TROUBLES.get(sqlstate(error) or ""):
        return DatabaseUnavailable(f"{sentence} ({server_message(error)})")
    match classify(error):
        case Failure.RECONNECT:
            return unavailable(error)
        case Failure.RETRY:
            return DatabaseUnavailable(f"Other transactions block this command: {server_message(error)}. {_AGAIN}")
        case Failure.EVENT:
            return Refused(_refusal(error))
        case Failure.PAUSE | Failure.UNCLEAR:
            remedy = _REMEDIES.get(sqlstate(error) or "", "Run `outbox-worker doctor` to check tables and privileges.")
            return SchemaError(f"The database refused: {server_message(error)}. {remedy}".rstrip())
        case _:
            return OutboxWorkerError(f"This is a bug. Please report it: {describe(error)}")


def _refusal(error: DBAPIError) -> str:
    """Return the sentence for a row or a value that the database refuses."""
    if sqlstate(error) in _UNSTORABLE:
        return f"The encoding of the database has no such character: {server_message(error)}."
    return f"The database refused: {describe(error)}. Nothing was changed."


def fail(error: OutboxWorkerError) -> int:
    """Print the error on stderr and return its exit status."""
    from outbox_worker import terminal

    terminal.complain(f"outbox-worker: {error}")
    return error.exit_code
