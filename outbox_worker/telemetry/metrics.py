"""Defines the metrics of one process. Names and labels must not change. Labels never contain text from a producer."""

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
from outbox_worker.model import PURCHASE_CONFIRMED, PURCHASE_REFUNDED, Latencies, Outcome, Reason

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
_KNOWN_TYPES = (PURCHASE_CONFIRMED, PURCHASE_REFUNDED)
_OTHER = "other"
_RESULTS = ("commit", "rollback", "unknown")
"""The possible results of a transaction."""


class BulkHistogram(Collector):
    """A histogram that counts many values in one call. The histogram of the library accepts one value per call."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = [*bounds, math.inf]
        self._lock = threading.Lock()
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe_all(self, values: Iterable[float]) -> None:
        """Count each value in every bucket whose upper bound is at least the value."""
        ordered = sorted(values)
        below = [bisect_right(ordered, bound) for bound in self._bounds]
        with self._lock:
            self._counts = [had + count for had, count in zip(self._counts, below, strict=True)]
            self._sum += math.fsum(ordered)

    def observe_counts(self, latencies: Latencies) -> None:
        """Add counts that the database has computed for the same buckets."""
        with self._lock:
            for bounds_not_below, count in latencies.buckets:
                for at in range(len(self._counts) - 1 - bounds_not_below, len(self._counts)):
                    self._counts[at] += count
            self._sum += latencies.seconds

    def collect(self) -> Iterator[Metric]:
        """Return the histogram in the form that prometheus_client exports."""
        with self._lock:
            bounds = [floatToGoString(bound) for bound in self._bounds]  # type: ignore[no-untyped-call]
            buckets = list(zip(bounds, self._counts, strict=True))
            yield HistogramMetricFamily(self._name, self._documentation, buckets, self._sum)


class Metrics:
    """All metrics of the worker, in a separate registry. Names and labels must not change."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.events = Counter(
            "outbox_events", "Number of handled events, by outcome", ["event_type", "outcome"], registry=registry
        )
        self.dead_letters = Counter(
            "outbox_dead_letters", "Number of events that became dead letters, by reason", ["reason"], registry=registry
        )
        self.fallbacks = Counter(
            "outbox_constraint_fallback",
            "Number of batches settled with the guard `lock` instead of `index`",
            registry=registry,
        )
        self.transactions = Counter(
            "outbox_transactions",
            "Number of transactions that claimed at least one event, by result",
            ["result"],
            registry=registry,
        )
        self.database_errors = Counter(
            "outbox_database_errors", "Number of failed transactions, by class of failure", ["class"], registry=registry
        )
        self.batch_seconds = Histogram(
            "outbox_batch_duration_seconds",
            "Time from the claim to the end of COMMIT",
            buckets=SECONDS,
            registry=registry,
        )
        self.latency = BulkHistogram(
            "outbox_settle_latency_seconds", "Time from due_at to the end of COMMIT of a settled event", SECONDS
        )
        registry.register(self.latency)
        self.batch_size = Histogram(
            "outbox_batch_size",
            "Number of events that one claim took; claims that found no event are not counted",
            buckets=(1, 3, 10, 30, 100, 300, 1000, 3000, 10000),
            registry=registry,
        )
        self.due = Gauge(
            "outbox_due_events", "Number of events that are due now, counted only up to a limit", registry=registry
        )
        self.oldest_due = Gauge(
            "outbox_oldest_due_seconds", "Time since due_at of the oldest due event", registry=registry
        )
        self.open_letters = Gauge(
            "outbox_open_dead_letters",
            "Number of dead letters in state `open`, which wait for a person",
            registry=registry,
        )
        self.ignored = Gauge(
            "outbox_ignored_events",
            "Number of events whose type no handler settles, so that they stay in the outbox for other consumers",
            registry=registry,
        )
        self.set_aside = Gauge(
            "outbox_set_aside_events",
            "Number of events that no worker claims, because the database refuses to change their rows",
            registry=registry,
        )
        self.guard = Gauge("outbox_guard", "1 if the worker uses this guard", ["mode"], registry=registry)
        self.unexplained = Gauge(
            "outbox_unexplained_payments",
            "Number of succeeded payments that have no purchase, although no reason for this is known",
            registry=registry,
        )
        self.unexplained.set(math.nan)  # no backfill has searched for such payments yet
        self.at_risk = Gauge(
            "outbox_value_at_risk",
            "Sum of the amounts of unexplained payments, by currency",
            ["currency"],
            registry=registry,
        )
        self.build = Gauge(
            "outbox_build_info", "Always 1; the label is the version of the worker", ["version"], registry=registry
        )
        self.since_poll = Gauge(
            "outbox_since_poll_seconds",
            "Time since the last successful claim, even if it found no event",
            registry=registry,
        )
        self.horizon = Gauge(
            "outbox_vacuum_horizon_seconds", "Time since the vacuum horizon last moved", registry=registry
        )
        self.build.labels(__version__).set(1)
        self._polled_at = time.monotonic()
        self.since_poll.set_function(lambda: time.monotonic() - self._polled_at)
        self._begin_at_zero()

    def polled(self) -> None:
        """Record that a claim succeeded, even if it found no event."""
        self._polled_at = time.monotonic()

    def count_events(self, event_type: str, outcome: Outcome, count: int) -> None:
        """Count events. All unknown event types share one label value.

        Otherwise producers could create any number of label values.
        """
        self.events.labels(event_type if event_type in _KNOWN_TYPES else _OTHER, outcome).inc(count)

    def _begin_at_zero(self) -> None:
        """Create every series with the value 0.

        The Prometheus functions ``rate`` and ``increase`` ignore the first value of a series.
        """
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
        """Return the counts since the start: events by outcome, transactions by result, and fallbacks. Omit zeros."""
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
        """Return the values of all counters, and the sums and counts of all histograms, for the command ``status``.

        Each key has the form ``name{label="value"}``.
        """
        samples = (sample for family in self.registry.collect() for sample in family.samples)
        return {
            _series(sample.name, sample.labels): sample.value
            for sample in samples
            if sample.name.endswith(("_total", "_sum", "_count")) and (sample.value or not sample.labels)
        }


def _series(name: str, labels: Mapping[str, str]) -> str:
    written = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{written}}}" if written else name
