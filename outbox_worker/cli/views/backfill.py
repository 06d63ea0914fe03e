"""The output of `backfill`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from outbox_worker import terminal
from outbox_worker.cli.views.payments import money_lines, print_payments
from outbox_worker.durations import count_of
from outbox_worker.reconcile.backfill import BackfillReport


def backfill_object(report: BackfillReport) -> dict[str, Any]:
    """Return the object of ``backfill --json``."""
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
        "withheld": report.withheld,
        "cannot_be_judged": report.cannot_be_judged,
        "contended": report.made.contended,
        "refused": [asdict(each.payment) | {"detail": each.detail} for each in report.made.refused],
    }


def print_backfill(report: BackfillReport, max_repairs: int, limit: int) -> None:
    """Print what the backfill read, found and made, the payments to check, and the result."""
    if killed := report.continued:
        terminal.line(f"Continues the backfill of {_minute(killed.started_at)} ({killed.actor}), which was killed.")
    terminal.line(
        f"Read {count_of(report.counts.looked_at, 'payment')} created before {_minute(report.range.before)}, "
        f"in {report.seconds:,.1f} s ({report.payments_per_second:,.0f}/s)."
    )
    terminal.columns("", ["found", "payments", "money", "meaning"], _rows(report), numbers=(1, 2))
    print_payments("owed", report.owed if report.dry_run else [], limit)
    print_payments("duplicates", report.duplicates, limit)
    print_payments("withheld (an older payment of the pair lies outside the range)", report.withheld, limit)
    print_payments("cannot be judged", report.cannot_be_judged, limit)
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
        "recovered": "of these, an earlier backfill made the purchase, but it was deleted",
        "duplicates": "paid again for the same course: no purchase made",
        "withheld": "an older payment of the pair lies outside the range: no purchase made",
        "explained": "settled by another process after the scan",
        "contended": "another transaction holds a lock that the purchase needs",
        "refused": "the database refused the purchase, or did not write it",
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
        outside = ", except for payments outside the range" if report.withheld else ""
        settled = f"Every owed purchase is settled{outside}." if owed else f"Nothing was owed{outside}."
        failed = f"{count_of(left, 'purchase')} could not be made; still owed." if left else ""
        unjudged = f"{count_of(len(report.cannot_be_judged), 'payment')} cannot be judged; correct the listed values."
        told = [failed, unjudged] if report.cannot_be_judged else [failed]
        return settled if report.ok else " ".join(filter(None, told))
    if owed > max_repairs:
        return f"Nothing was changed. More purchases are owed than --max-repairs allows ({max_repairs:,})."
    return "Nothing was changed."


def next_steps(report: BackfillReport, span: Sequence[str], max_repairs: int) -> list[list[str]]:
    """Return the commands to run next. ``span`` contains the options that chose the payments."""
    counts, made, steps = report.counts, report.made, []
    if report.dry_run and counts.owed.count:
        most = ["--max-repairs", str(counts.owed.count)] if counts.owed.count > max_repairs else []
        steps.append(["backfill", *span, *most])
    if made.contended:
        steps.append(["backfill", *span])
    if made.refused:
        steps.append(["why", str(made.refused[0].payment.payment_id)])
    if report.withheld:
        steps.append(["why", str(report.withheld[0].payment_id)])
    if report.cannot_be_judged and report.cannot_be_judged[0].payment_id is not None:
        steps.append(["why", str(report.cannot_be_judged[0].payment_id)])
    if counts.duplicates.count:
        steps.append(["duplicates", "list"])
    if counts.made.count:
        steps.append(["audit"])
    return steps


def _minute(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
