"""Decides whether the claim loops are alive and whether they settle events.

This module does no I/O. The caller passes the time. A loop is alive while its steps end in time,
even if the steps end with errors. A worker whose database is down is therefore alive. A restart of
the worker would not help.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

STARTING = "starting: the database is not checked yet"
STOPPING = "stopping"
FEED_SECONDS = 0.1
"""The shortest time between two messages to systemd's watchdog.

Without this limit, a worker with very short steps would send too many messages.
"""


@dataclass
class _Loop:
    returned: float
    trouble: str | None = None
    """The reason why the loop's last step failed, or None if the step succeeded."""
    has_returned: bool = False
    """Whether a step of the loop has ended since the last message to systemd's watchdog."""


class Liveness:
    """Remembers when the last step of each loop ended, and the reason if the step failed.

    A step must take at most ``limit_seconds``.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._loops: list[_Loop] = []
        self._phase: str | None = STARTING
        self._unreachable: str | None = None
        self._fed = float("-inf")

    def expect(self, loops: int, now: float) -> None:
        """Watch this number of loops from now on."""
        with self._lock:
            self._loops = [_Loop(now) for _ in range(loops)]

    def enter(self, phase: str | None) -> None:
        """Set the phase of the process:

        STARTING, STOPPING, or None while the process settles events.
        """
        self._phase = phase

    def returned(self, loop: int, now: float) -> bool:
        """Record that a loop has ended a step, a try, or a part of its sleep.

        Return True if the caller must send a message to systemd's watchdog now. The message is due
        if every loop has ended a step since the last message.
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
        """Record why the last step of a loop failed. ``trouble`` is None if the step succeeded."""
        self._loops[loop].trouble = trouble

    def reached(self, trouble: str | None) -> None:
        """Record why the chores cannot reach the database.

        ``trouble`` is None if the chores can reach the database. The chores report an outage,
        because sleeping claim loops do not notice it. A claim loop can sleep for up to an hour.
        """
        self._unreachable = trouble

    def why_not_alive(self, now: float) -> str | None:
        """Describe in one line the loop whose step is most overdue. Return None if no step is overdue."""
        with self._lock:
            loop, since = min(
                enumerate(each.returned for each in self._loops), key=lambda pair: pair[1], default=(0, now)
            )
        if now - since <= self.limit_seconds:
            return None
        return f"claim loop {loop + 1}: no step has ended for {now - since:.0f} s (limit {self.limit_seconds:.0f} s)"

    def why_not_ready(self, now: float) -> str | None:
        """Describe in one line why no events can be settled. Return None if events can be settled."""
        trouble = next((each.trouble for each in self._loops if each.trouble), None) or self._unreachable
        if self._phase == STARTING and trouble:
            return f"starting: {trouble}"
        return self._phase or trouble or self.why_not_alive(now)
