"""The output of `dead-letters`."""

from __future__ import annotations

from collections.abc import Sequence

from outbox_worker import terminal
from outbox_worker.cli.views.payments import money_line
from outbox_worker.durations import count_of
from outbox_worker.model import DeadLetterState
from outbox_worker.store.dead_letters import DecidedLetters, Decision, Page, Preview


def print_preview(seen: Preview, decision: Decision) -> None:
    """Print how many events would be requeued or discarded, their reasons, and the sum of money."""
    if not seen.count:
        terminal.line(f"Nothing to {decision}: no open dead letter matches.")
        return
    money = money_line(seen.money) or "no payment known"
    rows: list[tuple[str, object]] = [(f"to {decision}", count_of(seen.count, "event")), ("money", money)]
    if decision is Decision.DISCARD and seen.waived:
        rows.append(("never given", f"{money_line(seen.waived)}: paid, but no purchase was made; a discard waives it"))
    terminal.facts(
        [*rows, *((reason, f"{count:,}") for reason, count in seen.reasons.items()), ("preview", seen.token)]
    )


def print_decided(seen: Preview, decided: DecidedLetters, decision: Decision) -> None:
    """Print how many dead letters were requeued or discarded, and what happens next.

    Then list the dead letters that could not be requeued or discarded.
    """
    if decided.done and decision is Decision.REQUEUE:
        terminal.line(f"{count_of(decided.done, 'event')} requeued. Workers settle them like new events.", "green")
    elif decided.done:
        waived = "" if decided.refused else f" {_waived(seen)}"
        terminal.line(f"{count_of(decided.done, 'dead letter')} discarded.{waived}", "green")
    if decided.refused:
        terminal.line(f"{count_of(len(decided.refused), 'dead letter')} could not be {_DONE[decision]}:", "red")
        rows = [(each.event_id, each.reason) for each in decided.refused]
        terminal.columns("", ["event", "reason"], rows)


_DONE = {Decision.REQUEUE: "requeued", Decision.DISCARD: "discarded"}


def _waived(seen: Preview) -> str:
    """Return a sentence about the payments that get no purchase after this discard."""
    if seen.waived:
        return f"{money_line(seen.waived)} waived: the students get no course for it."
    if not seen.money:
        return "The letters name no known payment, so the amount of money is unknown."
    return "No payment is waived. Purchases that are owed stay owed."


def print_letters(page: Page, state: DeadLetterState) -> None:
    """Print one line for each dead letter."""
    letters = page.letters
    if not letters:
        terminal.line(f"No {state} dead letters.")
        return
    terminal.columns(
        "",
        ["event", "type", "payment", "reason", "attempts", "dead since", "detail"],
        [
            (
                each.event_id,
                each.event_type,
                each.payment_id or "-",
                each.reason,
                each.attempts,
                f"{each.dead_at:%Y-%m-%d %H:%M %Z}" if each.dead_at else "?",
                each.detail,
            )
            for each in letters
        ],
        numbers=(4,),
    )


def next_steps(page: Page, filters: Sequence[str]) -> list[list[str]]:
    """Return the commands to run next. ``filters`` contains the options that chose the letters."""
    steps = [["dead-letters", "show", str(each.event_id)] for each in page.letters[:1]]
    if page.end is not None:
        steps.append(["dead-letters", "list", *filters, "--after", str(page.end)])
    return steps
