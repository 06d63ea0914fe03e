"""Facts, reported once and after commit; logs and metrics only read them.

No payload text and no secret ever reaches a record: fields are ids, counts, and names of errors.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from bisect import bisect_right
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from loguru import logger
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from outbox_worker import __version__
from outbox_worker.database import unavailable
from outbox_worker.errors import CommitLost, Failure, classify, describe, sqlstate, trace
from outbox_worker.model import (
    PURCHASE_CONFIRMED,
    PURCHASE_REFUNDED,
    Batch,
    Guard,
    Outcome,
    Verdict,
    Verdicts,
    by_outcome,
)

if TYPE_CHECKING:
    from loguru import Message, Record

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
_KNOWN_TYPES = frozenset({PURCHASE_CONFIRMED, PURCHASE_REFUNDED})


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What one committed transaction did. A claimed event without a verdict was left in the outbox as it was."""

    batch: Batch
    verdicts: Verdicts
    limit: int
    guard: Guard
    seconds: float = 0.0
    """From the claim to the end of COMMIT."""
    transaction: Literal["commit", "unknown"] = "commit"

    @property
    def is_full(self) -> bool:
        return len(self.batch) >= self.limit

    @cached_property
    def by_outcome(self) -> dict[Outcome, list[int]]:
        """The events of each outcome."""
        return by_outcome(self.verdicts)

    def outcomes(self) -> Tally[Outcome]:
        return Tally({outcome: len(keys) for outcome, keys in self.by_outcome.items()})


class BulkHistogram(Collector):
    """A histogram that takes a thousand values at once; the library's own takes them one by one."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = [*bounds, math.inf]
        self._lock = threading.Lock()
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe_all(self, values: Iterable[float]) -> None:
        """Count each value in the first bucket whose bound it does not exceed."""
        ordered = sorted(values)
        below = [bisect_right(ordered, bound) for bound in self._bounds]
        with self._lock:
            self._counts = [had + count for had, count in zip(self._counts, below, strict=True)]
            self._sum += math.fsum(ordered)

    def collect(self) -> Iterator[Metric]:
        """One family of cumulative buckets."""
        with self._lock:
            bounds = [floatToGoString(bound) for bound in self._bounds]  # type: ignore[no-untyped-call]
            buckets = list(zip(bounds, self._counts, strict=True))
            yield HistogramMetricFamily(self._name, self._documentation, buckets, self._sum)


class Metrics:
    """The metrics of the worker in a registry of their own. Names and labels are a contract."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.events = Counter("outbox_events", "Events by outcome", ["event_type", "outcome"], registry=registry)
        self.dead_letters = Counter("outbox_dead_letters", "Events buried, by reason", ["reason"], registry=registry)
        self.fallbacks = Counter("outbox_constraint_fallback", "Batches settled by the lock guard", registry=registry)
        self.transactions = Counter(
            "outbox_transactions", "Transactions that claimed something", ["result"], registry=registry
        )
        self.database_errors = Counter(
            "outbox_database_errors", "Errors of the database, by class of failure", ["class"], registry=registry
        )
        self.batch_seconds = Histogram(
            "outbox_batch_duration_seconds", "Claim to COMMIT", buckets=_SECONDS, registry=registry
        )
        self.latency = BulkHistogram("outbox_settle_latency_seconds", "Due to settled", _SECONDS)
        registry.register(self.latency)
        self.batch_size = Histogram(
            "outbox_batch_size",
            "Events per claim",
            buckets=(1, 3, 10, 30, 100, 300, 1000, 3000, 10000),
            registry=registry,
        )
        self.due = Gauge("outbox_due_events", "Events due now (counted up to a bound)", registry=registry)
        self.oldest_due = Gauge("outbox_oldest_due_seconds", "Lateness of the oldest due event", registry=registry)
        self.open_letters = Gauge("outbox_open_dead_letters", "Dead letters that wait for a person", registry=registry)
        self.guard = Gauge("outbox_guard", "1 for the guard in force", ["mode"], registry=registry)
        self.unexplained = Gauge(
            "outbox_unexplained_payments", "Standing payments that nothing explains", registry=registry
        )
        self.at_risk = Gauge("outbox_value_at_risk", "Money of unexplained payments", ["currency"], registry=registry)
        self.build = Gauge("outbox_build_info", "Always 1", ["version"], registry=registry)
        self.build.labels(__version__).set(1)

    def snapshot(self) -> dict[str, float]:
        """The counters (and sums and counts of histograms) as ``name{label="value"}``: what ``status`` adds up."""
        samples = (sample for family in self.registry.collect() for sample in family.samples)
        return {
            _series(sample.name, sample.labels): sample.value
            for sample in samples
            if sample.name.endswith(("_total", "_sum", "_count"))
        }


def _series(name: str, labels: Mapping[str, str]) -> str:
    written = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{written}}}" if written else name


@dataclass
class Telemetry:
    """Turns reports into metrics and log records."""

    metrics: Metrics = field(default_factory=Metrics)
    _told: Tally[str] = field(default_factory=Tally)
    _told_at: float = field(default_factory=time.monotonic)
    _guard_is_known: bool = False
    _currencies: set[str] = field(default_factory=set)

    def started(self, concurrency: int, guard: Guard) -> None:
        """The first look found all that is needed."""
        logger.bind(event="worker_started", version=__version__, concurrency=concurrency, guard=str(guard)).info(
            "ready; {} claim loop(s)", concurrency
        )

    def going_carefully(self, events: int) -> None:
        """A worker before us died: what it had in hand may have killed it."""
        logger.bind(event="going_carefully", events=events).warning(
            "a worker before this one died; its events are taken one by one, in case one of them killed it"
        )

    def stopping(self) -> None:
        """A signal came."""
        logger.bind(event="worker_stopping").info("stopping after the current batch")

    def stopped(self) -> None:
        """The last batch is over."""
        outcomes = self._outcomes()
        logger.bind(event="worker_stopped", **outcomes).info("stopped; in all {}", _counted(outcomes))

    def trouble(self, error: BaseException, pause_seconds: float) -> None:
        """A step failed and is tried again after a pause; no event is charged."""
        cause = error.__cause__ if isinstance(error, CommitLost) else error
        failure = classify(cause or error)
        level = "WARNING" if failure in (Failure.RETRY, Failure.RECONNECT) else "ERROR"
        named, sentence = describe(cause or error), "the database is in trouble; waiting"
        if failure is Failure.RECONNECT and sqlstate(cause or error) is None:
            named, sentence = str(unavailable(cause or error)), "no connection to the database; waiting"
        fields = {"failure": str(failure), "error": named, "pause_seconds": round(pause_seconds, 2)}
        if failure is Failure.BUG:
            sentence = "our own error; rolled back, trying again"
            fields["trace"] = trace(error)
        logger.bind(event="paused", **fields).log(level, sentence)

    def schema_problems(self, problems: str) -> None:
        """A table, column or privilege that was there at the start is missing now."""
        logger.bind(event="schema_problems", problems=problems).error("the database lacks what the worker needs")

    def observe_backlog(self, due: int, oldest_due_seconds: float, open_letters: int) -> None:
        """Set the gauges that one cheap query per interval answers."""
        self.metrics.due.set(due)
        self.metrics.oldest_due.set(oldest_due_seconds)
        self.metrics.open_letters.set(open_letters)

    def observe_unexplained(self, payments: int, money: Mapping[str, Decimal]) -> None:
        """What the last backfill left unexplained, by whichever worker."""
        self.metrics.unexplained.set(payments)
        self._currencies |= money.keys()
        for currency in self._currencies:
            self.metrics.at_risk.labels(currency).set(float(money.get(currency, 0)))

    def payments_unexplained(self, payments: int, money: Mapping[str, Decimal]) -> None:
        """A periodic backfill found something, and may only say so."""
        logger.bind(event="payments_unexplained", payments=payments, money=_amounts(money)).warning(
            "paid, and nothing given: {} payment(s). Look with `outbox-worker backfill --dry-run`", payments
        )

    def backfill_refused(self, payments: int, money: Mapping[str, Decimal], most: int) -> None:
        """A periodic backfill found more than it may make."""
        logger.bind(event="backfill_refused", payments=payments, money=_amounts(money), most=most).error(
            "paid, and nothing given: {} payment(s), which is no accident any more; a person must look", payments
        )

    def purchases_backfilled(self, made: int, contended: int, refused: int) -> None:
        """A periodic backfill made what was owed."""
        logger.bind(event="purchases_backfilled", made=made, contended=contended, refused=refused).warning(
            "made {} purchase(s) that were paid and never given: their events are missing", made
        )

    def beat(self) -> dict[str, float]:
        """Sum up since the last beat: an INFO record where something was settled, and the snapshot for ``workers``."""
        now, settled = time.monotonic(), self._outcomes()
        fresh, seconds = settled - self._told, now - self._told_at
        if fresh:
            logger.bind(event="batches_settled", **fresh).info("in the last {:.0f} s {}", seconds, _counted(fresh))
        self._told, self._told_at = settled, now
        return self.metrics.snapshot() | {"events_per_second": sum(fresh.values()) / seconds if seconds > 0 else 0.0}

    def _outcomes(self) -> Tally[str]:
        """Events so far, by outcome."""
        tally: Tally[str] = Tally()
        for family in self.metrics.events.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    tally[sample.labels["outcome"]] += int(sample.value)
        return tally

    def batch_committed(self, report: BatchReport) -> None:
        """One transaction committed; an empty claim leaves no trace."""
        if not report.batch:
            return
        self._count(report)
        outcomes = {str(outcome): count for outcome, count in sorted(report.outcomes().items())}
        logger.bind(
            event="batch_committed",
            claimed=len(report.batch),
            guard=str(report.guard),
            milliseconds=round(report.seconds * 1000, 1),
            result=report.transaction,
            **outcomes,
        ).debug("settled {} of {} claimed events", len(report.verdicts), len(report.batch))
        if report.verdicts and report.guard is Guard.LOCK:
            logger.bind(event="constraint_fallback", claimed=len(report.batch)).debug("batch settled by the lock guard")
        for key, verdict in report.verdicts.items():
            if not verdict.clean:
                self._tell(report, key, verdict)

    def _count(self, report: BatchReport) -> None:
        metrics = self.metrics
        metrics.transactions.labels(report.transaction).inc()
        metrics.batch_size.observe(len(report.batch))
        metrics.batch_seconds.observe(report.seconds)
        metrics.fallbacks.inc(bool(report.verdicts) and report.guard is Guard.LOCK)
        keys = report.by_outcome
        for event_type, events in report.batch.by_type().items():
            label = event_type if event_type in _KNOWN_TYPES else "other"
            for outcome, settled in keys.items():
                count = len(settled) if events is report.batch else sum(key in events for key in settled)
                metrics.events.labels(label, outcome).inc(count)
        for reason, count in Tally(report.verdicts[key].reason for key in keys.get(Outcome.DEAD, ())).items():
            metrics.dead_letters.labels(reason).inc(count)
        settled = [key for outcome in keys if outcome is not Outcome.RETRIED for key in keys[outcome]]
        metrics.latency.observe_all([late + report.seconds for late in report.batch.among(settled).lateness])

    def _tell(self, report: BatchReport, key: int, verdict: Verdict) -> None:
        """Single events a person may want to find again."""
        event = report.batch[key]
        attempts = event.attempts + (verdict.outcome in (Outcome.RETRIED, Outcome.DEAD))
        record = logger.bind(event_id=str(event.event_id), payment_id=event.payment_id, attempts=attempts)
        match verdict.outcome:
            case Outcome.RECOVERED:
                record.bind(event="purchase_recovered").warning("a marked event had no purchase; it was made now")
            case Outcome.DUPLICATE_PAYMENT:
                record.bind(event="duplicate_payment").warning("the student paid twice for the course; nothing granted")
            case Outcome.DEAD:
                record.bind(event="event_buried", reason=str(verdict.reason), detail=verdict.detail).error(
                    "an event cannot succeed as it stands; it is a dead letter now"
                )
            case Outcome.RETRIED:
                record.bind(event="event_retried", reason=str(verdict.reason), detail=verdict.detail).debug(
                    "an event did not succeed yet; it is tried again later"
                )
            case Outcome.REVOKED if verdict.passed_to is not None:
                record.bind(event="purchase_passed_on", passed_to=verdict.passed_to).info(
                    "a purchase was refunded; another payment of the student for the course got it"
                )
            case _:
                record.bind(event=f"event_{verdict.outcome}").debug("settled")

    def transaction_failed(self, error: BaseException, claimed_something: bool) -> None:
        """Nothing of a transaction stands, or nobody knows; no event was charged."""
        cause = error.__cause__ or error
        if claimed_something:
            self.metrics.transactions.labels("unknown" if isinstance(error, CommitLost) else "rollback").inc()
        self.metrics.database_errors.labels(classify(cause)).inc()
        logger.bind(event="transaction_rolled_back", failure=str(classify(cause)), error=describe(cause)).debug(
            "rolled back"
        )

    def guard_changed(self, guard: Guard) -> None:
        """The guard in force is known for the first time, or is another than before."""
        is_news = self._guard_is_known or guard is not Guard.INDEX
        self._guard_is_known = True
        for mode in Guard:
            self.metrics.guard.labels(mode).set(mode is guard)
        hint = "" if guard is Guard.INDEX else "; writers that skip it are not covered: migrate --with unique_index"
        level = "WARNING" if is_news else "INFO"
        logger.bind(event="guard_changed", guard=str(guard)).log(level, "the guard is the {}{}", str(guard), hint)


def _amounts(money: Mapping[str, Decimal]) -> dict[str, str]:
    return {currency: f"{amount:.2f}" for currency, amount in money.items()}


def _counted(outcomes: Mapping[str, int]) -> str:
    """``3 events: 2 created, 1 retried``."""
    listed = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    total = sum(outcomes.values())
    return f"{total} event{'' if total == 1 else 's'}: {listed}" if outcomes else "no events"


def configure_logging(level: str, style: Literal["json", "console"] | None) -> None:
    """Send records to stderr: one JSON object a line, or text for people (the default on a terminal)."""
    logger.remove()
    colours = sys.stderr.isatty()
    if (style or ("console" if colours else "json")) == "json":
        logger.add(_write_json, level=level, format="{message}", backtrace=False, diagnose=False)
    else:
        logger.add(_write, level=level, format=_console_line, colorize=colours, backtrace=False, diagnose=False)


def _write(line: str) -> None:
    """A record that cannot be written is lost; loguru would tell so with all errors that are being handled."""
    with suppress(OSError, ValueError):
        sys.stderr.write(line)


def _write_json(message: Message) -> None:
    record = message.record
    line = {
        "time": record["time"].astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record["level"].name,
        **record["extra"],
        "message": record["message"],
    }
    _write(json.dumps(line, default=str, ensure_ascii=True) + "\n")


def _console_line(record: Record) -> str:
    fields = " ".join(f"{key}={{extra[{key}]}}" for key, value in record["extra"].items() if value is not None)
    return f"<dim>{{time:HH:mm:ss}}</dim> <level>{{level: <7}}</level> {{message}} <dim>{fields}</dim>\n"
