"""The output of `bench`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outbox_worker import terminal
from outbox_worker.durations import count_of

if TYPE_CHECKING:
    from outbox_worker.bench.run import BenchReport, BenchRun


def bench_object(report: BenchReport) -> dict[str, Any]:
    """Return the object of ``bench --json``. It contains the medians of all rounds."""
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
        "mixed_ratio": report.mixed_ratio,
        "statements_per_batch": report.waits_per_batch,
        "start_up_ratio": statistics.median(report.start_ups),
        "latency": latencies,
    }


def print_bench(report: BenchReport) -> None:
    """Print the medians of all rounds.

    A contestant is the worker or an alternative, such as bare SQL. Its ratio is its rate divided by
    the rate of bare SQL in the same round.
    """
    found, plan = bench_object(report), report.plan
    terminal.columns(
        f"{count_of(plan.events, 'event')}, {count_of(plan.rounds, 'round')}, {count_of(plan.concurrency, 'loop')}, "
        f"guard {plan.guard}",
        ["contestant", "events/s", "ratio", "client CPU/10k", "server CPU/10k", "WAL/event"],
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
    terminal.line(
        f"\nWith the mixed load, the worker reaches {found['mixed_ratio']:.2f} of its rate with clean events."
        f"\nFor a full batch, one loop waits {found['statements_per_batch']:.1f} times for the server, COMMIT included."
        f"\nA worker needs {found['start_up_ratio']:.1f} times as long to start as to import SQLAlchemy and psycopg."
    )
    if report.latencies:
        terminal.columns(
            "\nmilliseconds from COMMIT to the purchase",
            ["found", "median", "p99", "events"],
            [
                (name, f"{each['median_ms']:.1f}", f"{each['p99_ms']:.1f}", each["count"])
                for name, each in found["latency"].items()
            ],
            numbers=(1, 2, 3),
        )


def _per_10k(run: BenchRun, seconds: float | None) -> float | None:
    return None if seconds is None else seconds / run.events * 10_000


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
