"""Reports the state of the process to systemd, to its watchdog, and to clients of /livez and /readyz.

This module sends a message to the watchdog when every claim loop has ended a step since the last
message. This module uses no timer. A timer would send messages even if a claim loop hangs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from outbox_worker.daemon.http import Endpoints
from outbox_worker.daemon.liveness import STOPPING, Liveness
from outbox_worker.daemon.systemd import Notifier
from outbox_worker.database.failures import Failure, classify, describe
from outbox_worker.database.retry import Sleep, Stop
from outbox_worker.settings import Settings
from outbox_worker.telemetry.reporter import Telemetry

STEP_DEADLINES = 6
"""A step of a claim loop must end within this number of database deadlines.

A step opens a connection and runs a few statements. Each of these actions ends within one database deadline.
"""
_SLICES = 3
"""A claim loop divides its sleep into parts. After each part, the loop reports that it is alive.

This number of parts fits into the longest time of one step. If the limit of the watchdog is
shorter, the parts fit into the limit of the watchdog.
"""


class Pulse:
    """Records when one claim loop ends a step or a part of its sleep. Each record is called a beat.

    A pulse has the same methods as the flag ``stop``, and callers can use it in place of the flag.
    The method ``wait`` of a pulse also records beats.
    """

    def __init__(
        self, stop: Stop, liveness: Liveness, loop: int, feed: Callable[[], None], slice_seconds: float
    ) -> None:
        self._stop, self._liveness, self._loop = stop, liveness, loop
        self._feed, self._slice_seconds = feed, slice_seconds
        self.is_idle = False
        """Whether the loop sleeps after a query that found no due event."""

    def is_set(self) -> bool:
        return self._stop.is_set()

    def wait(self, timeout: float) -> bool:
        return self.rest(self._stop, timeout)

    def beat(self) -> None:
        """Record that a step or a try has ended, with or without an error."""
        if self._liveness.returned(self._loop, time.monotonic()):
            self._feed()

    def succeeded(self) -> None:
        self._liveness.told(self._loop, None)
        self.beat()

    def failed(self, error: BaseException) -> None:
        self._liveness.told(self._loop, reason(error))
        self.beat()

    def rest(self, until: Sleep, seconds: float) -> bool:
        """Wait at most ``seconds`` for ``until``, and record beats. Return whether ``until`` woke the loop."""
        over = time.monotonic() + seconds
        while not until.wait(min(max(0.0, over - time.monotonic()), self._slice_seconds)):
            self.beat()
            if time.monotonic() >= over:
                return False
        return True


class Supervision:
    """Reports the state of this process from its start to its end."""

    def __init__(self, settings: Settings, telemetry: Telemetry, notifier: Notifier) -> None:
        self._settings, self._telemetry, self._notifier = settings, telemetry, notifier
        self._liveness = Liveness(STEP_DEADLINES * settings.database_deadline_seconds)
        watchdog, limit = notifier.watchdog_seconds, self._liveness.limit_seconds
        self._slice_seconds = min(limit, watchdog or limit) / _SLICES
        self._is_up = False
        self._pulses: list[Pulse] = []
        if watchdog is not None and watchdog < limit:
            telemetry.watchdog_is_short(watchdog, limit)

    def answering(self) -> AbstractContextManager[object]:
        """Serve HTTP inside the ``with`` block. If OUTBOX_HTTP_LISTEN is off, serve nothing."""
        if self._settings.listen is None:
            return nullcontext()
        return Endpoints(self._settings.listen, self._settings.http_hosts, self._liveness, self._telemetry)

    def pulses(self, loops: int, stop: Stop) -> list[Pulse]:
        """Return one pulse for each claim loop. From now on, each loop must end its steps in time.

        A pulse is set when ``stop`` is set.
        """
        self._liveness.expect(loops, time.monotonic())
        given = self._feed, self._slice_seconds
        self._pulses = [Pulse(stop, self._liveness, loop, *given) for loop in range(loops)]
        return self._pulses

    @property
    def is_idle(self) -> bool:
        """Whether all claim loops sleep, because no event is due."""
        return all(pulse.is_idle for pulse in self._pulses)

    def waits(self, error: BaseException) -> None:
        """Report that the start failed and the worker tries again.

        Send READY to systemd, because the process is running.
        """
        self._say_ready(f"{reason(error)}; waiting")

    def serves(self) -> None:
        """Report that the claim loops have started."""
        self._liveness.enter(None)
        self._say_ready("serving")

    def stops(self) -> None:
        """Report that the claim loops are ending.

        The cause is a signal, or all due events are settled.
        """
        self._liveness.enter(STOPPING)
        self._notifier.tell(STOPPING=1, STATUS="stopping after the current batch")

    def reloads(self) -> None:
        """Report that the worker reads its settings again. Call ``reloaded`` at the end."""
        self._notifier.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def reloaded(self, status: str) -> None:
        self._notifier.tell(READY=1, STATUS=status)

    def looked(self, status: str) -> None:
        """Report the ``status`` that the chores found. If events cannot be settled, report the reason instead."""
        self._liveness.reached(None)
        self._notifier.tell(STATUS=self._liveness.why_not_ready(time.monotonic()) or status)

    def looked_in_vain(self, error: BaseException) -> None:
        """Report that a round of chores failed."""
        self._liveness.reached(reason(error) if classify(error) is Failure.RECONNECT else None)
        self._notifier.tell(STATUS=reason(error))

    def _say_ready(self, status: str) -> None:
        self._notifier.tell(STATUS=status, **({} if self._is_up else {"READY": 1}))
        self._is_up = True

    def _feed(self) -> None:
        if self._notifier.watchdog_seconds is not None:
            self._notifier.tell(WATCHDOG=1)


def reason(error: BaseException) -> str:
    """Describe in one line why no events are settled. The line never contains a row, a URL or a message of libpq."""
    if classify(error) is Failure.RECONNECT:
        return "without database: no usable connection"
    return f"paused: {describe(error)}"
