"""The output of `audit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outbox_worker import terminal
from outbox_worker.cli.views.payments import money_lines, print_payments
from outbox_worker.durations import count_of
from outbox_worker.mapping import status_example
from outbox_worker.reconcile.audit import AuditReport
from outbox_worker.store.doubled import DoubledPair
from outbox_worker.store.payment_classes import MISSING, PaymentClass


def audit_object(report: AuditReport) -> dict[str, Any]:
    """Return the object of ``audit --json``."""
    return {"ok": report.ok} | {key: getattr(report, key) for key in report.__dataclass_fields__}


def print_audit(report: AuditReport, limit: int) -> None:
    """Print the classes of payments, the payments that a person must check, and the result.

    Each list shows at most ``limit`` payments.
    """
    rows = [
        (
            name.replace("_", " "),
            f"{count:,}",
            money_lines(report.money[name]),
            MEANINGS[name],
        )
        for name, count in report.counts.items()
    ]
    total = count_of(sum(report.counts.values()), "succeeded payment")
    terminal.columns(f"{total} (not refunded)", ["class", "payments", "money", "meaning"], rows, numbers=(1, 2))
    lists = {
        "unexplained": report.unexplained,
        "refunded but active": report.refunded_but_active,
        "cannot be judged": report.cannot_be_judged,
    }
    for title, found in lists.items():
        print_payments(title, found, limit)
    _print_doubled(report.pairs_twice_active, limit)
    if report.unknown_statuses:
        listed = ", ".join(f"{status} ({count:,})" for status, count in report.unknown_statuses.items())
        terminal.line(f"\nNot audited, because the status is unknown: {listed}.", "yellow")
        _print_status_example(report.unknown_statuses)
    if report.dated_ahead:
        terminal.line(
            f"\nNot audited, because created_at is in the future: {count_of(report.dated_ahead, 'payment')}.", "yellow"
        )
    if report.ok:
        terminal.line("\nNothing is owed: every succeeded payment (not refunded) is explained.", "green")
    else:
        counts = {title: len(found) for title, found in lists.items()}
        counts["of a status that is not known"] = sum(report.unknown_statuses.values())
        told = [f"{count_of(n, 'payment')} {title}" for title, n in counts.items() if n or title in _ALWAYS_COUNTED]
        if doubled := len(report.pairs_twice_active):
            told.append(f"{count_of(doubled, 'pair')} of student and course active twice")
        terminal.line(f"\n{'; '.join(told)}.", "red")
        terminal.line('What to do: docs/runbook.md, "The audit found something".')


def _print_status_example(unknown: Mapping[str, int]) -> None:
    """Print what to do about missing statuses and unknown statuses.

    For unknown statuses, print example lines for the configuration file.
    """
    named = [status for status in unknown if status != MISSING]
    if len(named) < len(unknown):
        terminal.line("Write a status into the payments that have none.", "yellow")
    if named:
        terminal.line("Say in the configuration file what each status means, for example:", "yellow")
        terminal.line(f"  [payments]\n  {status_example(named)}")


def _print_doubled(found: Sequence[DoubledPair], limit: int) -> None:
    rows = [(each.student_id, each.course_id, f"{each.purchases:,}", list(each.purchase_ids)) for each in found[:limit]]
    if rows:
        head = ["student", "course", "active", "purchases"]
        terminal.columns("\npairs twice active: deactivate all but one purchase of each", head, rows, numbers=(2,))
    if len(found) > limit:
        more = count_of(len(found) - limit, "more pair")
        terminal.line(f"… and {more} active twice; use --limit N or --json to see more.", "dim")


def next_steps(report: AuditReport) -> list[list[str]]:
    """Return the commands to run after an audit with this result."""
    steps = []
    if report.unexplained:
        steps.append(["backfill", "--dry-run"])
    if found := [*report.unexplained, *report.refunded_but_active, *report.cannot_be_judged]:
        steps.append(["why", str(found[0].payment_id)])
    if report.pairs_twice_active:
        steps.append(["why", report.pairs_twice_active[0].purchase_ids[0]])
    if report.counts[PaymentClass.DEAD]:
        steps.append(["dead-letters", "list"])
    if report.counts[PaymentClass.DUPLICATE]:
        steps.append(["duplicates", "list"])
    return steps


_ALWAYS_COUNTED = ("unexplained", "refunded but active")

MEANINGS = {
    PaymentClass.ACTIVE: "the purchase is there",
    PaymentClass.REVOKED: "the purchase was taken back",
    PaymentClass.DUPLICATE: "the student already had the course (paid twice, or a gift)",
    PaymentClass.IN_FLIGHT: "its event waits in the outbox",
    PaymentClass.DEAD: "its event is an open dead letter",
    PaymentClass.WAIVED: "a person decided to give no course",
    PaymentClass.UNEXPLAINED: "money taken, no purchase, no known reason",
}
