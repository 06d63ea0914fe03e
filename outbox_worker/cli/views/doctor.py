"""The output of `doctor`."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from outbox_worker import terminal
from outbox_worker.diagnose.doctor.finding import Severity
from outbox_worker.diagnose.doctor.report import Diagnosis, Report
from outbox_worker.durations import count_of

_ORDER = (Severity.OK, Severity.UNSEEN, Severity.WARNING, Severity.PROBLEM)
"""The order of findings. The worst findings are last, because a terminal shows the end of the output."""
_STYLES = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.PROBLEM: "red", Severity.UNSEEN: "magenta"}


def doctor_object(report: Report) -> dict[str, Any]:
    """Return the object of ``doctor --json``."""
    found = {"ok": report.ok, "checks": report.checks}
    return found if report.standby is None else found | {"standby": report.standby}


def print_report(report: Report) -> None:
    """Print each finding with its remedy, problems last. Then print the counts in one line."""
    found = sorted(report.checks, key=lambda each: _ORDER.index(each.verdict))
    terminal.facts([(Text(each.verdict, style=_STYLES[each.verdict]), _described(each)) for each in found])
    counts = {verdict: report.count(verdict) for verdict in Severity}
    unseen = f", {count_of(counts[Severity.UNSEEN], 'check')} not possible" if counts[Severity.UNSEEN] else ""
    problems, warnings = count_of(counts[Severity.PROBLEM], "problem"), count_of(counts[Severity.WARNING], "warning")
    terminal.line(f"\n{problems}, {warnings}{unseen}.", "green" if report.ok else "red")


def _described(found: Diagnosis) -> list[str]:
    evidence = f"{found.name.replace('_', ' ')}: {found.evidence}"
    return [*evidence.splitlines(), *(f"→ {found.remedy}".splitlines() if found.remedy else [])]
