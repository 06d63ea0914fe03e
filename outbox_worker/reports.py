"""What status, audit and dead letters look like to people, and as the objects that scripts read."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from outbox_worker import console
from outbox_worker.audit import AuditReport
from outbox_worker.conservation import PaymentClass
from outbox_worker.dead_letters import Decision, Page, Preview
from outbox_worker.duplicates import Duplicate, owed_back
from outbox_worker.fleet import WorkerRow
from outbox_worker.model import DeadLetterState, Outcome, PaymentStatus
from outbox_worker.status import Status, condition
from outbox_worker.sweep import FoundPayment, Value

if TYPE_CHECKING:
    from outbox_worker.bench import BenchReport, Run


def print_status(now: Status) -> None:
    """Facts, then the workers."""
    backlog = now.backlog
    console.facts(
        [
            ("guard", now.guard),
            ("due", f"{backlog.due:,} (oldest for {console.ago(backlog.oldest_due_seconds)})" if backlog.due else "0"),
            ("postponed", f"{backlog.waiting:,}"),
            ("open dead letters", f"{now.open_letters:,}"),
            ("settled per second", f"{now.events_per_second():,.1f}"),
        ],
    )
    if now.workers:
        console.columns(
            "\nworkers of the last day",
            ["host", "pid", "state", "last heard", "guard", "settled"],
            [
                (
                    row.host,
                    row.pid,
                    condition(row),
                    f"{console.ago(row.silent_seconds)} ago",
                    row.guard,
                    f"{_settled(row):,}",
                )
                for row in now.workers
            ],
            numbers=(1, 5),
        )


def status_object(now: Status) -> dict[str, Any]:
    """The object of ``status --json``."""
    return {
        "time": now.time,
        "guard": now.guard,
        "backlog": now.backlog,
        "dead_letters": {"open": now.open_letters},
        "events_per_second": now.events_per_second(),
        "workers": [
            {
                "id": row.id,
                "host": row.host,
                "pid": row.pid,
                "version": row.version,
                "state": condition(row),
                "started_at": row.started_at,
                "silent_seconds": row.silent_seconds,
                "guard": row.guard,
                "settled": _settled(row),
            }
            for row in now.workers
        ],
        "metrics": now.metrics(),
    }


def _settled(row: WorkerRow) -> int:
    """Events that this process brought to an end: all outcomes but ``retried``."""
    counted = {name: value for name, value in row.metrics.items() if name.startswith("outbox_events_total")}
    return int(sum(value for name, value in counted.items() if f'outcome="{Outcome.RETRIED}"' not in name))


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
    console.columns(f"{total:,} standing payments", ["class", "payments", "money", ""], rows, numbers=(1, 2))
    for title, found in (("unexplained", report.unexplained), ("refunded but active", report.refunded_but_active)):
        print_payments(title, found, limit)
    if report.unknown_statuses:
        listed = ", ".join(f"{status} ({count:,})" for status, count in report.unknown_statuses.items())
        console.line(f"\nNot judged, because their status is none of {_STATUSES}: {listed}.", "yellow")
    if report.dated_ahead:
        console.line(
            f"\nNot judged, because they are dated in the future: {report.dated_ahead:,} payment(s).", "yellow"
        )
    if report.ok:
        console.line("\nNothing is owed: every standing payment is explained.", "green")
    else:
        unexplained, refunded = len(report.unexplained), len(report.refunded_but_active)
        console.line(f"\n{unexplained:,} payment(s) unexplained, {refunded:,} refunded but active.", "red")
        console.line('What to do: docs/operations.md, "The audit found something".')


def print_payments(title: str, found: Sequence[FoundPayment], limit: int) -> None:
    """The first ``limit`` of a list of payments, and how many more there are."""
    if not found:
        return
    rows = [
        (
            each.payment_id,
            each.student_id,
            each.course_id,
            f"{each.amount:.2f} {each.currency}",
            console.ago(each.age_seconds),
        )
        for each in found[:limit]
    ]
    if rows:
        console.columns(f"\n{title}", ["payment", "student", "course", "amount", "age"], rows, numbers=(3, 4))
    if len(found) > limit:
        console.line(f"… and {len(found) - limit:,} more {title}: --limit, or --json for all.", "dim")


def _in_a_line(money: Mapping[str, Decimal]) -> str:
    return ", ".join(money_lines(money))


def money_lines(money: Mapping[str, Decimal]) -> list[str]:
    """One line per currency."""
    return [f"{amount:,.2f} {currency}" for currency, amount in money.items()]


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


def print_preview(seen: Preview, decision: Decision) -> None:
    """How many events a decision is about, of what they died, and how much money they are about."""
    if not seen.count:
        console.line(f"Nothing to {decision}: no open dead letter matches.")
        return
    money = _in_a_line(seen.money) or "no payment known"
    rows: list[tuple[str, object]] = [(f"to {decision}", f"{seen.count:,} event(s)"), ("money", money)]
    if decision is Decision.DISCARD and seen.waived:
        rows.append(("never given", f"{_in_a_line(seen.waived)}: paid, no purchase made, and waived by this"))
    console.facts([*rows, *((reason, f"{count:,}") for reason, count in seen.reasons.items()), ("preview", seen.token)])


def print_decided(seen: Preview, decision: Decision) -> None:
    """What was done, and what comes next."""
    match decision:
        case Decision.REQUEUE:
            console.line(f"{seen.count:,} event(s) are due again; the worker settles them like new ones.", "green")
        case Decision.DISCARD:
            waived = f"; {_in_a_line(seen.waived)} waived" if seen.waived else "; nothing was owed for them"
            console.line(f"{seen.count:,} dead letter(s) discarded{waived}.", "green")


_OF_DUPLICATE = ("payment", "student", "course", "amount", "currency", "paid_at", "held_by", "held_since")


def duplicates_object(found: Sequence[Duplicate]) -> dict[str, Any]:
    """The object of ``duplicates list --json``."""
    owed = owed_back(found)
    value = Value.of(each.payment for each in owed)
    heirs = [each for each in found if each.is_holder_refunded]
    return {"count": value.count, "owed_back": value.money, "duplicates": owed, "not_owed_back": heirs}


def print_duplicates(found: Sequence[Duplicate], limit: int) -> None:
    """One line a duplicate, and how much is owed back in all."""
    owed, heirs = owed_back(found), [each for each in found if each.is_holder_refunded]
    if not owed:
        console.line("Nobody has paid twice.", "green")
    else:
        _print_owed_back(owed, limit)
    if heirs:
        console.line(
            f"\n{len(heirs):,} more not to be refunded: the other payment was, and its refund is not settled yet. "
            "This one gets the course then. The audit lists the other as refunded but active.",
            "yellow",
        )


def _print_owed_back(found: Sequence[Duplicate], limit: int) -> None:
    rows = [
        (
            each.payment.payment_id,
            each.payment.student_id,
            each.payment.course_id,
            f"{each.payment.amount:.2f} {each.payment.currency}",
            console.ago(each.payment.age_seconds),
            each.held_by or "a gift",
        )
        for each in found[:limit]
    ]
    console.columns("", ["payment", "student", "course", "amount", "age", "held by"], rows, numbers=(3, 4))
    if len(found) > limit:
        console.line(f"… and {len(found) - limit:,} more: --limit, or --csv or --json for all.", "dim")
    owed = Value.of(each.payment for each in found)
    console.line(f"\n{owed.count:,} payment(s) to be refunded: {_in_a_line(owed.money)}.")


def write_duplicates(found: Sequence[Duplicate]) -> None:
    """All that are owed back as CSV, with a heading; times in UTC."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_OF_DUPLICATE)
    for each in owed_back(found):
        paid = each.payment
        row = (paid.payment_id, paid.student_id, paid.course_id, f"{paid.amount:.2f}", paid.currency, paid.created_at)
        writer.writerow([console.plain(value) for value in (*row, each.held_by, each.held_since)])


def print_letters(page: Page, state: DeadLetterState) -> None:
    """One line a letter."""
    letters = page.letters
    if not letters:
        console.line(f"No {state} dead letters.")
        return
    console.columns(
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
        console.line(f"\nThere are more: --after {page.end}")


def bench_object(report: BenchReport) -> dict[str, Any]:
    """The object of ``bench --json``."""
    contestants = {
        name: {
            "events_per_second": report.median(name, lambda run: run.rate),
            "ratio_to_bare": report.ratio(name),
            "client_cpu_seconds_per_10k": report.median(name, lambda run: _per_10k(run, run.client_cpu_seconds)),
            "server_cpu_seconds_per_10k": report.median(name, lambda run: _per_10k(run, run.server_cpu_seconds)),
            "wal_bytes_per_event": report.median(name, lambda run: run.wal_bytes / run.events),
        }
        for name in report.runs
    }
    latencies = {
        name: {"median_ms": statistics.median(found), "p99_ms": _percentile(found, 99), "count": len(found)}
        for name, found in report.latencies.items()
    }
    return {
        "plan": report.plan,
        "contestants": contestants,
        "statements_per_batch": report.statements_per_batch,
        "start_up_ratio": statistics.median(report.start_ups),
        "latency": latencies,
    }


def print_bench(report: BenchReport) -> None:
    """Medians of the rounds, and the ratio to the bare statement of the same round."""
    found = bench_object(report)
    console.columns(
        f"{report.plan.events:,} events, {report.plan.rounds} rounds, {report.plan.concurrency} loop(s), "
        f"guard {report.plan.guard}",
        ["", "events/s", "ratio", "client CPU/10k", "server CPU/10k", "WAL/event"],
        [
            (
                name,
                f"{each['events_per_second']:,.0f}",
                f"{each['ratio_to_bare']:.2f}",
                _seconds(each["client_cpu_seconds_per_10k"]),
                _seconds(each["server_cpu_seconds_per_10k"]),
                f"{each['wal_bytes_per_event']:,.0f} B",
            )
            for name, each in found["contestants"].items()
        ],
        numbers=(1, 2, 3, 4, 5),
    )
    console.line(
        f"\n{found['statements_per_batch']:.1f} round trips per full batch of one loop, BEGIN and COMMIT among them"
        f"\nready to claim after {found['start_up_ratio']:.1f} times the import of SQLAlchemy and psycopg"
    )
    if report.latencies:
        console.columns(
            "\nmilliseconds from COMMIT to the purchase",
            ["", "median", "p99", "events"],
            [
                (name, f"{each['median_ms']:.1f}", f"{each['p99_ms']:.1f}", each["count"])
                for name, each in found["latency"].items()
            ],
            numbers=(1, 2, 3),
        )


def _per_10k(run: Run, seconds: float | None) -> float | None:
    return None if seconds is None else seconds / run.events * 10_000


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
