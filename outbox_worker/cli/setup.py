"""Commands that set up a database: `migrate` creates the tables, `psql` opens the private PostgreSQL."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from sqlalchemy.exc import DBAPIError

from outbox_worker.cli.common import Config, in_a_sentence, open_database, suggest
from outbox_worker.database.engine import Database
from outbox_worker.database.failures import sqlstate
from outbox_worker.errors import SchemaError, SettingError
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import load_settings


class Option(StrEnum):
    """An optional migration."""

    UNIQUE_INDEX = "unique_index"
    NOTIFY = "notify"


def migrate(
    config: Config = None,
    with_: Annotated[
        list[Option] | None,
        typer.Option(
            "--with",
            help="Also create unique_index (it prevents a second active purchase; writers are not blocked) or notify "
            "(workers get new events sooner).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Create the tables that are missing.

    Never alters an existing table. The worker uses existing tables as they are.
    You can run this command again at any time, even while the database is in use.
    """
    from outbox_worker import terminal
    from outbox_worker.schema.migrate import upgrade

    settings, database, tables = open_database(config, patient=True)
    try:
        done = upgrade(database, settings, tables, [str(option) for option in with_ or []])
    except DBAPIError as error:
        if sqlstate(error) != "42501":
            raise
        sentence = in_a_sentence(error)
        raise SchemaError(
            f"{sentence} Run `outbox-worker migrate` as the owner of the tables, not as the role of a worker."
        ) from None
    for name in done.created:
        terminal.line(f"created  {name}")
    for name in done.named:
        terminal.line(
            f"  CHECK  {name} is new and empty. If you meant an existing table, drop this one and correct the name.",
            "red",
        )
    for name in done.adopted:
        terminal.line(f"adopted  {name} (left as it is)")
    for name in done.built:
        terminal.line(f"built    {name}")
    for name in done.found:
        terminal.line(f"found    {name} (already in force)")
    if _say_what_is_missing(database, tables):
        raise typer.Exit(SchemaError.exit_code)
    if not done.created and not done.built:
        terminal.line("Nothing to do: everything is in place.")
    suggest(config, ["doctor"])


def _say_what_is_missing(database: Database, tables: Tables) -> bool:
    """Print problems and warnings about tables, with remedies. Return True if there is a problem.

    The worker cannot start if there is a problem.
    """
    from outbox_worker import terminal
    from outbox_worker.schema.concerns import find_concerns
    from outbox_worker.schema.nullable import find_nullable
    from outbox_worker.schema.requirements import find_problems

    with database.transaction() as session:
        problems = find_problems(session, tables)
        concerns = [*find_nullable(session, tables), *find_concerns(session, tables)]
    for each in concerns:
        terminal.line(f"warning  {each.finding}\n         {each.remedy}", "yellow")
    for problem in problems:
        terminal.line(f"problem  {problem.finding}\n         {problem.remedy}", "yellow")
    return bool(problems)


def psql(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Arguments for psql; put them after `--`.", show_default=False)
    ] = None,
    config: Config = None,
) -> None:
    """Open psql on the private PostgreSQL of embedded:DIR."""
    import subprocess

    from outbox_worker.embedded.server import ensure_server, find_binaries

    settings = load_settings(config=config)
    directory = settings.embedded_directory
    if directory is None:
        raise SettingError(
            "OUTBOX_DATABASE_URL is not embedded:DIR but a server of your own. Connect to it with your own psql."
        )
    where = ensure_server(directory, bin_dir=settings.embedded_bin_dir)
    program = find_binaries(settings.embedded_bin_dir) / "psql"
    flags = [f"--{key}={where[name]}" for key, name in (("host", "host"), ("username", "user"), ("dbname", "dbname"))]
    raise typer.Exit(subprocess.run([program, *flags, *(arguments or [])], check=False).returncode)  # noqa: S603
