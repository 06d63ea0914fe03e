"""The output of `dead-letters`."""

from __future__ import annotations

from collections.abc import Sequence

from outbox_worker import terminal
from outbox_worker.cli.views.payments import money_line
from outbox_worker.durations import count_of
from outbox_worker.model import DeadLetterState
from outbox_worker.store.dead_letters import Decision, Page, Preview


def print_preview(seen: Preview, decision: Decision) -> None:
    """Print how many events would be requeued or discarded, why they died, and the sum of their payments."""
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


def print_decided(seen: Preview, decision: Decision) -> None:
    """Print how many dead letters were requeued or discarded, and what happens next."""
    match decision:
        case Decision.REQUEUE:
            terminal.line(f"{count_of(seen.count, 'event')} requeued. Workers settle them like new events.", "green")
        case Decision.DISCARD:
            terminal.line(f"{count_of(seen.count, 'dead letter')} discarded. {_waived(seen)}", "green")


def _waived(seen: Preview) -> str:
    """Return a sentence about the payments that get no purchase if the letters are discarded."""
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
                f"{each.dead_at:%Y-%m-%d %H:%M %Z}",
                each.detail,
            )
            for each in letters
        ],
        numbers=(4,),
    )


def next_steps(page: Page, filters: Sequence[str]) -> list[list[str]]:
    """Return the commands to run next. ``filters``: the options that chose the letters."""
    steps = [["dead-letters", "show", str(each.event_id)] for each in page.letters[:1]]
    if page.end is not None:
        steps.append(["dead-letters", "list", *filters, "--after", str(page.end)])
    return steps
