"""Commands that hold payments against purchases: `audit`, `backfill`, `duplicates`."""

from __future__ import annotations

import getpass
import os
from typing import Annotated

import typer

from outbox_worker.cli.common import AsJson, Config, Limit, open_database
from outbox_worker.durations import parse_duration, parse_moment
from outbox_worker.errors import WrongUsage

duplicates_app = typer.Typer(help="Payments that are owed back.", no_args_is_help=True)


def audit(config: Config = None, json: AsJson = False, limit: Limit = 100) -> None:
    """Prove that nothing is owed.

    Classes every payment that succeeded and was not refunded, of those that
    were created before the audit began.

    Exit code 1 when a payment is unexplained (money taken, nothing given), or
    when the purchase of a refunded one still is active.
    """
    from outbox_worker import terminal
    from outbox_worker.cli.views import audit as view
    from outbox_worker.reconcile.audit import Audit
    from outbox_worker.reconcile.scan import STATEMENT_SECONDS

    _, database, tables = open_database(config, deadline_seconds=STATEMENT_SECONDS)
    audit = Audit.start(database, tables)
    with terminal.progress("payments", audit.estimate) as told:
        report = audit.run(told)
    if json:
        terminal.print_json(view.audit_object(report))
    else:
        view.print_audit(report, limit)
    raise typer.Exit(0 if report.ok else 1)


def backfill(
    config: Config = None,
    json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Look and count; change nothing.")] = False,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Payments created then or later.", show_default=False)
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Payments created before.", show_default=False)
    ] = None,
    older_than: Annotated[str, typer.Option(metavar="DURATION", help="Leave younger payments to the workers.")] = "5m",
    max_repairs: Annotated[
        int, typer.Option(metavar="N", min=0, help="Stop, making nothing, where more purchases are owed.")
    ] = 1000,
    max_rate: Annotated[
        float | None, typer.Option(metavar="N", min=1, help="Payments looked at per second.", show_default=False)
    ] = None,
    actor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who does it; by default you.", show_default=False)
    ] = None,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why; kept with it.", show_default=False)] = None,
    limit: Limit = 100,
) -> None:
    """Make the purchases that payments prove are owed.

    Finds payments that succeeded and have neither a purchase nor anything that
    explains why not, counts them, and makes what is owed. Safe beside workers
    and other backfills; one that was killed is continued by the next one with
    the same range. TIME is a date or RFC 3339, UTC where it names no zone.

    Exit code 1 when more is owed than --max-repairs, or when something that is
    owed could not be made.
    """
    from outbox_worker import terminal
    from outbox_worker.cli.views import backfill as view
    from outbox_worker.reconcile.backfill import Backfill, Request
    from outbox_worker.reconcile.scan import STATEMENT_SECONDS

    if since and until and parse_moment(until, "--until") <= parse_moment(since, "--since"):
        raise WrongUsage("--until must be later than --since: there is nothing between them.")
    request = Request(
        actor=actor or current_user(),
        reason=reason,
        since=parse_moment(since, "--since") if since else None,
        until=parse_moment(until, "--until") if until else None,
        older_than=parse_duration(older_than, "--older-than"),
        max_repairs=max_repairs,
        max_rate=max_rate,
        dry_run=dry_run,
    )
    settings, database, tables = open_database(config, deadline_seconds=STATEMENT_SECONDS)
    work = Backfill.start(database, tables, settings.retry_policy, request)
    with terminal.progress("payments", work.estimate) as told:
        owed = work.look(told)
    with terminal.progress("purchases", lambda: owed) as told:
        report = work.make(told)
    if json:
        terminal.print_json(view.backfill_object(report))
    else:
        view.print_backfill(report, request.max_repairs, limit)
    raise typer.Exit(0 if report.ok else 1)


def current_user() -> str:
    """The operating system's name for whoever runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@duplicates_app.command("list")
def list_duplicates(
    config: Config = None,
    json: AsJson = False,
    csv: Annotated[bool, typer.Option("--csv", metavar="", help="Print all as CSV, for the accounts.")] = False,
    limit: Limit = 100,
) -> None:
    """List who paid twice for what, oldest first.

    An entry is gone as soon as its payment is refunded.
    """
    from outbox_worker import terminal
    from outbox_worker.cli.views import duplicates as view
    from outbox_worker.reconcile.duplicates import Duplicates
    from outbox_worker.reconcile.scan import STATEMENT_SECONDS

    if json and csv:
        raise WrongUsage("--json or --csv, not both.")
    _, database, tables = open_database(config, deadline_seconds=STATEMENT_SECONDS)
    duplicates = Duplicates.start(database, tables)
    with terminal.progress("payments", duplicates.estimate) as told:
        found = duplicates.list(told)
    if json:
        terminal.print_json(view.duplicates_object(found))
    elif csv:
        view.write_duplicates(found)
    else:
        view.print_duplicates(found, limit)
