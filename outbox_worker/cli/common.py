"""What all commands share: their common options, the way to a database, and failing in one sentence."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from loguru import logger
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database, unavailable
from outbox_worker.database.failures import Failure, classify, describe, server_message, sqlstate
from outbox_worker.errors import OutboxWorkerError, SchemaError
from outbox_worker.escapes import printable
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings, load_settings, unknown_variables
from outbox_worker.telemetry.logs import configure_logging

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file with settings (also OUTBOX_CONFIG).", show_default=False),
]
Limit = Annotated[
    int, typer.Option(metavar="N", min=0, help="Show so many payments of a list, the oldest; --json shows all.")
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")]


def open_database(
    config: Path | None, *, patient: bool = False, deadline_seconds: float = 0.0
) -> tuple[Settings, Database, Tables]:
    """Settings and a database that answers. Its deadline is that of the settings, or ``deadline_seconds`` where that is
    longer; ``patient``: none."""
    settings = load_settings(config=config)
    start_logging(settings)
    longest = max(settings.database_deadline_seconds, deadline_seconds)
    database = Database(settings, deadline_seconds=None if patient else longest)
    database.check()
    return settings, database, build_tables(settings)


def start_logging(settings: Settings) -> None:
    configure_logging(settings.log_level, settings.log_format)
    for name, near in unknown_variables(os.environ).items():
        hint = f"; did you mean {near}?" if near else ""
        logger.bind(event="unknown_setting", variable=name).warning("{} is no setting{}", name, hint)


_REMEDIES = {
    "42P01": "Run `outbox-worker migrate`, or name your table in OUTBOX_TABLES.",
    "3F000": "Run `outbox-worker migrate`, or name your schema in OUTBOX_SCHEMA.",
    "42703": "Name your column in OUTBOX_COLUMNS.",
    "42501": "",
}


def in_a_sentence(error: DBAPIError) -> OutboxWorkerError:
    match classify(error):
        case Failure.RECONNECT | Failure.RETRY:
            return unavailable(error)
        case Failure.PAUSE | Failure.UNCLEAR:
            remedy = _REMEDIES.get(sqlstate(error) or "", "Look at tables, columns and privileges.")
            return SchemaError(f"The database refused: {server_message(error)}. {remedy}".rstrip())
        case _:
            return OutboxWorkerError(f"The database refused: {describe(error)}.")


def fail(error: OutboxWorkerError) -> int:
    """Say why on stderr; the exit status."""
    sentence = "\n".join(map(printable, str(error).split("\n")))
    sys.stderr.write(f"outbox-worker: {sentence}\n")
    return error.exit_code
