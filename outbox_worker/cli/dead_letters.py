"""Commands for dead letters: `list`, `show`, `requeue`, `discard`.

A dead letter is an event that waits for a person.
"""

from __future__ import annotations

import getpass
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from loguru import logger

from outbox_worker.cli.common import AsJson, Config, as_ids, mention_standby, open_database, print_object, suggest
from outbox_worker.cli.diagnose import looking
from outbox_worker.durations import count_of, parse_duration
from outbox_worker.errors import WrongUsage
from outbox_worker.model import DeadLetterState, Reason

if TYPE_CHECKING:
    from outbox_worker.store.dead_letters import Selection


_PAGE = 100


def _complete_reason(incomplete: str) -> list[str]:
    return [reason for reason in Reason if reason.startswith(incomplete)]


letters_app = typer.Typer(help="Show dead letters, and requeue or discard them.", no_args_is_help=True)
EventIds = Annotated[list[str] | None, typer.Argument(metavar="EVENT_ID", help="Ids of events.", show_default=False)]
DeadReason = Annotated[
    str | None,
    typer.Option(
        "--dead-reason",
        metavar="REASON",
        help="Only events whose dead letter has REASON.",
        show_default=False,
        autocompletion=_complete_reason,
    ),
]
OfType = Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Only events of TYPE.", show_default=False)]
OlderThan = Annotated[
    str | None,
    typer.Option(
        metavar="DURATION", help="Only events that died more than DURATION ago: 90s, 5m, 2h or 1d.", show_default=False
    ),
]
AllOfThem = Annotated[bool, typer.Option("--all", metavar="", help="Choose all open dead letters.")]
Actor = Annotated[
    str | None, typer.Option(metavar="NAME", help="Your name, kept in the dead letter.", show_default=False)
]
Why = Annotated[
    str | None,
    typer.Option("--reason", metavar="TEXT", help="Your reason, kept in the dead letter.", show_default=False),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", metavar="", help="Show the number of events and the sum of money; change nothing.")
]
Token = Annotated[
    str | None,
    typer.Option(
        "--preview",
        metavar="TOKEN",
        help="Act only if nothing changed since the --dry-run that printed TOKEN.",
        show_default=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask for confirmation.")]


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
            "--reason",
            "--dead-reason",
            metavar="REASON",
            help="Only events whose dead letter has REASON.",
            show_default=False,
            autocompletion=_complete_reason,
        ),
    ] = None,
    event_type: OfType = None,
    older_than: OlderThan = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Show at most N, oldest first.")] = _PAGE,
    after: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Start after PLACE, which the previous page printed.", show_default=False),
    ] = None,
) -> None:
    """List dead letters, oldest first."""
    from outbox_worker.cli.views import dead_letters as view
    from outbox_worker.schema.privileges import reading
    from outbox_worker.schema.requirements import check_schema
    from outbox_worker.store.dead_letters import LetterCursor, Selection, list_letters

    age = parse_duration(older_than, "--older-than") if older_than else None
    selection = Selection(state=state, reason=_reason(reason), event_type=event_type, older_than=age)
    _, database, tables = open_database(config, looks=True)
    with database.transaction() as session:
        tables = check_schema(session, tables, reading("dead_letters"))
        place = LetterCursor.parse(after, tables.event_key) if after else None
        page = list_letters(session, tables, selection, after=place, limit=limit)
    if json:
        print_object(database, {"dead_letters": page.letters, "next": page.end and str(page.end)})
        return
    mention_standby(database)
    view.print_letters(page, state)
    filters = {
        "--state": state if state is not DeadLetterState.OPEN else None,
        "--reason": reason,
        "--type": event_type,
        "--older-than": older_than,
        "--limit": str(limit) if limit != _PAGE else None,
    }
    suggest(config, *view.next_steps(page, _words(filters)))


@letters_app.command("show")
def show_dead_letter(
    event: Annotated[str, typer.Argument(metavar="EVENT_ID", help="Id of the event.", show_default=False)],
    config: Config = None,
    json: AsJson = False,
) -> None:
    """Show a dead letter: event, reason, payment, and what would happen now."""
    from outbox_worker.cli.views import explanation
    from outbox_worker.store.dead_letters import parse_event_id, read_letter

    with looking(config) as (database, session, tables, explain):
        letter, content = read_letter(session, tables, parse_event_id(tables, event))
        stories = explain(str(event)).stories
    story = next((each for each in stories if each.payment_id == letter.payment_id), stories[0])
    if json:
        print_object(database, explanation.letter_object(letter, content, story))
    else:
        mention_standby(database)
        explanation.print_letter(letter, content, story)
        suggest(config, *explanation.next_steps_of(letter))


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
    """Put dead events back into the outbox, due now.

    Choose events by their ids, or all open dead letters that match the options.
    The command shows the number of events and the sum of their payments, and then
    asks for confirmation.

    Exit code 1 if an event could not be put back into the outbox. The dead letter
    of this event stays open. The command lists the event with the reason.
    """
    chosen = _select(events, all_, dead_reason, event_type, older_than)
    _decide(config, "requeue", *chosen, json=json, actor=actor, why=why, dry_run=dry_run, token=preview, yes=yes)


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
    """Close dead letters without settling their events.

    If a payment has no purchase because of a dead letter, discarding the letter
    waives the payment. The student then gets no course for this payment. The
    command shows the sum of the waived payments, and then asks for confirmation.

    Exit code 1 if a dead letter could not be closed. The command lists each dead
    letter that stays open, with the reason.
    """
    chosen = _select(events, all_, dead_reason, event_type, older_than)
    _decide(config, "discard", *chosen, json=json, actor=actor, why=why, dry_run=dry_run, token=preview, yes=yes)


def _select(
    events: list[str] | None, all_: bool, reason: str | None, event_type: str | None, older_than: str | None
) -> tuple[Selection, Sequence[str]]:
    """Return a selection of dead letters, and the command-line words that make this selection.

    Raises WrongUsage.
    """
    from outbox_worker.store.dead_letters import Selection

    chosen = bool(reason or event_type or older_than)
    if bool(events) == (all_ or chosen):
        raise WrongUsage(
            "Give ids of events, or choose open dead letters by --all, --dead-reason, --type or --older-than."
        )
    age = parse_duration(older_than, "--older-than") if older_than else None
    selection = Selection(event_ids=events or (), reason=_reason(reason), event_type=event_type, older_than=age)
    filters = _words({"--dead-reason": reason, "--type": event_type, "--older-than": older_than})
    return selection, [*filters, *as_ids(events or ())] or ["--all"]


def _reason(given: str | None) -> str | None:
    """Return ``given`` if it is None or a reason of dead letters. Otherwise, raise WrongUsage."""
    if given is not None and given not in set(Reason):
        raise WrongUsage(f"{given} is not a reason of a dead letter. Reasons are: {', '.join(Reason)}.")
    return given


def _decide(
    config: Path | None,
    verb: str,
    selection: Selection,
    chosen: Sequence[str],
    *,
    json: bool,
    actor: str | None,
    why: str | None,
    dry_run: bool,
    token: str | None,
    yes: bool,
) -> None:
    """Preview a decision about dead letters, ask for name and reason, and carry it out."""
    from outbox_worker.cli.views import dead_letters as view
    from outbox_worker.schema.privileges import DECIDING, DISCARDING, PREVIEWING
    from outbox_worker.schema.requirements import check_schema
    from outbox_worker.store.dead_letters import DecidedLetters, Decision, check_decidable, decide_letters, preview

    decision, is_asked = Decision(verb), sys.stdin.isatty() and sys.stderr.isatty()
    if not dry_run and not is_asked and not (actor and why):
        raise WrongUsage("--actor and --reason are required if the command cannot ask on a terminal.")
    acting = DECIDING if decision is Decision.REQUEUE else DISCARDING
    _, database, tables = open_database(config, patient=True, looks=dry_run)
    with database.snapshot() as session:
        tables = check_schema(session, tables, PREVIEWING if dry_run else acting)
        selection = selection.parsed(tables)
        check_decidable(session, tables, selection, decision)
        seen = preview(session, tables, selection)
    if not json:
        mention_standby(database)
        view.print_preview(seen, decision)
    decided = DecidedLetters(0, [])
    if seen.count and not dry_run:
        actor = actor or typer.prompt("Your name", default=getpass.getuser(), err=True)
        why = why or typer.prompt("Reason", err=True)
        if is_asked and not yes:
            typer.confirm(f"{verb.capitalize()} {count_of(seen.count, 'event')}?", abort=True, err=True)
        with database.transaction() as session:
            decided = decide_letters(
                session, tables, selection, decision, token=token or seen.token, actor=actor, why=why
            )
        logger.bind(event="dead_letters_decided", decision=str(decision), count=decided.done, actor=actor).info(
            "a person requeued or discarded dead letters"
        )
    is_done = bool(decided.done)
    if json:
        refused = [each._asdict() for each in decided.refused]
        print_object(database, {"decision": decision, "is_done": is_done, "preview": seen, "refused": refused})
    elif is_done or decided.refused:
        view.print_decided(seen, decided, decision)
    elif seen.count:
        who = _words({"--actor": actor, "--reason": why})
        suggest(config, ["dead-letters", verb, "--preview", seen.token, *who, *chosen])
    raise typer.Exit(1 if decided.refused else 0)


def _words(options: Mapping[str, str | None]) -> list[str]:
    """Return options and their values as command-line words. Leave out options without a value."""
    return [word for option, value in options.items() if value for word in (option, value)]
