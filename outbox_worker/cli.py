"""The command line: parse, call, print, exit code."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Annotated

import typer
from sqlalchemy.exc import DBAPIError

from outbox_worker import __version__
from outbox_worker.database import Database
from outbox_worker.errors import OutboxWorkerError, SchemaError, SettingError, WrongUsage, describe, sqlstate, trace
from outbox_worker.invocation import AsJson, Config, Limit, fail, in_a_sentence, open_database, start_logging
from outbox_worker.model import Guard
from outbox_worker.moments import parse_duration, parse_moment
from outbox_worker.schema import Tables
from outbox_worker.settings import load_settings
from outbox_worker.worklists import duplicates_app, letters_app, why

app = typer.Typer(
    name="outbox-worker",
    help="Turns every paid outbox event into exactly one purchase.\n\n"
    "The purchase is the truth, the mark only evidence: what was paid and never given is given, whatever a mark says.",
    epilog="Every command reads OUTBOX_DATABASE_URL: postgresql://USER:PASSWORD@HOST/DATABASE, or embedded:DIR for a "
    "private PostgreSQL in DIR. Exit codes: 0 fine · 1 something was found · 2 wrong usage · 69 no connection · "
    "78 a setting, table or privilege is wrong.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None if not sys.stdout.isatty() else "rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(duplicates_app, name="duplicates")
app.add_typer(letters_app, name="dead-letters")


WATCH_SECONDS = 2.0


class Option(StrEnum):
    """The optional branches of migrations."""

    UNIQUE_INDEX = "unique_index"
    NOTIFY = "notify"


@app.command()
def run(
    config: Config = None,
    drain: Annotated[bool, typer.Option("--drain", metavar="", help="Settle what is due now, then end.")] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Claim loops in this process (OUTBOX_CONCURRENCY, default 1).", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Events per transaction (OUTBOX_BATCH_SIZE, default 1000).", show_default=False)
    ] = None,
    backfill_every: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Look for payments without a purchase (OUTBOX_BACKFILL_EVERY_SECONDS, default 15m; 0: never).",
            show_default=False,
        ),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR (OUTBOX_LOG_LEVEL).", show_default=False)
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="json or console (OUTBOX_LOG_FORMAT).", show_default=False)
    ] = None,
) -> None:
    """Settle events: the daemon.

    Ends cleanly on SIGTERM or Ctrl-C, after the batch at hand; a second one
    does not wait for it. A database that is away is waited for. Any number of
    workers may run on one database. SIGHUP reads log level and limits again.
    """
    import faulthandler

    from outbox_worker.signals import make_signals
    from outbox_worker.worker import Worker

    read = partial(
        load_settings,
        config=config,
        concurrency=concurrency,
        batch_size=batch_size,
        backfill_every_seconds=_seconds(backfill_every, "--backfill-every"),
        log_level=log_level,
        log_format=log_format,
    )
    settings = read()
    start_logging(settings)
    faulthandler.enable()  # a watchdog's SIGABRT tells where each thread was
    with make_signals() as signals:
        worker = Worker(settings, read)
        status = worker.drain(signals) if drain else worker.run(signals)
    raise typer.Exit(status)


@app.command()
def healthcheck(
    config: Config = None,
    ready: Annotated[bool, typer.Option("--ready", metavar="", help="Ask whether events are being settled.")] = False,
) -> None:
    """Ask the daemon of this machine whether it lives.

    Where it answers is OUTBOX_HTTP_LISTEN. Exit code 1 when it says that it
    does not (or, with --ready, that it settles nothing), 69 when nobody answers.
    """
    from outbox_worker.healthcheck import ask

    well, said = ask(load_settings(config=config).listen, "/readyz" if ready else "/livez")
    typer.echo(said)
    raise typer.Exit(0 if well else 1)


@app.command()
def migrate(
    config: Config = None,
    with_: Annotated[
        list[Option] | None,
        typer.Option(
            "--with",
            help="Also: unique_index (the guard `index`, built without blocking writers) or notify (lower latency).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Create the tables that are absent.

    Tables that exist are adopted and left as they are. Safe to repeat, and on a live database.
    """
    from outbox_worker import console
    from outbox_worker.migration import upgrade

    settings, database, tables = open_database(config, patient=True)
    try:
        done = upgrade(database, settings, tables, [str(option) for option in with_ or []])
    except DBAPIError as error:
        if sqlstate(error) != "42501":
            raise
        said = in_a_sentence(error)
        raise SchemaError(f"{said} migrate runs as the owner of the tables, not as the role of a worker.") from None
    for name in done.created:
        console.line(f"created  {name}")
    for name in done.named:
        console.line(
            f"  CHECK  {name} is new and empty. If you meant a table that exists, drop this one and mend its name.",
            "red",
        )
    for name in done.adopted:
        console.line(f"adopted  {name} (left as it is)")
    for name in done.built:
        console.line(f"built    {name}")
    for name in done.found:
        console.line(f"found    {name} (was in force already)")
    if _say_what_is_missing(database, tables):
        raise typer.Exit(SchemaError.exit_code)
    if not done.created and not done.built:
        console.line("Everything was in place.")


@app.command()
def status(
    config: Config = None,
    json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", metavar="", help="Again every two seconds, until Ctrl-C; outlasts outages.")
    ] = False,
) -> None:
    """Show backlog, guard, dead letters and workers."""
    from outbox_worker import console, reports
    from outbox_worker.status import read_status

    settings, database, tables = open_database(config)

    def show() -> None:
        now = read_status(database, tables, settings.unknown_types)
        if json:
            console.print_json(reports.status_object(now))
        else:
            reports.print_status(now)

    if watch:
        console.repeat(partial(_outlast, show), WATCH_SECONDS, clears=not json)
    else:
        show()


def _outlast(show: Callable[[], None]) -> None:
    """What cannot be shown now is told, and tried again."""
    try:
        show()
    except OutboxWorkerError as error:
        fail(error)
    except DBAPIError as error:
        fail(in_a_sentence(error))


@app.command()
def audit(config: Config = None, json: AsJson = False, limit: Limit = 100) -> None:
    """Prove that nothing is owed.

    Classes every payment that succeeded and was not refunded, of those that
    were created before the audit began.

    Exit code 1 when a payment is unexplained (money taken, nothing given), or
    when the purchase of a refunded one still is active.
    """
    from outbox_worker import console, reports
    from outbox_worker.audit import Audit
    from outbox_worker.sweep import STATEMENT_SECONDS

    _, database, tables = open_database(config, deadline_seconds=STATEMENT_SECONDS)
    audit = Audit(database, tables)
    with console.progress("payments", audit.estimate) as told:
        report = audit.run(told)
    if json:
        console.print_json(reports.audit_object(report))
    else:
        reports.print_audit(report, limit)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def doctor(config: Config = None, json: AsJson = False) -> None:
    """Look for what is wrong with database and set-up, and say what to do.

    Changes nothing. To be run as the worker's role, with its settings. What
    the role may not see is told.

    Exit code 1 when there is a problem; warnings are none.
    """
    from outbox_worker import console, doctor_view
    from outbox_worker.doctor import examine

    settings = load_settings(config=config)
    start_logging(settings)
    report = examine(settings)
    if json:
        console.print_json(doctor_view.doctor_object(report))
    else:
        doctor_view.print_report(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
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
    from outbox_worker import backfill_view, console
    from outbox_worker.backfill import Backfill, Request
    from outbox_worker.sweep import STATEMENT_SECONDS

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
    work = Backfill(database, tables, settings.retry_policy, request)
    with console.progress("payments", work.estimate) as told:
        owed = work.look(told)
    with console.progress("purchases", lambda: owed) as told:
        report = work.make(told)
    if json:
        console.print_json(backfill_view.backfill_object(report))
    else:
        backfill_view.print_backfill(report, request.max_repairs, limit)
    raise typer.Exit(0 if report.ok else 1)


app.command()(why)


@app.command()
def demo(
    payments: Annotated[int, typer.Option(min=50, max=1_000_000, help="How many payments to make.")] = 2000,
) -> None:
    """See it work: payments, troubles, a killed worker, the proof.

    Everything is real and runs on a private PostgreSQL of its own:
    OUTBOX_DATABASE_URL is ignored. Exit code 1 when a payment stayed
    unexplained or a purchase was made twice.
    """
    from outbox_worker import console, reports
    from outbox_worker.demo import run_demo
    from outbox_worker.demo_view import print_events, print_sentence

    proof = run_demo(payments)
    if proof is None:
        console.line("Interrupted; nothing was proved, and nothing is left running.")
        return
    print_events(proof.outcomes)
    reports.print_audit(proof.audit, 100)
    print_sentence(proof.sentence(), "bold green" if proof.holds else "bold red")
    raise typer.Exit(0 if proof.holds else 1)


@app.command()
def bench(
    config: Config = None,
    json: AsJson = False,
    events: Annotated[int, typer.Option(min=1000, max=10_000_000, help="Events to drain in each round.")] = 50_000,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often each contestant drains them.")] = 3,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Claim loops, and bare connections.")] = 1,
    guard: Annotated[Guard, typer.Option(metavar="GUARD", help="index or lock.")] = Guard.INDEX,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Also from a producer's COMMIT to the purchase.")
    ] = True,
) -> None:
    """Measure this machine and database: the worker beside the bare SQL.

    Runs in a database of its own, outbox_worker_bench, on the server of
    OUTBOX_DATABASE_URL, and drops it afterwards. The role must be allowed to
    create databases.
    """
    from outbox_worker import console, reports
    from outbox_worker.bench import Plan, run_bench

    settings = load_settings(config=config)
    plan = Plan(events=events, rounds=rounds, concurrency=concurrency, guard=guard, latency=latency)
    report = run_bench(settings, plan, say=lambda step: typer.echo(step, err=True))
    if json:
        console.print_json(reports.bench_object(report))
    else:
        reports.print_bench(report)


@app.command(context_settings={"ignore_unknown_options": True})
def psql(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Arguments for psql, after `--`.", show_default=False)
    ] = None,
    config: Config = None,
) -> None:
    """Open psql on the private PostgreSQL of embedded:DIR."""
    import subprocess

    from outbox_worker.embedded import ensure_server, find_binaries

    settings = load_settings(config=config)
    directory = settings.embedded_directory
    if directory is None:
        raise SettingError("OUTBOX_DATABASE_URL is a server of your own: connect to it with your own psql.")
    where = ensure_server(directory, bin_dir=settings.embedded_bin_dir)
    program = find_binaries(settings.embedded_bin_dir) / "psql"
    flags = [f"--{key}={where[name]}" for key, name in (("host", "host"), ("username", "user"), ("dbname", "dbname"))]
    raise typer.Exit(subprocess.run([program, *flags, *(arguments or [])], check=False).returncode)  # noqa: S603


def _seconds(duration: str | None, option: str) -> float | None:
    return None if duration is None else parse_duration(duration, option).total_seconds()


def current_user() -> str:
    """The operating system's name for whoever runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _say_what_is_missing(database: Database, tables: Tables) -> bool:
    """An adopted table can lack what the worker needs; migrate does not alter it, but says so."""
    from outbox_worker import console
    from outbox_worker.health import find_problems

    with database.transaction() as session:
        problems = find_problems(session, tables)
    for problem in problems:
        console.line(f"problem  {problem.finding}\n         {problem.remedy}", "yellow")
    return bool(problems)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"outbox-worker {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_show_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    pass


def run_command() -> int:
    """Run the command line and return its exit status; every foreseen failure is one sentence on stderr."""
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
        if isinstance(error, OSError):
            raise
        return _fail_unforeseen(error)
    return 0


def _fail(error: OutboxWorkerError) -> int:
    """Whoever asked for an object gets one, also now."""
    from outbox_worker.console import print_json

    if "--json" in sys.argv[1:]:
        print_json({"ok": False, "error": str(error)})
    return fail(error)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error is only what a signal left behind: libraries clean up, and fail at that."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _fail_unforeseen(error: Exception) -> int:
    """Our own error, and where it was raised; a message, or that of a cause, may repeat what a row says."""
    places = "".join(f"\n  {place}" for place in trace(error))
    sys.stderr.write(f"outbox-worker: An error of ours, please report it: {describe(error)}{places}\n")
    return 1
