"""The output of `duplicates list`, also as CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from typing import Any

from outbox_worker import terminal
from outbox_worker.cli.views.payments import money_line
from outbox_worker.durations import ago, count_of
from outbox_worker.model import PaymentTotals
from outbox_worker.money import amount_of, amount_text
from outbox_worker.reconcile.duplicates import Duplicate, owed_back

_OF_DUPLICATE = ("payment", "student", "course", "amount", "currency", "paid_at", "held_by", "held_since")


def duplicates_object(found: Sequence[Duplicate]) -> dict[str, Any]:
    """Return the object of ``duplicates list --json``."""
    owed = owed_back(found)
    value = PaymentTotals.of(each.payment for each in owed)
    next_payments = [each for each in found if each.is_holder_refunded]
    return {"count": value.count, "owed_back": value.money, "duplicates": owed, "not_owed_back": next_payments}


def print_duplicates(found: Sequence[Duplicate], limit: int) -> None:
    """Print one line for each payment to refund, and the sum."""
    owed, next_payments = owed_back(found), [each for each in found if each.is_holder_refunded]
    if not owed:
        terminal.line("Nobody has paid twice.", "green")
    else:
        _print_owed_back(owed, limit)
    if next_payments:
        terminal.line(
            f"\nDo not refund {count_of(len(next_payments), 'other payment')}: the payment whose purchase gives the "
            "course was refunded. When a worker settles that refund, the other payment gets the course. "
            "`outbox-worker audit` lists the refunded payment under `refunded but active`.",
            "yellow",
        )


def _print_owed_back(found: Sequence[Duplicate], limit: int) -> None:
    rows = [
        (
            each.payment.payment_id,
            each.payment.student_id,
            each.payment.course_id,
            amount_of(each.payment.amount, each.payment.currency),
            "-" if each.payment.age_seconds is None else ago(each.payment.age_seconds),
            each.held_by or "a gift",
        )
        for each in found[:limit]
    ]
    terminal.columns("", ["payment", "student", "course", "amount", "age", "held by"], rows, numbers=(3, 4))
    if len(found) > limit:
        terminal.line(f"… and {len(found) - limit:,} more; use --limit N, --csv or --json to see more.", "dim")
    owed = PaymentTotals.of(each.payment for each in found)
    terminal.line(f"\n{count_of(owed.count, 'payment')} to refund: {money_line(owed.money)}.")


def next_steps(found: Sequence[Duplicate]) -> list[list[str]]:
    """Return the commands to run next.

    Suggest ``why`` for the oldest duplicate. Suggest ``audit`` if a refund is not settled yet.
    """
    steps = [["why", str(each.payment.payment_id)] for each in owed_back(found)[:1]]
    return [*steps, ["audit"]] if any(each.is_holder_refunded for each in found) else steps


def write_duplicates(found: Sequence[Duplicate]) -> None:
    """Write all payments to refund as CSV with a heading line. Times are in UTC."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_OF_DUPLICATE)
    for each in owed_back(found):
        paid = each.payment
        row = (
            paid.payment_id,
            paid.student_id,
            paid.course_id,
            None if paid.amount is None else amount_text(paid.amount, paid.currency),
            paid.currency,
            paid.created_at,
        )
        writer.writerow([terminal.csv_cell(value) for value in (*row, each.held_by, each.held_since)])
