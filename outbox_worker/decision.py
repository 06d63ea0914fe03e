"""Pure functions that decide the outcome of an event, the waits and the guard of the worker."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, auto

from outbox_worker.model import MARKS_WITHOUT_PURCHASE, Facts, Guard, Outcome, PaymentStatus, Reason, Verdict

CRASHES_MAX = 3
"""The number of counted crashes after which an event becomes a dead letter.

The worker counts a crash only if ``judge_death`` proves that a process died while it processed only
this event.
"""
WORKER_SILENT_AFTER_SECONDS = 30.0
"""If a worker writes no heartbeat for this number of seconds, other workers consider it dead.

This rule applies only if the worker did not record its stop.
"""
HEARTBEATS_BEFORE_JUDGING = 3
"""The number of heartbeats that a worker must write before it judges silent workers.

The worker counts from its start, and again from each outage of the database. Meanwhile, every other
living worker writes a heartbeat.
"""

_FIRST_RULES: Mapping[int, str] = {
    1: "the event's type has no handler",
    2: "the payload names no payment",
    3: "an event with this id was already settled for another payment",
}
RULES: Mapping[int, str] = {
    **_FIRST_RULES,
    4: "a purchase of this payment exists",
    5: "no such payment is visible",
    6: "event and payment contradict each other",
    7: "the payment is refunded, or has not succeeded",
    8: "another purchase already gives the student this course",
    9: "none of rules 1 to 8 applies, so the purchase is created",
}
"""The rules for an event that confirms a payment, in words. docs/explanation/state-machine.md explains them."""
REFUND_RULES: Mapping[int, str] = {
    **_FIRST_RULES,
    4: "the purchase of this payment is already inactive",
    5: RULES[5],
    6: RULES[6],
    7: "the payment is not refunded",
    8: "none of rules 1 to 7 applies, so the purchase is deactivated",
}
"""The rules for an event that reports a refund, in words. docs/explanation/state-machine.md explains them."""
RULES_BEHIND: Mapping[str, tuple[int, ...]] = {
    Reason.UNSUPPORTED_EVENT_TYPE: (1,),
    Reason.INVALID_PAYLOAD: (2,),
    Reason.EVENT_ID_REUSED: (3,),
    Outcome.ALREADY_EXISTS: (4,),
    Outcome.SUPPRESSED: (4, 7),
    Reason.PAYMENT_NOT_FOUND: (5,),
    Reason.PAYMENT_MISMATCH: (6,),
    Reason.PAYMENT_NOT_SUCCEEDED: (7,),
    Reason.PAYMENT_NOT_REFUNDED: (7,),
    Outcome.DUPLICATE_PAYMENT: (8,),
    Outcome.CREATED: (9,),
    Outcome.RECOVERED: (9,),
    Outcome.REVOKED: (4, 8),
}
"""The rules that can lead to each outcome and reason.

The reasons ``rejected_by_database`` and ``crashed_worker`` are missing. No rule leads to these
reasons.
"""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The largest number of tries of an event, and the shortest and longest wait between two tries.

    Outages of the database do not count as tries.
    """

    max_attempts: int
    base: timedelta
    maximum: timedelta

    def is_last(self, attempts: int) -> bool:
        """Return whether the next try is the last try.

        ``attempts`` is the number of failed tries so far.
        """
        return attempts + 1 >= self.max_attempts


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one batch: the tries of each event, and the size and duration of the batch."""

    policy: RetryPolicy
    batch_size: int
    target_seconds: float
    """The longest time that a batch should take.

    A producer can insert the id of a claimed event again. The producer must then wait until the
    worker commits the batch.
    """


class Death(Enum):
    """Whether another worker died, and whether the event that it processed is the cause."""

    NONE = auto()
    """The worker is possibly still alive."""
    UNDECIDED = auto()
    """The worker is probably dead. The judging worker must first write more heartbeats."""
    UNPROVEN = auto()
    """The worker is dead, but its death does not count as a crash of an event.

    The worker did not process an event alone, or the event is possibly not the cause of the death.
    """
    PROVEN = auto()
    """The worker died while it processed one event alone.

    Its death counts as a crash of this event.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationTrace:
    """What happened after a worker *isolated* an event, that is, began to process the event alone."""

    lived_on_seconds: float
    """The time from the isolation to the last heartbeat of the worker."""
    is_same_server: bool
    """True if the database server did not restart and did not fail over after the isolation."""
    judge_was_cut_off: bool
    """True if the judging worker could not reach the database at some time after the isolation."""
    is_withdrawn: bool
    """Whether a note (a file on this host) says that the worker no longer processes the event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What the judging worker knows about another worker whose row in ``workers`` is open."""

    is_running: bool | None
    """Whether the process of the worker still runs, or None if the worker ran on another host."""
    silent_seconds: float
    judge_heartbeats: int
    """The number of heartbeats that the judging worker has written since its last outage of the database."""
    isolation: IsolationTrace | None = None


def judge_death(traces: Traces, deadline_seconds: float) -> Death:
    """Judge whether a worker died, and whether its isolated event is the cause.

    If the cause is in doubt, the function does not blame the event. If the process is known to have
    ended, the function judges at once. If the worker is only silent, the judging worker must first
    have written ``HEARTBEATS_BEFORE_JUDGING`` heartbeats. If a worker lived for more than
    ``deadline_seconds`` after the isolation, the event is not the cause.
    """
    has_ended = traces.is_running is False
    if not has_ended and traces.silent_seconds <= WORKER_SILENT_AFTER_SECONDS:
        return Death.NONE
    isolation = traces.isolation
    if isolation is None or traces.is_running:
        return Death.UNPROVEN
    if not has_ended and traces.judge_heartbeats < HEARTBEATS_BEFORE_JUDGING:
        return Death.UNDECIDED
    is_doubtful = isolation.is_withdrawn or isolation.judge_was_cut_off or not isolation.is_same_server
    if is_doubtful or abs(isolation.lived_on_seconds) > deadline_seconds:
        return Death.UNPROVEN
    return Death.PROVEN


def decide(facts: Facts) -> Verdict:
    """Judge an event by the first rule of docs/explanation/state-machine.md that applies."""
    if facts.crashes >= CRASHES_MAX:
        return Verdict(Outcome.DEAD, Reason.CRASHED_WORKER, f"{facts.crashes} workers died while handling the event")
    if not facts.handled:  # 1
        return Verdict(Outcome.DEAD, Reason.UNSUPPORTED_EVENT_TYPE, "no handler for this event type", rule=1)
    if facts.payment_id is None:  # 2
        detail = "payment_id is missing, or cannot be the id of a payment"
        return Verdict(Outcome.DEAD, Reason.INVALID_PAYLOAD, detail, rule=2)
    if facts.mark and facts.mark.payment_id not in (None, facts.payment_id):  # 3
        return Verdict(Outcome.DEAD, Reason.EVENT_ID_REUSED, f"marked for payment {facts.mark.payment_id}", rule=3)
    return _decide_refund(facts) if facts.is_refund else _decide_confirmation(facts)


def _decide_confirmation(facts: Facts) -> Verdict:
    if facts.purchase_active is not None:  # 4
        return Verdict(Outcome.ALREADY_EXISTS if facts.purchase_active else Outcome.SUPPRESSED, rule=4)
    if flaw := _flaw(facts):  # 5, 6
        return flaw
    if facts.payment_status == PaymentStatus.REFUNDED:  # 7
        return Verdict(Outcome.SUPPRESSED, rule=7)
    if facts.payment_status != PaymentStatus.SUCCEEDED:
        return _not_yet(facts, Reason.PAYMENT_NOT_SUCCEEDED, "the payment has not succeeded", rule=7)
    if facts.pair_held:  # 8
        return Verdict(Outcome.DUPLICATE_PAYMENT, rule=8)
    return _grant(facts)  # 9


def _decide_refund(facts: Facts) -> Verdict:
    if facts.purchase_active is False:  # 4
        return Verdict(Outcome.REVOKED, rule=4)
    if flaw := _flaw(facts):  # 5, 6
        return flaw
    if facts.payment_status != PaymentStatus.REFUNDED:  # 7
        return _not_yet(facts, Reason.PAYMENT_NOT_REFUNDED, "the payment is not refunded", rule=7)
    return Verdict(Outcome.REVOKED, writes=True, rule=8)  # 8


def _flaw(facts: Facts) -> Verdict | None:
    """Apply rules 5 and 6 of ``RULES``. Return None if the payment is visible and does not contradict the event."""
    if facts.payment_status is None:
        return _not_yet(facts, Reason.PAYMENT_NOT_FOUND, "no such payment", rule=5)
    if facts.mismatches:
        detail = f"differs from the payment row: {', '.join(facts.mismatches)}"
        return Verdict(Outcome.DEAD, Reason.PAYMENT_MISMATCH, detail, rule=6)
    return None


def _grant(facts: Facts) -> Verdict:
    """Apply rule 9. If the payment names no student or no course, refuse the event."""
    if not facts.has_pair:
        return refused("the payment names no student or no course", facts.last_try)
    claimed = facts.mark is not None and facts.mark.outcome not in MARKS_WITHOUT_PURCHASE
    return Verdict(Outcome.RECOVERED if claimed else Outcome.CREATED, writes=True, rule=9)


def _not_yet(facts: Facts, reason: Reason, detail: str, *, rule: int) -> Verdict:
    return Verdict(Outcome.DEAD if facts.last_try else Outcome.RETRIED, reason, detail, rule=rule)


def refused(detail: str, last_try: bool) -> Verdict:
    """Judge an event that the database rejected. ``detail`` names the error and contains no text from the payload."""
    return Verdict(Outcome.DEAD if last_try else Outcome.RETRIED, Reason.REJECTED_BY_DATABASE, detail)


def retry_delay(attempts: int, policy: RetryPolicy, spread: float) -> timedelta:
    """Compute the wait after the failed try with the number ``attempts``.

    The first try has the number 1. The wait doubles with each try up to the maximum of ``policy``.
    ``spread`` is a random number in [0, 1) from the caller. This number makes the wait up to a
    quarter longer. Events that failed together then become due at different times.
    """
    grown = policy.base.total_seconds() * 2.0 ** min(attempts - 1, 62)
    return timedelta(seconds=min(grown, policy.maximum.total_seconds())) * (1 + spread / 4)


def choose_guard(sound_indexes: Collection[str], arbiters: Collection[str]) -> Guard:
    """Choose ``index`` if the planner uses a sound index for ON CONFLICT, otherwise ``lock``."""
    return Guard.INDEX if set(sound_indexes) & set(arbiters) else Guard.LOCK


def next_pause(previous: float, *, minimum: float, maximum: float) -> float:
    """Compute the pause in seconds after a claim that found no event.

    Double the previous pause within the bounds.
    """
    return min(maximum, max(minimum, previous * 2))
