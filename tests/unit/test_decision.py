"""The table of fates, row by row and against each other; delays and the choice of the guard. No database."""

from __future__ import annotations

from datetime import timedelta
from itertools import combinations
from typing import Any
from uuid import UUID

import pytest

from outbox_worker.decision import RetryPolicy, choose_guard, decide, refused, retry_delay
from outbox_worker.model import FINAL, GRANTS, Facts, Guard, Mark, Outcome, Reason, Verdict

PAYMENT = UUID("00000000-0000-4000-8000-000000000001")
OTHER = UUID("00000000-0000-4000-8000-000000000002")

SOUND: dict[str, Any] = {"payment_id": PAYMENT, "payment_status": "succeeded"}
"""A payment that succeeded, and nothing that speaks against it."""

# The rules of design section 3 in their order: what makes each hold, and its verdict.
RULES: list[tuple[str, dict[str, Any], Outcome, Reason | None]] = [
    ("1 no handler", {"handled": False}, Outcome.DEAD, Reason.UNSUPPORTED_EVENT_TYPE),
    ("2 no payment id", {"payment_id": None}, Outcome.DEAD, Reason.INVALID_PAYLOAD),
    ("3 marked for another", {"mark": Mark("created", OTHER)}, Outcome.DEAD, Reason.EVENT_ID_REUSED),
    ("4 purchase active", {"purchase_active": True}, Outcome.ALREADY_EXISTS, None),
    ("4 purchase inactive", {"purchase_active": False}, Outcome.SUPPRESSED, None),
    ("5 no payment row", {"payment_status": None}, Outcome.RETRIED, Reason.PAYMENT_NOT_FOUND),
    ("6 mismatch", {"mismatches": ("amount",)}, Outcome.DEAD, Reason.PAYMENT_MISMATCH),
    ("7 pending", {"payment_status": "pending"}, Outcome.RETRIED, Reason.PAYMENT_NOT_SUCCEEDED),
    ("7 failed", {"payment_status": "failed"}, Outcome.RETRIED, Reason.PAYMENT_NOT_SUCCEEDED),
    ("7 refunded", {"payment_status": "refunded"}, Outcome.SUPPRESSED, None),
    ("8 pair held", {"pair_held": True}, Outcome.DUPLICATE_PAYMENT, None),
    ("9 recovered", {"mark": Mark("created", PAYMENT)}, Outcome.RECOVERED, None),
    ("9 created", {}, Outcome.CREATED, None),
]
NAMES = [name for name, *_ in RULES]


@pytest.mark.parametrize(("name", "facts", "outcome", "reason"), RULES, ids=NAMES)
def test_each_rule_alone(name: str, facts: dict[str, Any], outcome: Outcome, reason: Reason | None) -> None:
    verdict = decide(Facts(**(SOUND | facts)))
    assert (verdict.outcome, verdict.reason) == (outcome, reason), name


@pytest.mark.parametrize(("first", "second"), list(combinations(range(len(RULES)), 2)))
def test_the_earlier_rule_wins(first: int, second: int) -> None:
    """Both rules hold; where they speak of the same fact, the earlier one's value is it."""
    _, facts, outcome, reason = RULES[first]
    verdict = decide(Facts(**(SOUND | RULES[second][1] | facts)))
    assert (verdict.outcome, verdict.reason) == (outcome, reason), f"{NAMES[first]} lost to {NAMES[second]}"


@pytest.mark.parametrize("first", range(len(RULES)), ids=NAMES)
def test_a_rule_wins_over_all_later_ones_together(first: int) -> None:
    facts = dict(SOUND)
    for _, later, _, _ in reversed(RULES[first:]):
        facts |= later
    verdict = decide(Facts(**facts))
    assert (verdict.outcome, verdict.reason) == RULES[first][2:]


@pytest.mark.parametrize(
    ("marked", "outcome"),
    [
        ("created", Outcome.RECOVERED),
        ("recovered", Outcome.RECOVERED),
        ("already_exists", Outcome.RECOVERED),
        ("an outcome that the worker before us wrote", Outcome.RECOVERED),
        ("", Outcome.RECOVERED),
        ("duplicate_payment", Outcome.CREATED),
        ("suppressed", Outcome.CREATED),
        ("revoked", Outcome.CREATED),
    ],
)
@pytest.mark.parametrize("payment_id", [PAYMENT, None])
def test_recovered_where_a_mark_claimed_a_purchase(marked: str, outcome: Outcome, payment_id: UUID | None) -> None:
    assert decide(Facts(**SOUND, mark=Mark(marked, payment_id))).outcome is outcome


def test_every_final_outcome_is_judged_as_a_mark() -> None:
    """A new outcome must say whether its mark claims a purchase."""
    judged = {outcome: decide(Facts(**SOUND, mark=Mark(outcome, PAYMENT))).outcome for outcome in FINAL}
    assert set(judged.values()) == GRANTS
    assert {mark for mark, outcome in judged.items() if outcome is Outcome.RECOVERED} == GRANTS | {
        Outcome.ALREADY_EXISTS
    }


@pytest.mark.parametrize(("name", "facts", "outcome", "reason"), RULES, ids=NAMES)
def test_the_last_try_turns_retried_into_dead_and_nothing_else(
    name: str, facts: dict[str, Any], outcome: Outcome, reason: Reason | None
) -> None:
    verdict = decide(Facts(**(SOUND | facts), last_try=True))
    expected = Outcome.DEAD if outcome is Outcome.RETRIED else outcome
    assert (verdict.outcome, verdict.reason) == (expected, reason), name


def test_an_unknown_payment_status_is_no_success() -> None:
    verdict = decide(Facts(payment_id=PAYMENT, payment_status="disputed"))
    assert (verdict.outcome, verdict.reason) == (Outcome.RETRIED, Reason.PAYMENT_NOT_SUCCEEDED)


def test_details_name_what_differs() -> None:
    mismatch = decide(Facts(**SOUND, mismatches=("student_id", "amount")))
    assert "student_id, amount" in mismatch.detail
    assert str(OTHER) in decide(Facts(**SOUND, mark=Mark("created", OTHER))).detail


def test_no_verdict_of_decide_is_clean() -> None:
    """``clean`` skips the closing of dead letters: only the fast statement has proved that there is none."""
    assert not any(decide(Facts(**(SOUND | facts))).clean for _, facts, _, _ in RULES)


@pytest.mark.parametrize(("last_try", "outcome"), [(False, Outcome.RETRIED), (True, Outcome.DEAD)])
def test_an_event_that_the_database_refuses(last_try: bool, outcome: Outcome) -> None:
    assert refused("why", last_try) == Verdict(outcome, Reason.REJECTED_BY_DATABASE, "why")


# --- retries

POLICY = RetryPolicy(max_attempts=10, base=timedelta(seconds=30), maximum=timedelta(hours=1))


@pytest.mark.parametrize(
    ("attempts", "seconds"), [(1, 30), (2, 60), (3, 120), (7, 1920), (8, 3600), (9, 3600), (1000, 3600), (10**9, 3600)]
)
def test_delay_doubles_up_to_the_maximum(attempts: int, seconds: int) -> None:
    assert retry_delay(attempts, POLICY, 0.0) == timedelta(seconds=seconds)


@pytest.mark.parametrize("attempts", [1, 2, 8, 10**9])
def test_spread_makes_a_delay_up_to_a_quarter_longer(attempts: int) -> None:
    least, most = retry_delay(attempts, POLICY, 0.0), retry_delay(attempts, POLICY, 0.999999)
    assert retry_delay(attempts, POLICY, 0.5) == least * 1.125
    assert least * 1.2499 < most < least * 1.25


def test_a_maximum_below_the_base_holds_from_the_start() -> None:
    policy = RetryPolicy(max_attempts=3, base=timedelta(seconds=30), maximum=timedelta(seconds=5))
    assert retry_delay(1, policy, 0.0) == timedelta(seconds=5)


@pytest.mark.parametrize(("attempts", "last"), [(0, False), (8, False), (9, True), (10, True), (50, True)])
def test_the_tenth_of_ten_tries_is_the_last(attempts: int, last: bool) -> None:
    assert POLICY.is_last(attempts) is last


def test_one_try_may_be_all() -> None:
    assert RetryPolicy(max_attempts=1, base=POLICY.base, maximum=POLICY.maximum).is_last(0)


# --- the guard


@pytest.mark.parametrize(
    ("sound", "arbiters", "guard"),
    [
        (["a"], ["a"], Guard.INDEX),
        (["a", "b"], ["b"], Guard.INDEX),
        (["a"], ["a", "full"], Guard.INDEX),
        ([], [], Guard.LOCK),
        (["a"], [], Guard.LOCK),
        ([], ["a"], Guard.LOCK),
        (["a"], ["full"], Guard.LOCK),
    ],
)
def test_the_index_is_the_guard_only_where_the_planner_takes_it(
    sound: list[str], arbiters: list[str], guard: Guard
) -> None:
    assert choose_guard(sound, arbiters) is guard
