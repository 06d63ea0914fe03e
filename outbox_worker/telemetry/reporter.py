"""Writes the log records and metrics of the worker about batches, starts, stops, outages and backfills.

A log record never contains payload text or a secret. Its fields are ids, counts, sums of money and names of errors.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Literal

from loguru import logger

from outbox_worker import __version__
from outbox_worker.database.engine import unavailable
from outbox_worker.database.failures import Failure, classify, describe, login_refusal, sqlstate, trace
from outbox_worker.durations import count_of
from outbox_worker.errors import CommitLost
from outbox_worker.model import (
    ALWAYS,
    NO_LATENCIES,
    PURCHASE_CONFIRMED,
    Batch,
    DueWindow,
    Guard,
    Latencies,
    Outcome,
    Verdicts,
    by_outcome,
)
from outbox_worker.money import amount_texts
from outbox_worker.telemetry.events import log_events, log_set_aside, log_unrecorded
from outbox_worker.telemetry.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """The result of one batch.

    A fast transaction settles events by one statement. A careful transaction decides each event
    under locks. A batch uses one of these transactions, or both.
    """

    claimed: int = 0
    """The number of events that the batch claimed."""
    limit: int
    guard: Guard
    created: int = 0
    """The number of events that the fast transaction settled. Each of these events got a
    purchase."""
    latencies: Latencies = NO_LATENCIES
    """The latencies of the events that the fast transaction settled, with an estimate for
    COMMIT."""
    fell_out: Sequence[int] = ()
    """Claimed events (``outbox.id``) that this transaction did not change. A careful transaction
    settles them next."""
    windows: Sequence[DueWindow] = (ALWAYS,)
    """The ranges of the due times of the events in ``fell_out``."""
    batch: Batch = field(default_factory=Batch)
    """The events of the careful transaction. An event that has no verdict stays unchanged in the outbox."""
    verdicts: Verdicts = field(default_factory=dict)
    postponed: Mapping[int, str] = field(default_factory=dict)
    """The events whose failure the database refused to record. Maps each ``outbox.id`` to the
    refusal.

    The worker tries these events again later.
    """
    set_aside: Mapping[int, str] = field(default_factory=dict)
    """The events whose rows the database refused to delete or change. Maps each ``outbox.id`` to
    the refusal."""
    has_made_way: bool = False
    """Whether the batch only postponed its events, without counting a try. The worker can then
    claim other events."""
    seconds: float = 0.0
    """The duration from the claim to the end of COMMIT."""
    transaction: Literal["commit", "unknown"] = "commit"

    @property
    def is_full(self) -> bool:
        return self.claimed >= self.limit

    @property
    def settled(self) -> int:
        """The number of events whose outcome is recorded."""
        return self.created + len(self.verdicts)

    @cached_property
    def by_outcome(self) -> dict[Outcome, list[int]]:
        """Maps each outcome to the ids of its events in the careful transaction."""
        return by_outcome(self.verdicts)

    def outcomes(self) -> Tally[Outcome]:
        judged = Tally({outcome: len(keys) for outcome, keys in self.by_outcome.items()})
        return judged + Tally({Outcome.CREATED: self.created})

    def followed_by(self, careful: BatchReport) -> BatchReport:
        """Return the report of the whole batch.

        ``careful``: the report of the careful transaction that handled the events in ``fell_out``.
        """
        return replace(
            careful,
            claimed=self.claimed,
            limit=self.limit,
            created=self.created + careful.created,
            latencies=self.latencies,
            windows=self.windows,
            verdicts=self.verdicts | careful.verdicts,
            postponed={**self.postponed, **careful.postponed},
            set_aside={**self.set_aside, **careful.set_aside},
            seconds=self.seconds + careful.seconds,
        )


@dataclass
class Telemetry:
    """The writer of all metrics and log records of the worker."""

    metrics: Metrics = field(default_factory=Metrics)
    _told: Tally[str] = field(default_factory=Tally)
    _told_at: float = field(default_factory=time.monotonic)
    _telling: threading.Lock = field(default_factory=threading.Lock)
    _has_settled: bool = False
    _has_told_ignored: bool = False
    _at_beat: Tally[str] = field(default_factory=Tally)
    _beat_at: float = field(default_factory=time.monotonic)
    _in_trouble_since: float | None = None
    _currencies: set[str] = field(default_factory=set)

    def started(self, concurrency: int, guard: Guard) -> None:
        """Log that the database contains everything that the worker needs, and that the claim loops start."""
        logger.bind(event="worker_started", version=__version__, concurrency=concurrency, guard=str(guard)).info(
            "ready; {}", count_of(concurrency, "claim loop")
        )

    def nullable_columns(self, columns: Sequence[str]) -> None:
        """Log at start which columns can be NULL, although the worker needs a value."""
        logger.bind(event="nullable_columns", columns=columns).warning(
            "{} may be NULL, but the worker needs a value in each row. For the remedy, run: outbox-worker doctor",
            count_of(len(columns), "column"),
        )

    def isolating_after_crash(self, events: int) -> None:
        """Log that an earlier worker died. This worker settles the next events one by one."""
        logger.bind(event="going_carefully", events=events).warning(
            "an earlier worker died; the next events are settled one by one, because one of them may be the cause"
        )

    def crash_counted(self, host: str, pid: int, event: int | None) -> None:
        """Log that another worker died while it processed a single event. ``event`` is the id in the outbox."""
        logger.bind(event="crash_counted", host=host, pid=pid, outbox_id=event).error(
            "a worker died while it processed a single event; after three such deaths, the event is a dead letter"
        )

    def http_listening(self, address: str) -> None:
        """Log the address at which the worker answers HTTP."""
        logger.bind(event="http_listening", address=address).info("HTTP at {}", address)

    def http_unavailable(self, address: str, error: str) -> None:
        """Log that the worker cannot answer HTTP. The worker still settles events."""
        logger.bind(event="http_unavailable", address=address, error=error).error(
            "cannot answer HTTP at {}: {}; trying again; the worker settles events meanwhile", address, error
        )

    def watchdog_is_short(self, watchdog_seconds: float, step_seconds: float) -> None:
        """Warn that ``WatchdogSec`` is too short.

        If the database is slow, systemd would kill a healthy worker.
        """
        logger.bind(event="watchdog_short", watchdog_seconds=watchdog_seconds, step_seconds=step_seconds).warning(
            "WatchdogSec is shorter than a step of a claim loop may take; raise WatchdogSec, or lower "
            "OUTBOX_DATABASE_DEADLINE_SECONDS"
        )

    def reloaded(self, changed: Sequence[str], left: Sequence[str]) -> None:
        """Log which settings changed. ``left`` contains the changed settings that take effect only after a restart."""
        logger.bind(event="reloaded", changed=changed).info("the settings were read again")
        if left:
            logger.bind(event="restart_needed", settings=left).warning(
                "these settings have changed, too, but take effect only after a restart: {}", ", ".join(left)
            )

    def reload_refused(self, problems: str) -> None:
        """Log that the new settings cannot be used. The worker continues with the old settings."""
        logger.bind(event="reload_refused", problems=problems).error("the settings were not reloaded. {}", problems)

    def stopping(self) -> None:
        """Log that the worker stops because it got a signal."""
        logger.bind(event="worker_stopping").info("stopping after the current batch")

    def stopped(self) -> None:
        """Log that the worker has stopped, with all counts since its start."""
        counts = self.metrics.totals()
        logger.bind(event="worker_stopped", **counts).info("stopped; since the start {}", _counted(_outcomes(counts)))

    def trouble(self, error: BaseException, pause_seconds: float) -> None:
        """Log that a step failed. The worker tries again after a pause.

        This failure does not count as a failed try of any event.
        """
        cause = (error.__cause__ if isinstance(error, CommitLost) else None) or error
        failure = classify(cause)
        if failure is not Failure.RETRY and self._in_trouble_since is None:
            self._in_trouble_since = time.monotonic()
        passes, sentence = _trouble(cause, failure)
        never_connected = failure is Failure.RECONNECT and sqlstate(cause) is None
        logger.bind(
            event="paused",
            failure=str(failure),
            error=str(unavailable(cause)) if never_connected else describe(cause),
            pause_seconds=round(pause_seconds, 2),
            trace=trace(error) if failure is Failure.BUG else None,
        ).log("WARNING" if passes else "ERROR", "{}", sentence)

    def _resumed(self) -> None:
        """Log that the database is available again, if the method ``trouble`` logged an outage."""
        since, self._in_trouble_since = self._in_trouble_since, None
        if since is not None:
            seconds = round(time.monotonic() - since, 1)
            logger.bind(event="resumed", seconds=seconds).info("the database is available again after {} s", seconds)

    def schema_problems(self, problems: str) -> None:
        """Log which tables, columns and privileges are missing now, although they were present at the start."""
        logger.bind(event="schema_problems", problems=problems).error(
            "the database lacks something that the worker needs"
        )

    def tables_adopted(self, tables: Sequence[str], *, ignores_types: bool) -> None:
        """Log which tables the migrations did not create, and what the worker does with unknown event types."""
        others = "stay in the outbox" if ignores_types else "become dead letters"
        logger.bind(event="tables_adopted", tables=tables, ignores_types=ignores_types).info(
            "adopted, because `outbox-worker migrate` did not create them: {}; events of unknown types {}",
            ", ".join(tables),
            others,
        )

    def setup_concern(self, finding: str, remedy: str) -> None:
        """Warn of a problem that can lose rows or purchases later. The worker still runs now."""
        logger.bind(event="setup_concern", finding=finding, remedy=remedy).warning("{}", finding)

    def observe_ignored(self, events: int, types: Mapping[str, int]) -> None:
        """Set the gauge of events that stay in the outbox because the worker ignores their type.

        If there are such events, warn once. The warning names the most frequent types.
        """
        self.metrics.ignored.set(events)
        if events and not self._has_told_ignored:
            self._has_told_ignored = True
            logger.bind(event="types_ignored", events=events, types=types).warning(
                "{} stay in the outbox, because no handler settles their types and OUTBOX_UNKNOWN_TYPES is `ignore`",
                count_of(events, "event"),
            )

    def observe_backlog(self, due: int, oldest_due_seconds: float, open_letters: int) -> None:
        """Set the gauges of the queue. The worker measures their values at every heartbeat."""
        self.metrics.due.set(due)
        self.metrics.oldest_due.set(oldest_due_seconds)
        self.metrics.open_letters.set(open_letters)

    def observe_set_aside(self, events: int) -> None:
        """Set the gauge of events that no worker claims, because the database refuses to change their rows."""
        self.metrics.set_aside.set(events)

    def ended_with_set_aside(self, events: int) -> None:
        """Log that `run --drain` ends although some due events are set aside and still in the outbox."""
        logger.bind(event="drain_left_events", count=events).error(
            "{} set aside, because the database refuses to change their rows, and are still in the outbox. "
            "To see why, run: outbox-worker status",
            "1 event is" if events == 1 else f"{events} events are",
        )

    def observe_horizon(self, stood_still_seconds: float) -> None:
        """Set the gauge of seconds since the vacuum horizon last moved.

        While the horizon does not move, VACUUM cannot remove the rows of deleted events.
        """
        self.metrics.horizon.set(stood_still_seconds)

    def observe_unexplained(self, payments: int, money: Mapping[str, Decimal]) -> None:
        """Set the gauges of payments without a purchase to the result of the last backfill."""
        self.metrics.unexplained.set(payments)
        self._currencies |= money.keys()
        for currency in self._currencies:
            self.metrics.at_risk.labels(currency).set(float(money.get(currency, 0)))

    def payments_unexplained(self, payments: int, money: Mapping[str, Decimal]) -> None:
        """Log that a periodic backfill found payments without a purchase, but only reports them."""
        logger.bind(event="payments_unexplained", payments=payments, money=amount_texts(money)).warning(
            "{} without a purchase. To list them, run: outbox-worker backfill --dry-run", count_of(payments, "payment")
        )

    def payments_not_judged(self, payments: int) -> None:
        """Log that a periodic backfill cannot judge some payments, because a value is missing or cannot be used."""
        logger.bind(event="payments_not_judged", payments=payments).warning(
            "{} cannot be judged, because a value is missing or cannot be used. To list them, run: outbox-worker audit",
            count_of(payments, "payment"),
        )

    def backfill_refused(self, payments: int, money: Mapping[str, Decimal], most: int) -> None:
        """Log that a periodic backfill found more missing purchases than it is allowed to create.

        A person must check these purchases.
        """
        logger.bind(event="backfill_refused", payments=payments, money=amount_texts(money), most=most).error(
            "{} without a purchase, more than the periodic backfill may create; a person must check them",
            count_of(payments, "payment"),
        )

    def purchases_backfilled(self, made: int, contended: int, refused: int) -> None:
        """Log that a periodic backfill created missing purchases."""
        logger.bind(event="purchases_backfilled", made=made, contended=contended, refused=refused).warning(
            "created {}, because the payments have no event in the outbox", count_of(made, "missing purchase")
        )

    def beat(self) -> dict[str, float]:
        """Log the counts of settled events. Return the counters and the current rate for ``workers.metrics``."""
        self._log_settled()
        now, totals = time.monotonic(), self.metrics.totals()
        settled, seconds = sum(_outcomes(totals - self._at_beat).values()), now - self._beat_at
        self._at_beat, self._beat_at = totals, now
        return self.metrics.snapshot() | {"events_per_second": settled / seconds if seconds > 0 else 0.0}

    def _log_first_batch(self, report: BatchReport) -> None:
        """Log the first settled batch at once, so that a person sees it without waiting for the next heartbeat."""
        if report.settled and not self._has_settled:
            self._has_settled = True
            self._log_settled()

    def _log_settled(self) -> None:
        """Log the counts since the last record of this kind. If all are zero, log nothing.

        Several threads can call this method.
        """
        with self._telling:
            now, totals = time.monotonic(), self.metrics.totals()
            counts, seconds = totals - self._told, now - self._told_at
            self._told, self._told_at = totals, now
        if counts:
            logger.bind(event="batches_settled", **counts).info(
                "in the last {:.1f} s {}", seconds, _counted(_outcomes(counts))
            )

    def looked(self) -> None:
        """Record that a claim loop has just looked for due events, and that the database answered."""
        self.metrics.polled()
        self._resumed()

    def batch_committed(self, report: BatchReport) -> None:
        """Count and log one committed transaction.

        If the claim was empty, record only the time of the claim.
        """
        self.looked()
        if not report.claimed:
            return
        self._count(report)
        counts = {str(outcome): count for outcome, count in sorted(report.outcomes().items())}
        logger.bind(
            event="batch_committed",
            claimed=report.claimed,
            guard=str(report.guard),
            milliseconds=round(report.seconds * 1000, 1),
            result=report.transaction,
            **counts,
        ).debug("settled {} of {} claimed events", report.settled, report.claimed)
        if report.settled and report.guard is Guard.LOCK:
            logger.bind(event="constraint_fallback", claimed=report.claimed).debug(
                "batch settled with the guard `lock`"
            )
        self._log_first_batch(report)
        log_events(report.batch, report.verdicts)
        log_unrecorded(report.postponed)
        log_set_aside(report.set_aside)

    def _count(self, report: BatchReport) -> None:
        metrics = self.metrics
        metrics.transactions.labels(report.transaction).inc()
        metrics.batch_size.observe(report.claimed)
        metrics.batch_seconds.observe(report.seconds)
        metrics.fallbacks.inc(report.settled > 0 and report.guard is Guard.LOCK)
        metrics.count_events(PURCHASE_CONFIRMED, Outcome.CREATED, report.created)
        metrics.latency.observe_counts(report.latencies)
        keys = report.by_outcome
        for event_type, events in report.batch.by_type().items():
            for outcome, settled in keys.items():
                count = len(settled) if events is report.batch else sum(key in events for key in settled)
                metrics.count_events(event_type, outcome, count)
        for reason, count in Tally(report.verdicts[key].reason for key in keys.get(Outcome.DEAD, ())).items():
            metrics.dead_letters.labels(reason).inc(count)
        settled = [key for outcome in keys if outcome is not Outcome.RETRIED for key in keys[outcome]]
        metrics.latency.observe_all([late + report.seconds for late in report.batch.among(settled).lateness])

    def transaction_failed(self, error: BaseException, claimed: int) -> None:
        """Count and log a transaction that was rolled back, or whose COMMIT got no answer."""
        cause = error.__cause__ or error
        failure = classify(cause)
        result = "unknown" if isinstance(error, CommitLost) else "rollback"
        if claimed:
            self.metrics.transactions.labels(result).inc()
        self.metrics.database_errors.labels(failure).inc()
        logger.bind(
            event="transaction_rolled_back", claimed=claimed, result=result, failure=str(failure), error=describe(cause)
        ).debug("rolled back")

    def guard_changed(self, guard: Guard) -> None:
        """Log the guard with which the worker starts, or a change of the guard."""
        for mode in Guard:
            self.metrics.guard.labels(mode).set(mode is guard)
        hint = (
            "unique index"
            if guard is Guard.INDEX
            else "lock: there is no unique index, so other code that inserts purchases can create duplicates. "
            "To build the index, run: outbox-worker migrate --with unique_index"
        )
        logger.bind(event="guard_changed", guard=str(guard)).log(
            "INFO" if guard is Guard.INDEX else "WARNING", "the guard is the {}", hint
        )


def _trouble(error: BaseException, failure: Failure) -> tuple[bool, str]:
    """Return whether the trouble can end by itself, and a sentence that describes the trouble."""
    if refusal := login_refusal(error):
        return False, f"the database refuses the connection: {refusal}; trying again until it accepts"
    if failure is Failure.RECONNECT and sqlstate(error) is None:
        return True, "no connection to the database; trying again"
    if failure is Failure.BUG:
        return False, "an error in the worker itself; the transaction was rolled back and is tried again"
    return failure in (Failure.RETRY, Failure.RECONNECT), "the database is in trouble; trying again"


def _outcomes(counts: Mapping[str, int]) -> dict[str, int]:
    """Return only the counts of events by outcome. Leave out the counts of transactions and fallbacks."""
    return {outcome: counts[outcome] for outcome in Outcome if outcome in counts}


def _counted(outcomes: Mapping[str, int]) -> str:
    """Format counts, for example as ``3 events: 2 created, 1 retried``."""
    listed = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    total = sum(outcomes.values())
    return f"{total} event{'' if total == 1 else 's'}: {listed}" if outcomes else "no events"
