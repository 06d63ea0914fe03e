"""The protocol of accusations: which crashes it counts, and what a broken variant gets wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outbox_worker.decision import CRASHES_MAX, Death, Traces, judge_death
from tests.support.deaths import Course, Protocol, State, Truth, Wrong

SAME_HOST = Protocol()
OUTAGES = Protocol(same_host=False, cuts=False, lives_on=False)
"""Both workers lose the database.

A judge without notes must rely on its own outages and on the server.
"""
CUTS = Protocol(same_host=False, outages=False, restarts=False, lives_on=False)
"""Only the judged worker loses the database, for any time."""
DEADLY = Protocol(is_deadly=True, cuts=False, outages=False, restarts=False, lives_on=False, orphans_max=5)


def test_on_one_host_a_death_is_counted_only_for_a_death_with_the_event_in_hand() -> None:
    """Try every start, with outages of any length for one worker or for both.

    Kills and stops come at any moment, as do restarts and failovers.
    """
    course = Course(SAME_HOST).explore()
    assert len(course.states) > 3000
    assert course.wrong == []
    assert course.cannot_end() == set()


def test_across_hosts_an_outage_is_no_death_if_anybody_could_tell() -> None:
    """An outage cannot be told from a crash if three facts come together.

    The worker ended without database, the server is the same, and the judge began later.
    """
    course = Course(OUTAGES).explore()
    assert [wrong for wrong in course.wrong if not nobody_could_tell(wrong)] == []
    assert course.cannot_end() == set()


def test_whoever_lives_takes_back_what_was_counted() -> None:
    course = Course(CUTS).explore()
    assert [wrong for wrong in course.wrong if wrong.row.truth != Truth.LIVES and not nobody_could_tell(wrong)] == []
    assert any(wrong.row.truth == Truth.LIVES for wrong in course.wrong), "it was cut off for long"
    assert not any(is_left(state) for state in course.states)
    assert course.cannot_end() == set()


@pytest.mark.parametrize("same_host", [True, False])
def test_a_deadly_event_is_buried_after_one_death_more_than_are_counted(same_host: bool) -> None:
    """A deadly event can cause one crash more, because two workers can have it in hand at once.

    On other hosts, half a minute passes before each start.
    """
    course = Course(replace(DEADLY, same_host=same_host)).explore()
    assert course.wrong == []
    assert max(state.deaths for state in course.states) == CRASHES_MAX + 1
    assert course.cannot_end() == set()


# --- broken variants


def believing(protocol: Protocol, **what: object) -> Protocol:
    """Make a judge that believes ``what`` of each accusation, whatever row and server say."""

    def judge(traces: Traces, deadline_seconds: float) -> Death:
        isolation = None if traces.isolation is None else replace(traces.isolation, **what)  # type: ignore[arg-type]
        return judge_death(replace(traces, isolation=isolation), deadline_seconds)

    return replace(protocol, judge=judge)


def hasty(traces: Traces, deadline_seconds: float) -> Death:
    """Make a judge that judges by silence at once, without heartbeats of its own."""
    return judge_death(replace(traces, judge_heartbeats=99), deadline_seconds)


TWINS = {
    "a stop does not withdraw": replace(SAME_HOST, withdraws_at_stop=False),
    "whoever gives up does not withdraw": replace(SAME_HOST, withdraws_when_it_gives_up=False),
    "nobody leaves notes": replace(SAME_HOST, leaves_notes=False),
    "nobody reads notes": believing(SAME_HOST, is_withdrawn=False),
    "judging without heartbeats": replace(OUTAGES, judge=hasty),
    "counting in spite of a restart": believing(OUTAGES, is_same_server=True),
    "counting in spite of an outage": believing(OUTAGES, judge_was_cut_off=False),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_twin_counts_a_death_that_was_none(twin: str) -> None:
    course = Course(TWINS[twin])
    course.explore(until=lambda _: is_broken(course))
    assert is_broken(course)


def test_a_twin_that_takes_nothing_back_leaves_a_count() -> None:
    assert any(is_left(state) for state in Course(replace(CUTS, takes_back=False)).explore(until=is_left).states)


# --- helpers


def nobody_could_tell(wrong: Wrong) -> bool:
    """Tell whether no fact shows an outage.

    The note is on another host, the row looks like a crash, and the judge has noticed no outage.
    """
    row = wrong.row
    return row.is_given_up and not (row.has_note or row.is_old_server or wrong.is_doubted)


def is_broken(course: Course) -> bool:
    return any(course.protocol.same_host or not nobody_could_tell(wrong) for wrong in course.wrong)


def is_left(state: State) -> bool:
    """Tell whether a crash is counted of a worker that lives and has told so."""
    return any(worker is not None and worker.is_charged and not worker.is_taken for worker in state.workers)
