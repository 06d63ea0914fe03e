"""The rules of ``decide`` alone and against each other, the delays, the choice of the guard.

The tests need no database.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import combinations
from typing import Any
from uuid import UUID

import pytest

from outbox_worker.decision import REFUND_RULES as REFUND_RULES_IN_WORDS
from outbox_worker.decision import RULES as RULES_IN_WORDS
from outbox_worker.decision import RULES_BEHIND, RetryPolicy, choose_guard, decide, refused, retry_delay
from outbox_worker.model import FINAL, GRANTS, Facts, Guard, Mark, Outcome, Reason, Verdict

PAYMENT = UUID("00000000-0000-4000-8000-000000000001")
OTHER = UUID("00000000-0000-4000-8000-000000000002")

SOUND: dict[str, Any] = {"payment_id": PAYMENT, "payment_status": "succeeded"}
"""The facts of a successful payment, without any obstacle to its purchase."""
REFUNDED: dict[str, Any] = {"is_refund": True, "payment_id": PAYMENT, "payment_status": "refunded"}
"""A refund event whose payment is refunded."""

Rule = tuple[str, dict[str, Any], Outcome, Reason | None]

# The rules of docs/explanation/state-machine.md in order: the facts of each, and its verdict.
FIRST_RULES: list[Rule] = [
    ("0 three crashes", {"crashes": 3}, Outcome.DEAD, Reason.CRASHED_WORKER),
    ("1 no handler", {"handled": False}, Outcome.DEAD, Reason.UNSUPPORTED_EVENT_TYPE),
    ("2 no payment id", {"payment_id": None}, Outcome.DEAD, Reason.INVALID_PAYLOAD),
    ("3 marked for another", {"mark": Mark("created", OTHER)}, Outcome.DEAD, Reason.EVENT_ID_REUSED),
]
RULES: list[Rule] = [
    *FIRST_RULES,
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
REFUND_RULES: list[Rule] = [
    *FIRST_RULES,
    ("4 purchase inactive", {"purchase_active": False}, Outcome.REVOKED, None),
    ("5 no payment row", {"payment_status": None}, Outcome.RETRIED, Reason.PAYMENT_NOT_FOUND),
    ("6 mismatch", {"mismatches": ("amount",)}, Outcome.DEAD, Reason.PAYMENT_MISMATCH),
    ("7 succeeded", {"payment_status": "succeeded"}, Outcome.RETRIED, Reason.PAYMENT_NOT_REFUNDED),
    ("7 pending", {"payment_status": "pending"}, Outcome.RETRIED, Reason.PAYMENT_NOT_REFUNDED),
    ("7 failed", {"payment_status": "failed"}, Outcome.RETRIED, Reason.PAYMENT_NOT_REFUNDED),
    ("8 purchase active", {"purchase_active": True}, Outcome.REVOKED, None),
    ("8 pair held", {"pair_held": True}, Outcome.REVOKED, None),
    ("8 marked", {"mark": Mark("created", PAYMENT)}, Outcome.REVOKED, None),
    ("8 no purchase", {}, Outcome.REVOKED, None),
]
TABLES = {"confirmation": (SOUND, RULES), "refund": (REFUNDED, REFUND_RULES)}
EACH = [(kind, place) for kind, (_, rules) in TABLES.items() for place in range(len(rules))]
NAMES = [f"{kind}: {TABLES[kind][1][place][0]}" for kind, place in EACH]
BOTH = [(kind, *pair) for kind, (_, rules) in TABLES.items() for pair in combinations(range(len(rules)), 2)]


@pytest.mark.parametrize(("kind", "place"), EACH, ids=NAMES)
def test_each_rule_alone(kind: str, place: int) -> None:
    sound, rules = TABLES[kind]
    _, facts, outcome, reason = rules[place]
    verdict = decide(Facts(**(sound | facts)))
    assert (verdict.outcome, verdict.reason) == (outcome, reason)


@pytest.mark.parametrize(("kind", "place"), EACH, ids=NAMES)
def test_a_verdict_names_its_rule(kind: str, place: int) -> None:
    """The verdict has the number of a rule. Each rule is explained to people.

    The stored reason or outcome also leads to the rule.
    """
    sound, rules = TABLES[kind]
    name, facts, _, _ = rules[place]
    verdict = decide(Facts(**(sound | facts)))
    assert verdict.rule == int(name.split()[0])
    if verdict.rule:
        assert verdict.rule in (REFUND_RULES_IN_WORDS if kind == "refund" else RULES_IN_WORDS)
        assert verdict.rule in RULES_BEHIND[verdict.reason or verdict.outcome]


@pytest.mark.parametrize(("kind", "first", "second"), BOTH)
def test_the_earlier_rule_wins(kind: str, first: int, second: int) -> None:
    """Both rules apply. If both need the same fact, the fact has the value of the earlier rule."""
    sound, rules = TABLES[kind]
    name, facts, outcome, reason = rules[first]
    verdict = decide(Facts(**(sound | rules[second][1] | facts)))
    assert (verdict.outcome, verdict.reason) == (outcome, reason), f"{name} lost to {rules[second][0]}"


@pytest.mark.parametrize(("kind", "first"), EACH, ids=NAMES)
def test_a_rule_wins_over_all_later_ones_together(kind: str, first: int) -> None:
    sound, rules = TABLES[kind]
    facts = dict(sound)
    for _, later, _, _ in reversed(rules[first:]):
        facts |= later
    verdict = decide(Facts(**facts))
    assert (verdict.outcome, verdict.reason) == rules[first][2:]


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


@pytest.mark.parametrize(("kind", "place"), EACH, ids=NAMES)
def test_the_last_try_turns_retried_into_dead_and_nothing_else(kind: str, place: int) -> None:
    sound, rules = TABLES[kind]
    _, facts, outcome, reason = rules[place]
    verdict = decide(Facts(**(sound | facts), last_try=True))
    expected = Outcome.DEAD if outcome is Outcome.RETRIED else outcome
    assert (verdict.outcome, verdict.reason) == (expected, reason)


@pytest.mark.parametrize(("kind", "place"), EACH, ids=NAMES)
def test_a_purchase_is_written_for_a_grant_and_for_what_is_not_taken_back_yet(kind: str, place: int) -> None:
    sound, rules = TABLES[kind]
    facts = Facts(**(sound | rules[place][1]))
    verdict = decide(facts)
    takes_back = verdict.outcome is Outcome.REVOKED and facts.purchase_active is not False
    assert verdict.writes == (verdict.outcome in GRANTS or takes_back)


def test_an_unknown_payment_status_is_no_success() -> None:
    verdict = decide(Facts(payment_id=PAYMENT, payment_status="disputed"))
    assert (verdict.outcome, verdict.reason) == (Outcome.RETRIED, Reason.PAYMENT_NOT_SUCCEEDED)
    refund = decide(Facts(is_refund=True, payment_id=PAYMENT, payment_status="disputed"))
    assert (refund.outcome, refund.reason) == (Outcome.RETRIED, Reason.PAYMENT_NOT_REFUNDED)


def test_details_name_what_differs() -> None:
    mismatch = decide(Facts(**SOUND, mismatches=("student_id", "amount")))
    assert "student_id, amount" in mismatch.detail
    assert str(OTHER) in decide(Facts(**SOUND, mark=Mark("created", OTHER))).detail


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
