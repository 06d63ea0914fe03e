"""The bell at which claim loops sleep: a ring wakes one loop, and a stop wakes all loops.

Many workers do not all claim for one event.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import pytest

from outbox_worker.daemon.bell import Bell
from outbox_worker.daemon.claim_loop import HEARD_SECONDS, ClaimLoop
from outbox_worker.model import Guard
from outbox_worker.settings import load_settings
from outbox_worker.telemetry.reporter import BatchReport

LONG = 30.0
NOTHING = BatchReport(limit=1, guard=Guard.INDEX)


@contextmanager
def sleeping(bell: Bell, loops: int) -> Iterator[list[bool]]:
    """Let loops sleep in their own threads. The list gets an entry for each loop that wakes."""
    woken: list[bool] = []
    threads = [threading.Thread(target=lambda: woken.append(bell.wait(LONG)), daemon=True) for _ in range(loops)]
    for thread in threads:
        thread.start()
    try:
        yield woken
    finally:
        bell.silence()
        for thread in threads:
            thread.join(LONG)
    assert woken == [True] * loops, "nobody sleeps on, nor for the whole time"


def test_a_ring_wakes_one_loop_and_leaves_the_others_asleep() -> None:
    bell = Bell()
    with sleeping(bell, 3) as woken:
        bell.ring()
        while not woken:
            pass
        assert not bell.wait(0.05), "the ring is used up"
        assert len(woken) == 1


def test_a_ring_that_nobody_hears_ends_the_next_sleep_and_only_that() -> None:
    bell = Bell()
    for _ in range(3):
        bell.ring()
    assert bell.wait(LONG)
    assert not bell.wait(0)


def test_a_bell_that_is_rung_for_long_without_a_sleeper_does_not_block() -> None:
    bell = Bell()
    for _ in range(100_000):
        bell.ring()
    assert bell.wait(0)


class Pulse:
    """Records how long a loop waits. The test decides what wakes the loop."""

    def __init__(self, *rings: bool) -> None:
        self.rings, self.rests, self.restraints = list(rings), list[float](), list[float]()

    def is_set(self) -> bool:
        return not self.rings

    def rest(self, _until: object, seconds: float) -> bool:
        self.rests.append(seconds)
        return self.rings.pop(0)

    def wait(self, seconds: float) -> bool:
        self.restraints.append(seconds)
        return False

    is_idle = False

    def beat(self) -> None: ...

    def succeeded(self) -> None: ...


def resting(pulse: Pulse, bell: Bell, *until_due: float) -> Mock:
    """Run one rest of a claim loop. Each look finds the next value of ``until_due``."""
    looks = Mock(seconds_until_due=Mock(side_effect=until_due), process_batch=Mock(return_value=NOTHING))
    loop = ClaimLoop(looks, load_settings(), pulse, Mock(), threading.Event(), bell)  # type: ignore[arg-type]
    loop._rest(is_busy=False)
    return looks


def test_a_notification_is_answered_by_a_claim_at_once() -> None:
    looks = resting(Pulse(True), Bell())
    assert not looks.seconds_until_due.called


def test_a_worker_that_came_too_late_waits_longer_each_time_before_it_looks() -> None:
    """Otherwise forty workers claim for each event, and thirty-nine of them find nothing."""
    pulse, bell = Pulse(*[True] * 12), Bell()
    bell.looked(in_vain=True)
    looks = resting(pulse, bell, *[LONG] * 12)
    assert looks.seconds_until_due.call_count == 12
    assert pulse.restraints[:4] == pytest.approx([0.01, 0.02, 0.04, 0.08])
    assert max(pulse.restraints) == 1.0, "an event that the others leave is found within a second"
    bell.looked(in_vain=False)
    assert bell.restraint_seconds == 0.0


@pytest.mark.parametrize(("is_heard", "longest"), [(False, 1.0), (True, HEARD_SECONDS)])
def test_pauses_grow_only_while_notifications_are_heard(is_heard: bool, longest: float) -> None:
    pulse, bell = Pulse(*[False] * 15), Bell()
    bell.is_heard = is_heard
    resting(pulse, bell, *[LONG] * 15)
    assert 0.75 * longest <= max(pulse.rests) <= longest
    assert pulse.rests[0] <= 0.05


def test_a_pause_ends_when_the_next_event_is_due() -> None:
    pulse, bell = Pulse(*[False] * 15), Bell()
    bell.is_heard = True
    resting(pulse, bell, *[LONG] * 13, 1.5, 0.0)
    assert pulse.rests[-1] == 1.5


def test_a_pause_is_short_again_while_due_rows_are_locked_by_others() -> None:
    """The look sees the locked row, and the claim skips it. A rollback sends no notification."""
    pulse, bell = Pulse(*[False] * 9), Bell()
    bell.is_heard = True
    looks = Mock(seconds_until_due=Mock(return_value=-1.0), process_batch=Mock(return_value=NOTHING))
    may_claim = threading.Event()
    may_claim.set()
    ClaimLoop(looks, load_settings(), pulse, Mock(), may_claim, bell).run()  # type: ignore[arg-type]
    assert max(pulse.rests[1:]) <= 1.0
