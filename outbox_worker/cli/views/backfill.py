"""What a backfill looks like to people, and as the object that scripts read."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from outbox_worker import terminal
from outbox_worker.cli.views.payments import money_lines, print_payments
from outbox_worker.reconcile.backfill import BackfillReport


def backfill_object(report: BackfillReport) -> dict[str, Any]:
    """The object of ``backfill --json``."""
    span, killed = report.range, report.continued
    return {
        "ok": report.ok,
        "dry_run": report.dry_run,
        "since": span.since,
        "until": span.until,
        "cutoff": span.cutoff,
        "continued": None if killed is None else {"started_at": killed.started_at, "actor": killed.actor},
        "counts": asdict(report.counts),
        "seconds": report.seconds,
        "payments_per_second": report.payments_per_second,
        "owed": report.owed,
        "duplicates": report.duplicates,
        "contended": report.made.contended,
        "refused": [asdict(each.payment) | {"detail": each.detail} for each in report.made.refused],
    }


def print_backfill(report: BackfillReport, max_repairs: int, limit: int) -> None:
    """What was looked at, found and made; what a person should look at; the verdict in one sentence."""
    if killed := report.continued:
        terminal.line(f"Goes on with the backfill of {_minute(killed.started_at)} ({killed.actor}), which was killed.")
    terminal.line(
        f"{report.counts.looked_at:,} payments looked at, up to {_minute(report.range.before)}: "
        f"{report.seconds:,.1f} s, {report.payments_per_second:,.0f}/s"
    )
    terminal.columns("", ["", "payments", "money", ""], _rows(report), numbers=(1, 2))
    print_payments("owed", report.owed if report.dry_run else [], limit)
    print_payments("duplicates", report.duplicates, limit)
    print_payments("contended", report.made.contended, limit)
    print_payments("refused", [each.payment for each in report.made.refused], limit)
    for detail in sorted({each.detail for each in report.made.refused}):
        terminal.line(f"refused: {detail}", "red")
    terminal.line(f"\n{_verdict(report, max_repairs)}", "green" if report.ok else "red")


def _rows(report: BackfillReport) -> list[tuple[object, ...]]:
    counts = report.counts
    meanings = {
        "owed": "paid, and no purchase was ever made",
        "made": "the purchase was made now",
        "recovered": "of these: a backfill had made it before, and it was gone",
        "duplicates": "paid again for the same course: not granted",
        "explained": "owed at first, settled meanwhile",
        "contended": "somebody else holds the lock of the pair",
        "refused": "the database refuses the purchase",
    }
    shown = {name: getattr(counts, name) for name in meanings}
    always = {"owed"} if report.dry_run else {"owed", "made"}
    return [
        (name, f"{value.count:,}", money_lines(value.money), meanings[name])
        for name, value in shown.items()
        if value.count or name in always
    ]


def _verdict(report: BackfillReport, max_repairs: int) -> str:
    owed, left = report.counts.owed.count, report.counts.contended.count + report.counts.refused.count
    if not report.dry_run:
        settled = "Everything that was owed is settled." if owed else "Nothing was owed."
        return settled if report.ok else f"{left:,} purchase(s) that are owed could not be made."
    if owed > max_repairs:
        return f"Nothing was changed. To make so many, say --max-repairs {owed}."
    return "Nothing was changed."


def _minute(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
