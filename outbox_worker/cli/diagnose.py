"""Commands that only read: `status`, `doctor`, `why`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from sqlalchemy.exc import DBAPIError

from outbox_worker.cli.common import (
    AsJson,
    Config,
    fail,
    in_a_sentence,
    mention_standby,
    open_database,
    print_object,
    start_logging,
    suggest,
)
from outbox_worker.errors import OutboxWorkerError
from outbox_worker.settings import load_settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from outbox_worker.database.engine import Database
    from outbox_worker.diagnose.explanation import Explanation
    from outbox_worker.schema.tables import Tables


WATCH_SECONDS = 2.0


def status(
    config: Config = None,
    json: AsJson = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", metavar="", help="Repeat every two seconds until Ctrl-C, even while the database is down."
        ),
    ] = False,
) -> None:
    """Show backlog, guard, dead letters and workers."""
    from outbox_worker import terminal
    from outbox_worker.cli.views import status as view
    from outbox_worker.diagnose.status import read_status

    settings, database, tables = open_database(config, looks=True)

    def show() -> None:
        now = read_status(database, tables, settings.unknown_types)
        if json:
            print_object(database, view.status_object(now))
        else:
            mention_standby(database)
            view.print_status(now)
            suggest(config, *(view.next_steps(now) if not watch else []))

    if watch:
        terminal.show_repeatedly(partial(_outlast, show), WATCH_SECONDS, clears=not json)
    else:
        show()


def _outlast(show: Callable[[], None]) -> None:
    """Call ``show``. If it fails, print the error and return. The caller can try again later."""
    try:
        show()
    except OutboxWorkerError as error:
        fail(error)
    except DBAPIError as error:
        fail(in_a_sentence(error))


def doctor(config: Config = None, json: AsJson = False) -> None:
    """Check database and set-up, and suggest a remedy for each problem.

    Changes nothing. Run doctor as the worker's role, with the worker's settings,
    on the primary. A check is not possible if the role lacks a privilege or if the
    server is a standby. Doctor lists these checks, too.

    Exit code 1 if there is a problem. Warnings alone give exit code 0.
    """
    from outbox_worker import terminal
    from outbox_worker.cli.views import doctor as view
    from outbox_worker.diagnose.doctor.report import examine

    settings = load_settings(config=config)
    start_logging(settings)
    report = examine(settings)
    if json:
        terminal.print_json(view.doctor_object(report))
    else:
        view.print_report(report)
    raise typer.Exit(0 if report.ok else 1)


def why(
    asked: Annotated[
        str,
        typer.Argument(metavar="ID", help="Id of an event, payment, purchase or student.", show_default=False),
    ],
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Explain an event, payment, purchase or student.

    Shows all records, the rule that decided, and what would happen now. Uses the
    same facts and rules as the worker. Changes nothing.
    """
    from outbox_worker.cli.views import explanation

    with looking(config) as (database, _, _, explain):
        found = explain(asked.encode(errors="replace").decode())  # the text can be invalid
    if json:
        print_object(database, explanation.explanation_object(found))
    else:
        mention_standby(database)
        explanation.print_explanation(found)
        suggest(config, *explanation.next_steps(found))


@contextmanager
def looking(config: Path | None) -> Iterator[tuple[Database, Session, Tables, Callable[[str], Explanation]]]:
    """Open a read-only snapshot.

    Yields the database, the session, the tables, and a function that explains an id.
    """
    from outbox_worker.diagnose.explanation import explain
    from outbox_worker.reconcile.scan import STATEMENT_SECONDS
    from outbox_worker.schema.privileges import EXPLAINING
    from outbox_worker.schema.requirements import check_schema
    from outbox_worker.settle.handlers import claimed_types

    settings, database, tables = open_database(config, deadline_seconds=STATEMENT_SECONDS, looks=True)
    with database.snapshot() as session:
        tables = check_schema(session, tables, EXPLAINING)
        types = claimed_types(session, tables, settings.unknown_types)
        yield database, session, tables, partial(explain, session, tables, settings.retry_policy, types)
