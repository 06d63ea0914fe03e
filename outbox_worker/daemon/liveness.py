"""Decides whether the claim loops are alive and whether they settle events. Pure: the caller passes the time.

A loop is alive while its steps return, even with errors: a database that is down is no reason to restart the worker.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

STARTING = "starting: the database was not looked at yet"
STOPPING = "stopping"
FEED_SECONDS = 0.1
"""Shortest time between two feeds of the watchdog: a step can be as short as one round trip."""


@dataclass
class _Loop:
    returned: float
    trouble: str | None = None
    """Why its last step failed."""
    has_returned: bool = False
    """Since the watchdog was last fed."""


class Liveness:
    """Remembers when each loop last returned from a step, and how it ended. ``limit_seconds``: the longest step."""

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._loops: list[_Loop] = []
        self._phase: str | None = STARTING
        self._unreachable: str | None = None
        self._fed = float("-inf")

    def expect(self, loops: int, now: float) -> None:
        """Expect this number of loops to return from their steps from now on."""
        with self._lock:
            self._loops = [_Loop(now) for _ in range(loops)]

    def enter(self, phase: str | None) -> None:
        """STARTING, STOPPING, or None while the loops serve."""
        self._phase = phase

    def returned(self, loop: int, now: float) -> bool:
        """Record that a step, a try or a part of a rest is over.

        Return True if the watchdog is to be fed: every loop has returned since it last was.
        """
        with self._lock:
            self._loops[loop].returned, self._loops[loop].has_returned = now, True
            if now - self._fed < FEED_SECONDS or not all(each.has_returned for each in self._loops):
                return False
            self._fed = now
            for each in self._loops:
                each.has_returned = False
            return True

    def told(self, loop: int, trouble: str | None) -> None:
        """Record why the last step of a loop failed; None: it did not."""
        self._loops[loop].trouble = trouble

    def reached(self, trouble: str | None) -> None:
        """Record why the chores do not reach the database; None: they do. The loops may rest for an hour."""
        self._unreachable = trouble

    def why_not_alive(self, now: float) -> str | None:
        """The slowest loop that is late, in one line; None if each returned within the limit."""
        with self._lock:
            loop, since = min(
                enumerate(each.returned for each in self._loops), key=lambda pair: pair[1], default=(0, now)
            )
        if now - since <= self.limit_seconds:
            return None
        return f"claim loop {loop + 1}: no step has returned for {now - since:.0f} s (limit {self.limit_seconds:.0f} s)"

    def why_not_ready(self, now: float) -> str | None:
        """Why no event is being settled, in one line; None if events are settled."""
        trouble = next((each.trouble for each in self._loops if each.trouble), None) or self._unreachable
        if self._phase == STARTING and trouble:
            return f"starting: {trouble}"
        return self._phase or trouble or self.why_not_alive(now)
