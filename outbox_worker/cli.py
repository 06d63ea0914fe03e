"""The command line: parse, call, print, exit code."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer
from loguru import logger
from sqlalchemy.exc import DBAPIError

from outbox_worker import __version__
from outbox_worker.database import Database, unavailable
from outbox_worker.errors import (
    Failure,
    OutboxWorkerError,
    SchemaError,
    SettingError,
    WrongUsage,
    classify,
    describe,
    said,
    sqlstate,
    trace,
)
from outbox_worker.model import DeadLetterState, Guard
from outbox_worker.moments import parse_duration, parse_moment
from outbox_worker.schema import Tables, build_tables
from outbox_worker.settings import Settings, load_settings, unknown_variables
from outbox_worker.telemetry import configure_logging

if TYPE_CHECKING:
    from outbox_worker.dead_letters import Selection

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
duplicates_app = typer.Typer(help="Payments that are owed back.", no_args_is_help=True)
app.add_typer(duplicates_app, name="duplicates")
letters_app = typer.Typer(help="Events that wait for a person.", no_args_is_help=True)
app.add_typer(letters_app, name="dead-letters")


WATCH_SECONDS = 2.0


class Option(StrEnum):
    """The optional branches of migrations."""

    UNIQUE_INDEX = "unique_index"
    NOTIFY = "notify"


Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file with settings (also OUTBOX_CONFIG).", show_default=False),
]
Limit = Annotated[
    int, typer.Option(metavar="N", min=0, help="Show so many payments of a list, the oldest; --json shows all.")
]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")]


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
    workers may run on one database.
    """
    from outbox_worker.signals import Signals
    from outbox_worker.worker import Worker

    settings = load_settings(
        config=config,
        concurrency=concurrency,
        batch_size=batch_size,
        backfill_every_seconds=_seconds(backfill_every, "--backfill-every"),
        log_level=log_level,
        log_format=log_format,
    )
    _start_logging(settings)
    with Signals() as signals:
        worker = Worker(settings)
        status = worker.drain(signals) if drain else worker.run(signals)
    raise typer.Exit(status)


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

    settings, database, tables = _open(config, patient=True)
    try:
        done = upgrade(database, settings, tables, [str(option) for option in with_ or []])
    except DBAPIError as error:
        if sqlstate(error) != "42501":
            raise
        said = _in_a_sentence(error)
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

    settings, database, tables = _open(config)

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
        _fail(error)
    except DBAPIError as error:
        _fail(_in_a_sentence(error))


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

    _, database, tables = _open(config, deadline_seconds=STATEMENT_SECONDS)
    audit = Audit(database, tables)
    with console.progress("payments", audit.estimate) as told:
        report = audit.run(told)
    if json:
        console.print_json(reports.audit_object(report))
    else:
        reports.print_audit(report, limit)
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

    request = Request(
        actor=actor or _user(),
        reason=reason,
        since=parse_moment(since, "--since") if since else None,
        until=parse_moment(until, "--until") if until else None,
        older_than=parse_duration(older_than, "--older-than"),
        max_repairs=max_repairs,
        max_rate=max_rate,
        dry_run=dry_run,
    )
    settings, database, tables = _open(config, deadline_seconds=STATEMENT_SECONDS)
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


EventIds = Annotated[
    list[UUID] | None, typer.Argument(metavar="EVENT_ID", help="Events, by their ids.", show_default=False)
]
DeadReason = Annotated[
    str | None,
    typer.Option("--dead-reason", metavar="REASON", help="Only those dead of this reason.", show_default=False),
]
OfType = Annotated[
    str | None, typer.Option("--type", metavar="TYPE", help="Only events of this type.", show_default=False)
]
OlderThan = Annotated[
    str | None,
    typer.Option(metavar="DURATION", help="Only those dead for so long: 90s, 5m, 2h, 1d.", show_default=False),
]
AllOfThem = Annotated[bool, typer.Option("--all", metavar="", help="All open dead letters.")]
Actor = Annotated[str | None, typer.Option(metavar="NAME", help="Who decides.", show_default=False)]
Why = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why; it is kept.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", metavar="", help="Only show what it would be about.")]
Token = Annotated[
    str | None,
    typer.Option(
        "--preview", metavar="TOKEN", help="Only if nothing changed since that --dry-run.", show_default=False
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask whether to go on.")]


@letters_app.command("list")
def list_dead_letters(
    config: Config = None,
    json: AsJson = False,
    state: Annotated[
        DeadLetterState, typer.Option(metavar="STATE", help="open, requeued, discarded or settled.")
    ] = DeadLetterState.OPEN,
    reason: Annotated[
        str | None,
        typer.Option(
            "--reason", "--dead-reason", metavar="REASON", help="Only those dead of this reason.", show_default=False
        ),
    ] = None,
    event_type: OfType = None,
    older_than: OlderThan = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="At most so many, oldest first.")] = 100,
    after: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Go on behind a page; it says where.", show_default=False)
    ] = None,
) -> None:
    """List dead letters, oldest first."""
    from outbox_worker import console, reports
    from outbox_worker.dead_letters import Place, Selection, list_letters
    from outbox_worker.health import check_schema

    age = parse_duration(older_than, "--older-than") if older_than else None
    selection = Selection(state=state, reason=reason, event_type=event_type, older_than=age)
    place = Place.parse(after) if after else None
    _, database, tables = _open(config)
    with database.transaction() as session:
        check_schema(session, tables, {"dead_letters": ("SELECT",)})
        page = list_letters(session, tables, selection, after=place, limit=limit)
    if json:
        console.print_json({"dead_letters": page.letters, "next": page.end and str(page.end)})
        return
    reports.print_letters(page, state)


@letters_app.command("requeue")
def requeue_dead_letters(
    events: EventIds = None,
    *,
    config: Config = None,
    json: AsJson = False,
    all_: AllOfThem = False,
    dead_reason: DeadReason = None,
    event_type: OfType = None,
    older_than: OlderThan = None,
    actor: Actor = None,
    why: Why = None,
    dry_run: DryRun = False,
    preview: Token = None,
    yes: Yes = False,
) -> None:
    """Try dead events again, as if they came now.

    Those named by their event ids, or all open ones that match. Says first
    how many they are and how much money they are about.
    """
    selection = _select(events, all_, dead_reason, event_type, older_than)
    _decide(config, "requeue", selection, json=json, actor=actor, why=why, dry_run=dry_run, token=preview, yes=yes)


@letters_app.command("discard")
def discard_dead_letters(
    events: EventIds = None,
    *,
    config: Config = None,
    json: AsJson = False,
    all_: AllOfThem = False,
    dead_reason: DeadReason = None,
    event_type: OfType = None,
    older_than: OlderThan = None,
    actor: Actor = None,
    why: Why = None,
    dry_run: DryRun = False,
    preview: Token = None,
    yes: Yes = False,
) -> None:
    """Close dead letters for good: nothing is owed for them.

    The audit counts their payments as waived from then on, by whom and why.
    """
    selection = _select(events, all_, dead_reason, event_type, older_than)
    _decide(config, "discard", selection, json=json, actor=actor, why=why, dry_run=dry_run, token=preview, yes=yes)


def _select(
    events: list[UUID] | None, all_: bool, reason: str | None, event_type: str | None, older_than: str | None
) -> Selection:
    from outbox_worker.dead_letters import Selection

    chosen = bool(reason or event_type or older_than)
    if bool(events) == (all_ or chosen):
        raise WrongUsage("Name events by their ids, or choose open ones: --all, --dead-reason, --type, --older-than.")
    age = parse_duration(older_than, "--older-than") if older_than else None
    return Selection(event_ids=events or (), reason=reason, event_type=event_type, older_than=age)


def _decide(
    config: Path | None,
    verb: str,
    selection: Selection,
    *,
    json: bool,
    actor: str | None,
    why: str | None,
    dry_run: bool,
    token: str | None,
    yes: bool,
) -> None:
    """Show what a decision is about; ask who and why; carry it out."""
    from outbox_worker import console, reports
    from outbox_worker.dead_letters import Decision, check_decidable, decide_letters, preview
    from outbox_worker.health import DECIDING, check_schema

    decision, is_asked = Decision(verb), sys.stdin.isatty() and sys.stderr.isatty()
    if not dry_run and not is_asked and not (actor and why):
        raise WrongUsage("--actor and --reason are required where nobody can be asked.")
    _, database, tables = _open(config, patient=True)
    with database.snapshot() as session:
        tables = check_schema(session, tables, DECIDING)
        check_decidable(session, tables, selection, decision)
        seen = preview(session, tables, selection)
    if not json:
        reports.print_preview(seen, decision)
    is_done = bool(seen.count) and not dry_run
    if is_done:
        actor = actor or typer.prompt("Who decides?", default=getpass.getuser(), err=True)
        why = why or typer.prompt("Why?", err=True)
        if is_asked and not yes:
            typer.confirm(f"{verb} {seen.count:,} event(s)?", abort=True, err=True)
        with database.transaction() as session:
            decide_letters(session, tables, selection, decision, token=token or seen.token, actor=actor, why=why)
        logger.bind(event="dead_letters_decided", decision=str(decision), count=seen.count, actor=actor).info(
            "a person has decided on dead letters"
        )
    if json:
        console.print_json({"decision": decision, "is_done": is_done, "preview": seen})
    elif is_done:
        reports.print_decided(seen, decision)


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
    from outbox_worker import console, reports
    from outbox_worker.duplicates import Duplicates
    from outbox_worker.sweep import STATEMENT_SECONDS

    if json and csv:
        raise WrongUsage("--json or --csv, not both.")
    _, database, tables = _open(config, deadline_seconds=STATEMENT_SECONDS)
    duplicates = Duplicates(database, tables)
    with console.progress("payments", duplicates.estimate) as told:
        found = duplicates.list(told)
    if json:
        console.print_json(reports.duplicates_object(found))
    elif csv:
        reports.write_duplicates(found)
    else:
        reports.print_duplicates(found, limit)


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


def _open(
    config: Path | None, *, patient: bool = False, deadline_seconds: float = 0.0
) -> tuple[Settings, Database, Tables]:
    """Settings and a database that answers. Its deadline is that of the settings, or ``deadline_seconds`` where that is
    longer; ``patient``: none."""
    settings = load_settings(config=config)
    _start_logging(settings)
    longest = max(settings.database_deadline_seconds, deadline_seconds)
    database = Database(settings, deadline_seconds=None if patient else longest)
    database.check()
    return settings, database, build_tables(settings)


def _start_logging(settings: Settings) -> None:
    configure_logging(settings.log_level, settings.log_format)
    for name, near in unknown_variables(os.environ).items():
        hint = f"; did you mean {near}?" if near else ""
        logger.bind(event="unknown_setting", variable=name).warning("{} is no setting{}", name, hint)


def _seconds(duration: str | None, option: str) -> float | None:
    return None if duration is None else parse_duration(duration, option).total_seconds()


def _user() -> str:
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
            return _fail(_in_a_sentence(error))
        if isinstance(error, OSError):
            raise
        return _fail_unforeseen(error)
    return 0


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error is only what a signal left behind: libraries clean up, and fail at that."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


_REMEDIES = {
    "42P01": "Run `outbox-worker migrate`, or name your table in OUTBOX_TABLES.",
    "3F000": "Run `outbox-worker migrate`, or name your schema in OUTBOX_SCHEMA.",
    "42703": "Name your column in OUTBOX_COLUMNS.",
    "42501": "",
}


def _in_a_sentence(error: DBAPIError) -> OutboxWorkerError:
    match classify(error):
        case Failure.RECONNECT | Failure.RETRY:
            return unavailable(error)
        case Failure.PAUSE | Failure.UNCLEAR:
            remedy = _REMEDIES.get(sqlstate(error) or "", "Look at tables, columns and privileges.")
            return SchemaError(f"The database refused: {said(error)}. {remedy}".rstrip())
        case _:
            return OutboxWorkerError(f"The database refused: {describe(error)}.")


def _fail_unforeseen(error: Exception) -> int:
    """Our own error, and where it was raised; a message, or that of a cause, may repeat what a row says."""
    places = "".join(f"\n  {place}" for place in trace(error))
    sys.stderr.write(f"outbox-worker: An error of ours, please report it: {describe(error)}{places}\n")
    return 1


def _fail(error: OutboxWorkerError) -> int:
    sys.stderr.write(f"outbox-worker: {error}\n")
    return error.exit_code
