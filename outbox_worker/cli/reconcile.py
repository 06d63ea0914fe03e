"""Commands that compare payments with purchases: `audit`, `backfill`, `duplicates`."""

from __future__ import annotations

import getpass
import os
from typing import Annotated

import typer

from outbox_worker.cli.common import AsJson, Config, Limit, mention_standby, open_database, print_object, suggest
from outbox_worker.durations import parse_duration, parse_moment
from outbox_worker.errors import WrongUsage

duplicates_app = typer.Typer(help="List payments that must be refunded.", no_args_is_help=True)

_LOOKING_AGAIN = "checking payments without a purchase"
_LOOK_BACK = "5m"
_MAX_REPAIRS = 1000


def audit(config: Config = None, json: AsJson = False, limit: Limit = 100) -> None:
    """Prove that nothing is owed.

    Assigns every succeeded payment (not refunded) to one class, and counts the
    payments of each class. Leaves out payments that were created after the audit
    began.

    Exit code 1 if a payment is unexplained (paid, but no purchase and no known
    reason), cannot be judged because of a value, or has an unknown status. Also
    exit code 1 if a refunded payment has an active purchase, or if a student has
    more than one active purchase of a course.
    """
    from outbox_worker import terminal
    from outbox_worker.cli.views import audit as view
    from outbox_worker.reconcile.audit import Audit
    from outbox_worker.reconcile.scan import STATEMENT_SECONDS

    _, database, tables = open_database(config, deadline_seconds=STATEMENT_SECONDS, looks=True)
    audit = Audit.start(database, tables)
    with terminal.progress("payments", audit.estimate, then=_LOOKING_AGAIN) as told:
        report = audit.run(told)
    if json:
        print_object(database, view.audit_object(report))
    else:
        mention_standby(database)
        view.print_audit(report, limit)
        suggest(config, *view.next_steps(report))
    raise typer.Exit(0 if report.ok else 1)


def backfill(
    config: Config = None,
    json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Find and count the owed purchases, but change nothing.")
    ] = False,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only payments created at TIME or later.", show_default=False)
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only payments created before TIME.", show_default=False)
    ] = None,
    older_than: Annotated[
        str,
        typer.Option(metavar="DURATION", help="Skip payments younger than DURATION, which workers may still settle."),
    ] = _LOOK_BACK,
    max_repairs: Annotated[
        int, typer.Option(metavar="N", min=0, help="Make no purchase if more than N are owed.")
    ] = _MAX_REPAIRS,
    max_rate: Annotated[
        float | None,
        typer.Option(metavar="N", min=1, help="Read at most N payments per second.", show_default=False),
    ] = None,
    actor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Your name, kept in backfill_runs; default: your user name.", show_default=False
        ),
    ] = None,
    reason: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Your reason, kept in backfill_runs.", show_default=False),
    ] = None,
    limit: Limit = 100,
) -> None:
    """Make the purchases that are owed for payments.

    Finds succeeded payments (not refunded) that have no purchase. Leaves out a
    payment if an event, a dead letter or a decision explains why it has none.
    Counts the other payments, then makes their purchases. You can run backfill
    while workers or other backfills run. If a backfill is killed, run it again with
    the same range. It then continues. TIME is a date or an RFC 3339 time. If TIME
    has no time zone, it is in UTC.

    Exit code 1 if more purchases are owed than --max-repairs allows, if an owed
    purchase could not be made, or if a payment cannot be judged.
    """
    from outbox_worker import terminal
    from outbox_worker.cli.views import backfill as view
    from outbox_worker.reconcile.backfill import Backfill, Request
    from outbox_worker.reconcile.scan import STATEMENT_SECONDS

    if since and until and parse_moment(until, "--until") <= parse_moment(since, "--since"):
        raise WrongUsage("--until must be later than --since.")
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
    settings, database, tables = open_database(config, deadline_seconds=STATEMENT_SECONDS, looks=dry_run)
    work = Backfill.start(database, tables, settings.retry_policy, request)
    with terminal.progress("payments", work.estimate, then=_LOOKING_AGAIN) as told:
        owed = work.look(told)
    with terminal.progress("purchases", lambda: owed, then="retrying locked payments, then finishing") as told:
        report = work.make(told)
    if json:
        print_object(database, view.backfill_object(report))
    else:
        mention_standby(database)
        view.print_backfill(report, max_repairs, limit)
        given = {"--since": since, "--until": until, "--older-than": older_than if older_than != _LOOK_BACK else None}
        span = [word for option, value in given.items() if value for word in (option, value)]
        suggest(config, *view.next_steps(report, span, max_repairs))
    raise typer.Exit(0 if report.ok else 1)


def current_user() -> str:
    """Return the user's name. If the system has no name for the user, return the user id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@duplicates_app.command("list")
def list_duplicates(
    config: Config = None,
    json: AsJson = False,
    csv: Annotated[bool, typer.Option("--csv", metavar="", help="Print all payments as CSV, for accounting.")] = False,
    limit: Limit = 100,
) -> None:
    """List payments of students who paid twice for a course, oldest first.

    A payment disappears from the list when its status becomes `refunded`.
    """
    from outbox_worker import terminal
    from outbox_worker.cli.views import duplicates as view
    from outbox_worker.reconcile.duplicates import Duplicates
    from outbox_worker.reconcile.scan import STATEMENT_SECONDS

    if json and csv:
        raise WrongUsage("Choose --json or --csv, not both.")
    _, database, tables = open_database(config, deadline_seconds=STATEMENT_SECONDS, looks=True)
    duplicates = Duplicates.start(database, tables)
    with terminal.progress("payments", duplicates.estimate, then=_LOOKING_AGAIN) as told:
        found = duplicates.list(told)
    if json:
        print_object(database, view.duplicates_object(found))
    elif csv:
        mention_standby(database, on_stderr=True)
        view.write_duplicates(found)
    else:
        mention_standby(database)
        view.print_duplicates(found, limit)
        suggest(config, *view.next_steps(found))
