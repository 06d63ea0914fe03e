"""The commands on dead letters: list, show, requeue, discard."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer
from loguru import logger

from outbox_worker.cli.common import AsJson, Config, open_database
from outbox_worker.cli.diagnose import looking
from outbox_worker.durations import parse_duration
from outbox_worker.errors import WrongUsage
from outbox_worker.model import DeadLetterState, Reason

if TYPE_CHECKING:
    from outbox_worker.store.dead_letters import Selection


letters_app = typer.Typer(help="Events that wait for a person.", no_args_is_help=True)
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
    from outbox_worker import terminal
    from outbox_worker.cli.views import dead_letters as view
    from outbox_worker.schema.privileges import reading
    from outbox_worker.schema.requirements import check_schema
    from outbox_worker.store.dead_letters import LetterCursor, Selection, list_letters

    age = parse_duration(older_than, "--older-than") if older_than else None
    selection = Selection(state=state, reason=_reason(reason), event_type=event_type, older_than=age)
    place = LetterCursor.parse(after) if after else None
    _, database, tables = open_database(config)
    with database.transaction() as session:
        check_schema(session, tables, reading("dead_letters"))
        page = list_letters(session, tables, selection, after=place, limit=limit)
    if json:
        terminal.print_json({"dead_letters": page.letters, "next": page.end and str(page.end)})
        return
    view.print_letters(page, state)


@letters_app.command("show")
def show_dead_letter(
    event: Annotated[UUID, typer.Argument(metavar="EVENT_ID", help="The event, by its id.", show_default=False)],
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Show one: its event, of what it died, its payment, what would happen now."""
    from outbox_worker import terminal
    from outbox_worker.cli.views import explanation
    from outbox_worker.store.dead_letters import read_letter

    with looking(config) as (session, tables, explain):
        letter, content = read_letter(session, tables, event)
        stories = explain(str(event)).stories
    story = next((each for each in stories if each.payment_id == letter.payment_id), stories[0])
    if json:
        terminal.print_json(explanation.letter_object(letter, content, story))
    else:
        explanation.print_letter(letter, content, story)


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

    A payment that is owed a purchase by one of them is waived from then on:
    nothing is given for it. Says first how much money that is.
    """
    selection = _select(events, all_, dead_reason, event_type, older_than)
    _decide(config, "discard", selection, json=json, actor=actor, why=why, dry_run=dry_run, token=preview, yes=yes)


def _select(
    events: list[UUID] | None, all_: bool, reason: str | None, event_type: str | None, older_than: str | None
) -> Selection:
    from outbox_worker.store.dead_letters import Selection

    chosen = bool(reason or event_type or older_than)
    if bool(events) == (all_ or chosen):
        raise WrongUsage("Name events by their ids, or choose open ones: --all, --dead-reason, --type, --older-than.")
    age = parse_duration(older_than, "--older-than") if older_than else None
    return Selection(event_ids=events or (), reason=_reason(reason), event_type=event_type, older_than=age)


def _reason(given: str | None) -> str | None:
    """Of which events die. Raises WrongUsage."""
    if given is not None and given not in set(Reason):
        raise WrongUsage(f"No event dies of {given}. It is one of: {', '.join(Reason)}.")
    return given


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
    from outbox_worker import terminal
    from outbox_worker.cli.views import dead_letters as view
    from outbox_worker.schema.privileges import DECIDING
    from outbox_worker.schema.requirements import check_schema
    from outbox_worker.store.dead_letters import Decision, check_decidable, decide_letters, preview

    decision, is_asked = Decision(verb), sys.stdin.isatty() and sys.stderr.isatty()
    if not dry_run and not is_asked and not (actor and why):
        raise WrongUsage("--actor and --reason are required where nobody can be asked.")
    _, database, tables = open_database(config, patient=True)
    with database.snapshot() as session:
        tables = check_schema(session, tables, DECIDING)
        check_decidable(session, tables, selection, decision)
        seen = preview(session, tables, selection)
    if not json:
        view.print_preview(seen, decision)
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
        terminal.print_json({"decision": decision, "is_done": is_done, "preview": seen})
    elif is_done:
        view.print_decided(seen, decision)
