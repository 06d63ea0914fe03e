"""What the next claim takes and where it begins, tested without a database and without a clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from outbox_worker.decision import Limits, RetryPolicy
from outbox_worker.model import Position
from outbox_worker.settle.pacing import (
    FEW_IN_DOUBT,
    FEWEST,
    LONG_CLAIM_SECONDS,
    START_SHARE,
    STUCK_PASSES_MAX,
    Frontier,
    Pacing,
)

END = Position("2026-01-01 00:00:00+00", 1000)
LATER = Position("2026-01-01 00:00:01+00", 2000)
POLICY = RetryPolicy(max_attempts=3, base=timedelta(seconds=1), maximum=timedelta(seconds=2))


def limits(batch_size: int) -> Limits:
    return Limits(POLICY, batch_size, target_seconds=0.5)


def committed(pacing: Pacing, **changes: Any) -> None:
    """Report a full batch that was claimed and settled at once, apart from ``changes``."""
    full = {"claimed": pacing.limit, "settled": pacing.limit, "is_full": True, "seconds": 0.02, "end": END}
    given: dict[str, Any] = full | changes
    start = pacing.start(0.0)
    pacing.claimed(start, given.pop("end"), is_full=given["is_full"])
    pacing.committed(**given)


# --- where a claim begins


def test_it_begins_at_the_beginning() -> None:
    assert Pacing(limits(1000)).start(0.0) is None


def test_a_full_claim_that_was_settled_moves_the_mark_and_a_sweep_comes_in_its_time() -> None:
    pacing = Pacing(limits(1000))
    pacing.claimed_from_start(100.0, 101.0, has_found=True)
    committed(pacing)
    due = 101.0 + 1.0 / START_SHARE - 1.0
    assert pacing.start(101.0) == pacing.start(due - 0.1) == END
    committed(pacing, end=LATER)
    assert pacing.start(due - 0.1) == LATER
    assert pacing.start(due) is None
    assert (due - 101.0) * START_SHARE == pytest.approx(1.0, rel=0.06), "they take their share of the time, no more"


@pytest.mark.parametrize(
    "changes",
    [{"settled": 999}, {"settled": 0}, {"is_full": False, "claimed": 5, "settled": 4}],
    ids=["one event left behind", "all left behind", "one of a short claim left behind"],
)
def test_what_was_left_behind_is_looked_for_at_once(changes: dict[str, Any]) -> None:
    pacing = Pacing(limits(1000))
    pacing.claimed_from_start(0.0, 1.0, has_found=True)
    committed(pacing)
    committed(pacing, **changes)
    assert pacing.start(1.0) is None


def test_a_short_claim_moves_the_mark_too() -> None:
    """A worker that keeps up claims few events at a time.

    If the mark did not move, each claim would read all dead entries.
    """
    pacing = Pacing(limits(1000))
    pacing.claimed_from_start(0.0, 1.0, has_found=True)
    committed(pacing)
    committed(pacing, is_full=False, claimed=3, settled=3, end=LATER)
    assert pacing.start(1.0) == LATER
    pacing.claimed(LATER, None, is_full=False)
    assert pacing.start(1.0) == LATER, "a claim that finds nothing leaves it"


def test_a_short_sweep_that_ends_before_the_mark_leaves_it_and_a_full_one_does_not() -> None:
    pacing = Pacing(limits(1000))
    pacing.claimed_from_start(0.0, 1.0, has_found=True)
    pacing.claimed(None, LATER, is_full=False)
    assert pacing.start(1.0) == LATER, "the first one sets it"
    pacing.claimed(None, END, is_full=False)
    assert pacing.start(1.0) == LATER, "it has found all that is due"
    pacing.claimed(None, END, is_full=True)
    assert pacing.start(1.0) == END, "more may be due behind it"


def test_loops_of_one_process_begin_where_the_others_claims_ended() -> None:
    """If the loops shared no mark, each loop would read all events that the other loops hold."""
    frontier = Frontier(start_due=float("inf"))
    one, other = Pacing(limits(1000), frontier), Pacing(limits(1000), frontier)
    one.claimed(None, END, is_full=True)
    assert other.start(0.0) == END
    other.claimed(None, LATER, is_full=True)
    assert one.start(0.0) == LATER


def test_a_claim_that_was_under_way_while_another_was_rolled_back_does_not_pass_it() -> None:
    frontier = Frontier(start_due=float("inf"))
    one, other = Pacing(limits(1000), frontier), Pacing(limits(1000), frontier)
    one.start(0.0)
    one.claimed(None, END, is_full=True)
    other.start(0.0)
    one.interrupted(0)
    other.claimed(None, LATER, is_full=True)
    assert other.start(0.0) is None
    other.claimed(None, LATER, is_full=True)
    assert one.start(0.0) == LATER


@pytest.mark.parametrize("fails", [Pacing.failed, lambda pacing: pacing.interrupted(0)], ids=["failed", "interrupted"])
def test_after_a_rollback_it_begins_at_the_beginning(fails: Callable[[Pacing], None]) -> None:
    pacing = Pacing(limits(1000))
    pacing.claimed_from_start(0.0, 1.0, has_found=True)
    committed(pacing)
    fails(pacing)
    assert pacing.start(1.0) is None


@pytest.mark.parametrize(
    ("fails", "claimed", "limit", "is_alone"),
    [
        (Pacing.failed, 13, 6, False),
        (Pacing.failed, 1, 1, True),
        (Pacing.failed, 0, 500, False),
        (Pacing.broke, 40, 5, False),
        (Pacing.broke, 1, 1, True),
        (Pacing.broke, 0, 125, False),
    ],
)
def test_a_failure_divides_what_was_in_hand(
    fails: Callable[[Pacing], None], claimed: int, limit: int, is_alone: bool
) -> None:
    """If the queue is short, a divided limit would repeat the same failure several times."""
    pacing = Pacing(limits(1000))
    pacing.interrupted(claimed)
    fails(pacing)
    assert (pacing.limit, pacing.is_alone) == (limit, is_alone)


# --- how far a claim goes back, while no claim can read everything from the start in time


TODAY = datetime(2026, 1, 10, tzinfo=UTC)


def reach_after(pacing: Pacing, cuts: int) -> list[float]:
    reaches = []
    for _ in range(cuts):
        pacing.reach_less(TODAY)
        reaches.append(pacing.frontier.reach)
    return reaches


def test_each_claim_that_takes_too_long_shortens_the_reach_to_a_minute_at_least() -> None:
    assert reach_after(Pacing(limits(1000)), 6) == [86400, 10800, 1350, 168.75, 60, 60]


def test_a_limited_claim_begins_so_far_before_today() -> None:
    pacing = Pacing(limits(1000))
    pacing.reach_less(TODAY)
    assert pacing.frontier.start == Position("2026-01-09T00:00:00+00:00", 0)


@pytest.mark.parametrize(
    ("seconds", "has_found", "grows"),
    [(0.5, False, True), (LONG_CLAIM_SECONDS, False, False), (LONG_CLAIM_SECONDS, True, True)],
    ids=["short", "long, and in vain", "long, because it settled events"],
)
def test_the_reach_grows_unless_a_claim_was_long_in_vain(seconds: float, has_found: bool, grows: bool) -> None:
    pacing = Pacing(limits(1000))
    pacing.reach_less(TODAY)
    pacing.claimed_from_start(0.0, seconds, has_found=has_found)
    assert pacing.may_reach_further is grows


def test_it_grows_until_nothing_limits_it() -> None:
    pacing = Pacing(limits(1000))
    reach_after(pacing, 2)
    for hours in (6, 12, 24):
        pacing.claimed_from_start(0.0, 0.1, has_found=False)
        pacing.reach_further(TODAY)
        assert pacing.frontier.start == Position((TODAY - timedelta(hours=hours)).isoformat(), 0)
        assert not pacing.may_reach_further, "once for each claim"
    pacing.reach_further(TODAY)
    assert (pacing.frontier.start, pacing.frontier.reach) == (None, math.inf)
    pacing.claimed_from_start(0.0, 0.1, has_found=False)
    assert not pacing.may_reach_further


# --- how many events a claim takes


def test_what_failed_is_halved_down_to_one_and_what_went_through_is_doubled() -> None:
    pacing, sizes = Pacing(limits(1000)), []
    for _ in range(11):
        pacing.failed()
        sizes.append(pacing.limit)
    assert sizes == [500, 250, 125, 62, 31, 15, 7, 3, 1, 1, 1]
    assert pacing.is_alone
    for expected in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000):
        committed(pacing, seconds=0.0001)
        assert pacing.limit == expected
        assert not pacing.is_alone


def test_two_events_that_fail_are_not_one_alone() -> None:
    pacing = Pacing(limits(2))
    pacing.failed()
    assert (pacing.limit, pacing.is_alone) == (1, False)
    pacing.failed()
    assert pacing.is_alone
    pacing.made_way()
    assert not pacing.is_alone


def test_a_slow_database_shrinks_the_batch_to_its_time_and_a_fast_one_does_not() -> None:
    fast, slow = Pacing(limits(1000)), Pacing(limits(1000))
    committed(fast, seconds=0.5)
    committed(slow, seconds=2.0)
    assert (fast.limit, slow.limit) == (1000, 250)
    committed(slow, seconds=0.5)
    assert slow.limit == 250
    committed(slow, seconds=0.2)
    assert slow.limit == 500, "it grows as fast as the time allows"
    committed(slow, seconds=0.8)
    assert slow.limit == 312


def test_a_database_that_is_slow_whatever_it_does_gets_no_tiny_batches() -> None:
    pacing = Pacing(limits(1000))
    for _ in range(20):
        committed(pacing, seconds=30.0)
    assert pacing.limit == FEWEST
    pacing = Pacing(limits(10))
    committed(pacing, seconds=30.0)
    assert pacing.limit == 10


def test_a_short_claim_says_nothing_about_the_time_that_a_full_one_takes() -> None:
    pacing = Pacing(limits(1000))
    committed(pacing, claimed=1, settled=1, is_full=False, seconds=3.0)
    assert pacing.limit == 1000


def test_running_out_of_savepoints_halves_the_next_careful_transaction_once() -> None:
    """The fast statement goes on with full batches. Refused events do not delay clean events."""
    pacing = Pacing(limits(1000))
    pacing.ran_out()
    committed(pacing)
    assert (pacing.limit, pacing.careful_limit) == (1000, 500)
    committed(pacing)
    assert (pacing.limit, pacing.careful_limit) == (1000, 1000)
    pacing.failed()
    assert (pacing.limit, pacing.careful_limit) == (500, 500)


# --- events in doubt


def test_in_doubt_it_goes_on_with_few_and_then_behind_them() -> None:
    pacing = Pacing(limits(1000))
    fails_in_doubt(pacing)
    assert (pacing.limit, pacing.start(1.0)) == (FEW_IN_DOUBT, None)
    fails_in_doubt(pacing)
    assert (pacing.limit, pacing.start(1.0)) == (FEW_IN_DOUBT, END), "and no claim from the start comes between"
    fails_in_doubt(pacing, end=LATER)
    assert pacing.start(1.0) == LATER
    fails_in_doubt(pacing, end=None)
    assert pacing.start(1.0) is None, "behind the last it begins at the beginning"


def test_after_a_success_behind_those_in_doubt_it_begins_at_the_beginning() -> None:
    pacing = Pacing(limits(FEW_IN_DOUBT))
    pacing.claimed_from_start(0.0, 1.0, has_found=True)
    fails_in_doubt(pacing)
    committed(pacing, end=LATER)
    assert pacing.start(1.0) is None
    committed(pacing, end=LATER)
    assert pacing.start(1.0) == LATER


def test_any_other_failure_ends_the_search() -> None:
    pacing = Pacing(limits(FEW_IN_DOUBT))
    fails_in_doubt(pacing)
    pacing.interrupted(0)
    assert pacing.start(1.0) is None


def fails_in_doubt(pacing: Pacing, end: Position | None = END) -> None:
    pacing.start(1.0)
    pacing.interrupted(0)
    pacing.in_doubt(end)


# --- which type of event a claim takes

CONFIRMED, REFUNDED = "PURCHASE_CONFIRMED", "PURCHASE_REFUNDED"


def test_the_first_events_type_comes_first_and_none_twice_in_a_row() -> None:
    pacing, chosen = Pacing(limits(1000)), []
    for _ in range(4):
        chosen.append(pacing.choose([REFUNDED, CONFIRMED]))
        committed(pacing, settled=500)
    assert chosen == [REFUNDED, CONFIRMED, REFUNDED, CONFIRMED]


def test_a_claim_of_one_type_in_between_begins_anew() -> None:
    pacing = Pacing(limits(1000))
    pacing.choose([REFUNDED, CONFIRMED])
    committed(pacing, settled=500)
    committed(pacing)
    assert pacing.choose([REFUNDED, CONFIRMED]) == REFUNDED


@pytest.mark.parametrize("fails", [Pacing.failed, lambda pacing: pacing.interrupted(0)], ids=["failed", "interrupted"])
def test_what_is_repeated_keeps_its_turn_and_what_is_given_up_does_not(fails: Callable[[Pacing], None]) -> None:
    pacing = Pacing(limits(1000))
    pacing.choose([REFUNDED, CONFIRMED])
    fails(pacing)
    assert pacing.choose([REFUNDED, CONFIRMED]) == REFUNDED
    pacing.gave_up()
    assert pacing.choose([REFUNDED, CONFIRMED]) == CONFIRMED


# --- events that let others pass


def test_full_claims_in_vain_make_way_after_a_while_once() -> None:
    pacing = Pacing(limits(1000))
    for _ in range(STUCK_PASSES_MAX):
        assert not pacing.is_stuck
        committed(pacing, settled=0)
    assert pacing.is_stuck
    committed(pacing, settled=0)
    assert not pacing.is_stuck


@pytest.mark.parametrize("changes", [{"settled": 1}, {"settled": 0, "is_full": False, "claimed": 3}])
def test_any_success_and_any_short_claim_end_the_count(changes: dict[str, Any]) -> None:
    pacing = Pacing(limits(1000))
    for _ in range(STUCK_PASSES_MAX - 1):
        committed(pacing, settled=0)
    committed(pacing, **changes)
    committed(pacing, settled=0)
    assert not pacing.is_stuck
