"""What the doctor finds, for people and for scripts."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from outbox_worker import terminal
from outbox_worker.diagnose.doctor.finding import Severity
from outbox_worker.diagnose.doctor.report import Diagnosis, Report

_STYLES = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.PROBLEM: "red", Severity.UNSEEN: "magenta"}


def doctor_object(report: Report) -> dict[str, Any]:
    """The object of ``doctor --json``."""
    return {"ok": report.ok, "checks": report.checks}


def print_report(report: Report) -> None:
    """A line or more for each finding, its remedy below, and the result in one sentence."""
    terminal.facts([(_heading(each), _said(each)) for each in report.checks])
    counts = {verdict: report.count(verdict) for verdict in Severity}
    unseen = f", {counts[Severity.UNSEEN]} could not be looked at" if counts[Severity.UNSEEN] else ""
    terminal.line(
        f"\n{counts[Severity.PROBLEM]} problem(s), {counts[Severity.WARNING]} warning(s){unseen}.",
        "green" if report.ok else "red",
    )


def _heading(found: Diagnosis) -> Text:
    return Text(f"{found.verdict:8}{found.name.replace('_', ' ')}", style=_STYLES[found.verdict])


def _said(found: Diagnosis) -> list[str]:
    return [*found.evidence.splitlines(), *(f"→ {found.remedy}".splitlines() if found.remedy else [])]
