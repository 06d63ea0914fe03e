"""The metrics of one process. Names and labels are a contract; labels never carry what a producer wrote."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_right
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from outbox_worker import __version__
from outbox_worker.database.failures import Failure
from outbox_worker.model import PURCHASE_CONFIRMED, PURCHASE_REFUNDED, Outcome, Reason

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
_KNOWN_TYPES = (PURCHASE_CONFIRMED, PURCHASE_REFUNDED)
_OTHER = "other"
_RESULTS = ("commit", "rollback", "unknown")
"""How a transaction can end."""


class BulkHistogram(Collector):
    """A histogram that counts a thousand values in one call; the library's own counts them one by one."""

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
            "outbox_unexplained_payments", "Succeeded payments that nothing explains", registry=registry
        )
        self.unexplained.set(math.nan)  # no backfill has looked yet
        self.at_risk = Gauge("outbox_value_at_risk", "Money of unexplained payments", ["currency"], registry=registry)
        self.build = Gauge("outbox_build_info", "Always 1", ["version"], registry=registry)
        self.since_poll = Gauge(
            "outbox_since_poll_seconds", "Since the last look at the outbox that succeeded", registry=registry
        )
        self.horizon = Gauge(
            "outbox_vacuum_horizon_seconds", "For how long the vacuum horizon has stood still", registry=registry
        )
        self.build.labels(__version__).set(1)
        self._polled_at = time.monotonic()
        self.since_poll.set_function(lambda: time.monotonic() - self._polled_at)
        self._begin_at_zero()

    def polled(self) -> None:
        """Note that a look at the outbox succeeded."""
        self._polled_at = time.monotonic()

    def count_events(self, event_type: str, outcome: Outcome, count: int) -> None:
        """Count events. All unknown types count as one, because a producer can write any number of them."""
        self.events.labels(event_type if event_type in _KNOWN_TYPES else _OTHER, outcome).inc(count)

    def _begin_at_zero(self) -> None:
        """Create every series at 0: ``rate`` and ``increase`` miss the event with which a series appears."""
        for event_type, outcome in product((*_KNOWN_TYPES, _OTHER), Outcome):
            self.events.labels(event_type, outcome)
        for counter, values in (
            (self.dead_letters, Reason),
            (self.transactions, _RESULTS),
            (self.database_errors, Failure),
        ):
            for value in values:
                counter.labels(value)

    def totals(self) -> Tally[str]:
        """Events by outcome, transactions by result, and fallbacks, since the start; zeros are left out."""
        tally: Tally[str] = Tally()
        for family, prefix, label in (
            (self.events, "", "outcome"),
            (self.transactions, "transactions_", "result"),
            (self.fallbacks, "constraint_fallbacks", ""),
        ):
            for sample in (sample for each in family.collect() for sample in each.samples):
                if sample.name.endswith("_total"):
                    tally[prefix + sample.labels.get(label, "")] += int(sample.value)
        return +tally

    def snapshot(self) -> dict[str, float]:
        """The counters (and sums and counts of histograms) as ``name{label="value"}``: what ``status`` adds up."""
        samples = (sample for family in self.registry.collect() for sample in family.samples)
        return {
            _series(sample.name, sample.labels): sample.value
            for sample in samples
            if sample.name.endswith(("_total", "_sum", "_count")) and (sample.value or not sample.labels)
        }


def _series(name: str, labels: Mapping[str, str]) -> str:
    written = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{written}}}" if written else name
