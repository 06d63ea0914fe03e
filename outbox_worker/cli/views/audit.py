"""What `audit` shows."""

from __future__ import annotations

from typing import Any

from outbox_worker import terminal
from outbox_worker.cli.views.payments import money_lines, print_payments
from outbox_worker.model import PaymentStatus
from outbox_worker.reconcile.audit import AuditReport
from outbox_worker.store.payment_classes import PaymentClass


def audit_object(report: AuditReport) -> dict[str, Any]:
    """The object of ``audit --json``."""
    return {"ok": report.ok} | {key: getattr(report, key) for key in report.__dataclass_fields__}


def print_audit(report: AuditReport, limit: int) -> None:
    """The classes, what a person should look at (at most ``limit`` of each), and the verdict in one sentence."""
    rows = [
        (
            name.replace("_", " "),
            f"{count:,}",
            money_lines(report.money[name]),
            MEANINGS[name],
        )
        for name, count in report.counts.items()
    ]
    total = sum(report.counts.values())
    terminal.columns(f"{total:,} standing payments", ["class", "payments", "money", ""], rows, numbers=(1, 2))
    for title, found in (("unexplained", report.unexplained), ("refunded but active", report.refunded_but_active)):
        print_payments(title, found, limit)
    if report.unknown_statuses:
        listed = ", ".join(f"{status} ({count:,})" for status, count in report.unknown_statuses.items())
        terminal.line(f"\nNot judged, because their status is none of {_STATUSES}: {listed}.", "yellow")
    if report.dated_ahead:
        terminal.line(
            f"\nNot judged, because they are dated in the future: {report.dated_ahead:,} payment(s).", "yellow"
        )
    if report.ok:
        terminal.line("\nNothing is owed: every standing payment is explained.", "green")
    else:
        unexplained, refunded = len(report.unexplained), len(report.refunded_but_active)
        terminal.line(f"\n{unexplained:,} payment(s) unexplained, {refunded:,} refunded but active.", "red")
        terminal.line('What to do: docs/runbook.md, "The audit found something".')


_STATUSES = ", ".join(PaymentStatus)

MEANINGS = {
    PaymentClass.ACTIVE: "the purchase is there",
    PaymentClass.REVOKED: "the purchase was taken back",
    PaymentClass.DUPLICATE: "paid twice: another purchase counts",
    PaymentClass.IN_FLIGHT: "its event waits in the outbox",
    PaymentClass.DEAD: "contradicts its event: dead letter",
    PaymentClass.WAIVED: "a person decided, with a reason",
    PaymentClass.UNEXPLAINED: "money taken, nothing given",
}
