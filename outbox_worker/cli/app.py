"""Lists every command of the command line and determines the exit status of the program."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from sqlalchemy.exc import DBAPIError

from outbox_worker import __version__
from outbox_worker.cli import daemon, dead_letters, diagnose, files, reconcile, setup, showcase
from outbox_worker.cli.common import fail, in_a_sentence
from outbox_worker.database.failures import describe, trace
from outbox_worker.errors import OutboxWorkerError

app = typer.Typer(
    name="outbox-worker",
    help="Turns every paid outbox event into exactly one purchase.\n\n"
    "A succeeded payment gets its purchase even if its event is already marked as processed.",
    epilog="Set OUTBOX_DATABASE_URL for every command: postgresql://USER:PASSWORD@HOST/DATABASE, or embedded:DIR for a "
    "private PostgreSQL in DIR.\n\nExit codes: 0 success · 1 the command found a problem · 2 wrong usage · "
    "69 no connection · 70 an error in the program · 78 a setting, table or privilege is wrong.",
    no_args_is_help=True,
    rich_markup_mode=None if not sys.stdout.isatty() else "rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(daemon.run)
app.command()(daemon.healthcheck)
app.command()(setup.migrate)
app.command()(diagnose.status)
app.command()(reconcile.audit)
app.command()(diagnose.doctor)
app.command()(reconcile.backfill)
app.command()(diagnose.why)
app.command()(showcase.demo)
app.command()(showcase.bench)
app.command()(files.files)
app.command(context_settings={"ignore_unknown_options": True})(setup.psql)
app.add_typer(reconcile.duplicates_app, name="duplicates")
app.add_typer(dead_letters.letters_app, name="dead-letters")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"outbox-worker {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def run_command() -> int:
    """Run the command line and return its exit status. Print every expected error as one sentence on stderr."""
    try:
        app()
    except OutboxWorkerError as error:
        return _fail(error)
    except SystemExit as ended:
        return int(ended.code or 0)
    except Exception as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from None
        if isinstance(error, DBAPIError):
            return _fail(in_a_sentence(error))
        if isinstance(error, OSError) and error.filename is None:
            raise  # perhaps stdout cannot be written; `__main__` handles this error
        return fail_unforeseen(error)
    return 0


def _fail(error: OutboxWorkerError) -> int:
    """Print the error on stderr and return its exit status.

    With ``--json``, also print the error as an object on stdout.
    """
    from outbox_worker.terminal import print_json

    if "--json" in sys.argv[1:]:
        print_json({"ok": False, "error": str(error)})
    return fail(error)


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused this error.

    Ctrl-C can interrupt a library. The clean-up of the library can then raise another error.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def fail_unforeseen(error: Exception) -> int:
    """Print an unexpected error with its lines of code. Return the exit status of program errors.

    Do not print the error's message. It can contain data of a row.
    """
    from outbox_worker.terminal import complain

    places = "".join(f"\n  {place}" for place in trace(error))
    complain(f"outbox-worker: This is a bug. Please report it: {describe(error)}{places}")
    return OutboxWorkerError.exit_code
