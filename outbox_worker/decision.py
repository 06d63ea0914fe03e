"""Pure decisions: what an event's facts mean, how long to wait, which guard holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta

from outbox_worker.model import MARKS_WITHOUT_PURCHASE, Facts, Guard, Outcome, PaymentStatus, Reason, Verdict

CRASHES_MAX = 3
"""Processes that an event may kill, alone, before it is buried."""

_FIRST_RULES: Mapping[int, str] = {
    1: "its type has no handler",
    2: "its payload names no payment",
    3: "its id is marked for another payment",
}
RULES: Mapping[int, str] = {
    **_FIRST_RULES,
    4: "a purchase of this payment exists",
    5: "no such payment is visible",
    6: "event and payment contradict each other",
    7: "the payment is refunded, or has not succeeded",
    8: "another purchase holds the pair",
    9: "nothing of rules 1 to 8: the purchase is made",
}
"""Of docs/explanation/state-machine.md, for people: what becomes of a confirmation."""
REFUND_RULES: Mapping[int, str] = {
    **_FIRST_RULES,
    4: "its purchase is inactive already",
    5: RULES[5],
    6: RULES[6],
    7: "the payment is not refunded",
    8: "nothing of rules 1 to 7: the purchase is taken back",
}
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
"""Which rules can have led to what a mark or a dead letter says; the database's refusals and crashes are none."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently an event is tried; the budget of events, not of the database."""

    max_attempts: int
    base: timedelta
    maximum: timedelta

    def is_last(self, attempts: int) -> bool:
        """Whether one more failed try, after ``attempts`` of them, is the last."""
        return attempts + 1 >= self.max_attempts


def decide(facts: Facts) -> Verdict:
    """Judge an event. The numbers are the rules of docs/explanation/state-machine.md; the first that holds wins."""
    if facts.crashes >= CRASHES_MAX:
        return Verdict(Outcome.DEAD, Reason.CRASHED_WORKER, f"{facts.crashes} workers died of it")
    if not facts.handled:  # 1
        return Verdict(Outcome.DEAD, Reason.UNSUPPORTED_EVENT_TYPE, "no handler for this event type", rule=1)
    if facts.payment_id is None:  # 2
        return Verdict(Outcome.DEAD, Reason.INVALID_PAYLOAD, "payment_id is missing or not a UUID string", rule=2)
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
    return Verdict(_grant(facts), writes=True, rule=9)  # 9


def _decide_refund(facts: Facts) -> Verdict:
    if facts.purchase_active is False:  # 4
        return Verdict(Outcome.REVOKED, rule=4)
    if flaw := _flaw(facts):  # 5, 6
        return flaw
    if facts.payment_status != PaymentStatus.REFUNDED:  # 7
        return _not_yet(facts, Reason.PAYMENT_NOT_REFUNDED, "the payment is not refunded", rule=7)
    return Verdict(Outcome.REVOKED, writes=True, rule=8)  # 8


def _flaw(facts: Facts) -> Verdict | None:
    """Rules 5 and 6: there is no payment, or event and payment contradict each other."""
    if facts.payment_status is None:
        return _not_yet(facts, Reason.PAYMENT_NOT_FOUND, "no such payment", rule=5)
    if facts.mismatches:
        detail = f"differs from the payment row: {', '.join(facts.mismatches)}"
        return Verdict(Outcome.DEAD, Reason.PAYMENT_MISMATCH, detail, rule=6)
    return None


def _grant(facts: Facts) -> Outcome:
    claimed = facts.mark is not None and facts.mark.outcome not in MARKS_WITHOUT_PURCHASE
    return Outcome.RECOVERED if claimed else Outcome.CREATED


def _not_yet(facts: Facts, reason: Reason, detail: str, *, rule: int) -> Verdict:
    return Verdict(Outcome.DEAD if facts.last_try else Outcome.RETRIED, reason, detail, rule=rule)


def refused(detail: str, last_try: bool) -> Verdict:
    """The verdict on an event that the database itself refused; ``detail`` names the error, never the payload."""
    return Verdict(Outcome.DEAD if last_try else Outcome.RETRIED, Reason.REJECTED_BY_DATABASE, detail)


def retry_delay(attempts: int, policy: RetryPolicy, spread: float) -> timedelta:
    """Wait after the ``attempts``-th failed try (1 is the first): exponential, capped, and up to a quarter longer.

    ``spread`` in [0, 1) is the caller's random number; it keeps events that failed together from coming back together.
    """
    grown = policy.base.total_seconds() * 2.0 ** min(attempts - 1, 62)
    return timedelta(seconds=min(grown, policy.maximum.total_seconds())) * (1 + spread / 4)


def choose_guard(sound_indexes: Collection[str], arbiters: Collection[str]) -> Guard:
    """``index`` only where the planner really takes a sound index as arbiter; otherwise ``lock``."""
    return Guard.INDEX if set(sound_indexes) & set(arbiters) else Guard.LOCK


def next_pause(previous: float, *, minimum: float, maximum: float) -> float:
    """Seconds until the next look after one that found nothing: twice the previous pause, within the bounds."""
    return min(maximum, max(minimum, previous * 2))
