"""What the doctor finds, for people and for scripts."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from outbox_worker import terminal
from outbox_worker.diagnose.doctor.finding import Verdict
from outbox_worker.diagnose.doctor.report import Diagnosis, Report

_STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red", Verdict.UNSEEN: "magenta"}


def doctor_object(report: Report) -> dict[str, Any]:
    """The object of ``doctor --json``."""
    return {"ok": report.ok, "checks": report.checks}


def print_report(report: Report) -> None:
    """A line or more for each finding, its remedy below, and the result in one sentence."""
    terminal.facts([(_heading(each), _said(each)) for each in report.checks])
    counts = {verdict: report.count(verdict) for verdict in Verdict}
    unseen = f", {counts[Verdict.UNSEEN]} could not be looked at" if counts[Verdict.UNSEEN] else ""
    terminal.line(
        f"\n{counts[Verdict.PROBLEM]} problem(s), {counts[Verdict.WARNING]} warning(s){unseen}.",
        "green" if report.ok else "red",
    )


def _heading(found: Diagnosis) -> Text:
    return Text(f"{found.verdict:8}{found.name.replace('_', ' ')}", style=_STYLES[found.verdict])


def _said(found: Diagnosis) -> list[str]:
    return [*found.evidence.splitlines(), *(f"→ {found.remedy}".splitlines() if found.remedy else [])]
