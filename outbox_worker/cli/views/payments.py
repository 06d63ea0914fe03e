"""Lists of payments and sums of money in the output of several commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

from outbox_worker import terminal
from outbox_worker.durations import ago
from outbox_worker.model import FoundPayment, UnjudgedPayment
from outbox_worker.money import amount_of, amount_text


def print_payments(title: str, found: Sequence[FoundPayment], limit: int) -> None:
    """Print the first ``limit`` payments of a list, then the number of payments that were not printed."""
    if not found:
        return
    rows = [
        (
            each.payment_id,
            each.student_id,
            each.course_id,
            amount_of(each.amount, each.currency),
            "-" if each.age_seconds is None else ago(each.age_seconds),
            *([each.reason] if isinstance(each, UnjudgedPayment) else []),
        )
        for each in found[:limit]
    ]
    if rows:
        headings = ["payment", "student", "course", "amount", "age", "reason"][: len(rows[0])]
        terminal.columns(f"\n{title}", headings, rows, numbers=(3, 4))
    if len(found) > limit:
        terminal.line(f"… and {len(found) - limit:,} more {title}; use --limit N or --json to see more.", "dim")


def money_line(money: Mapping[str, Decimal]) -> str:
    """Return the sums of all currencies on one line."""
    return ", ".join(money_lines(money))


def money_lines(money: Mapping[str, Decimal]) -> list[str]:
    """Return one line with the sum of each currency."""
    return [f"{amount_text(amount, currency, grouped=True)} {currency}" for currency, amount in money.items()]
