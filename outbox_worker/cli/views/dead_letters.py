"""What `dead-letters` shows."""

from __future__ import annotations

from outbox_worker import terminal
from outbox_worker.cli.views.payments import money_line
from outbox_worker.model import DeadLetterState
from outbox_worker.store.dead_letters import Decision, Page, Preview


def print_preview(seen: Preview, decision: Decision) -> None:
    """How many events a decision is about, of what they died, and how much money they are about."""
    if not seen.count:
        terminal.line(f"Nothing to {decision}: no open dead letter matches.")
        return
    money = money_line(seen.money) or "no payment known"
    rows: list[tuple[str, object]] = [(f"to {decision}", f"{seen.count:,} event(s)"), ("money", money)]
    if decision is Decision.DISCARD and seen.waived:
        rows.append(("never given", f"{money_line(seen.waived)}: paid, no purchase made, and waived by this"))
    terminal.facts(
        [*rows, *((reason, f"{count:,}") for reason, count in seen.reasons.items()), ("preview", seen.token)]
    )


def print_decided(seen: Preview, decision: Decision) -> None:
    """What was done, and what comes next."""
    match decision:
        case Decision.REQUEUE:
            terminal.line(f"{seen.count:,} event(s) are due again; the worker settles them like new ones.", "green")
        case Decision.DISCARD:
            waived = f"; {money_line(seen.waived)} waived" if seen.waived else "; nothing was owed for them"
            terminal.line(f"{seen.count:,} dead letter(s) discarded{waived}.", "green")


def print_letters(page: Page, state: DeadLetterState) -> None:
    """One line a letter."""
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
    if page.end is not None:
        terminal.line(f"\nThere are more: --after {page.end}")
