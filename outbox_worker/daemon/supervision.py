"""What those are told who watch over the process: systemd, its watchdog, and whoever asks by HTTP.

The watchdog is fed by the claim loops alone, as they return from their steps; a timer would live on beside a dead loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from outbox_worker.daemon.http import Endpoints
from outbox_worker.daemon.liveness import STOPPING, Liveness
from outbox_worker.daemon.systemd import Notifier
from outbox_worker.database.failures import Failure, classify, describe
from outbox_worker.database.retry import Stop
from outbox_worker.settings import Settings
from outbox_worker.telemetry.reporter import Telemetry

STEP_DEADLINES = 6
"""A step is a transaction of a few statements, each of which may take a deadline, on a connection that takes one."""
_SLICES = 3
"""A rest is cut into parts of a third of what would be too long."""


class Pulse:
    """The steps of one loop, as they return. Looks like the ``stop`` that it was made with: whoever waits for that
    beats meanwhile."""

    def __init__(
        self, stop: Stop, liveness: Liveness, loop: int, feed: Callable[[], None], slice_seconds: float
    ) -> None:
        self._stop, self._liveness, self._loop = stop, liveness, loop
        self._feed, self._slice_seconds = feed, slice_seconds

    def is_set(self) -> bool:
        return self._stop.is_set()

    def wait(self, timeout: float) -> bool:
        return self.rest(self._stop, timeout)

    def beat(self) -> None:
        """A step or a try is over, however it ended."""
        if self._liveness.returned(self._loop, time.monotonic()):
            self._feed()

    def succeeded(self) -> None:
        self._liveness.told(self._loop, None)
        self.beat()

    def failed(self, error: BaseException) -> None:
        self._liveness.told(self._loop, reason(error))
        self.beat()

    def rest(self, until: Stop, seconds: float) -> bool:
        """Wait for a flag in parts, with a beat after each; whether it was set."""
        over = time.monotonic() + seconds
        while not until.wait(min(max(0.0, over - time.monotonic()), self._slice_seconds)):
            self.beat()
            if time.monotonic() >= over:
                return False
        return True


class Supervision:
    """What one process tells of itself, from its start to its end."""

    def __init__(self, settings: Settings, telemetry: Telemetry, notifier: Notifier) -> None:
        self._settings, self._telemetry, self._notifier = settings, telemetry, notifier
        self._liveness = Liveness(STEP_DEADLINES * settings.database_deadline_seconds)
        watchdog, limit = notifier.watchdog_seconds, self._liveness.limit_seconds
        self._slice_seconds = min(limit, watchdog or limit) / _SLICES
        self._is_up = False
        if watchdog is not None and watchdog < limit:
            telemetry.watchdog_is_short(watchdog, limit)

    def answering(self) -> AbstractContextManager[object]:
        """HTTP is served inside, unless it is off."""
        if self._settings.listen is None:
            return nullcontext()
        return Endpoints(self._settings.listen, self._settings.http_hosts, self._liveness, self._telemetry)

    def pulses(self, loops: int, stop: Stop) -> list[Pulse]:
        """For the loops that run from now on, and end with ``stop``."""
        self._liveness.expect(loops, time.monotonic())
        return [Pulse(stop, self._liveness, loop, self._feed, self._slice_seconds) for loop in range(loops)]

    def waits(self, error: BaseException) -> None:
        """The database was not there when it was asked first. To wait for it is the work of a daemon that is up."""
        self._say_ready(f"{reason(error)}; waiting")

    def serves(self) -> None:
        """The loops run."""
        self._liveness.enter(None)
        self._say_ready("serving")

    def stops(self) -> None:
        """A signal came, or all is drained."""
        self._liveness.enter(STOPPING)
        self._notifier.tell(STOPPING=1, STATUS="stopping after the batch at hand")

    def reloads(self) -> None:
        """Until ``reloaded``."""
        self._notifier.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def reloaded(self, status: str) -> None:
        self._notifier.tell(READY=1, STATUS=status)

    def looked(self, status: str) -> None:
        """The chores reached the database and found ``status``; a loop may be in trouble all the same."""
        self._liveness.reached(None)
        self._notifier.tell(STATUS=self._liveness.why_not_ready(time.monotonic()) or status)

    def looked_in_vain(self, error: BaseException) -> None:
        """The chores failed."""
        self._liveness.reached(reason(error) if classify(error) is Failure.RECONNECT else None)
        self._notifier.tell(STATUS=reason(error))

    def _say_ready(self, status: str) -> None:
        self._notifier.tell(STATUS=status, **({} if self._is_up else {"READY": 1}))
        self._is_up = True

    def _feed(self) -> None:
        if self._notifier.watchdog_seconds is not None:
            self._notifier.tell(WATCHDOG=1)


def reason(error: BaseException) -> str:
    """Why nothing is settled, for a person who asks; never what a row, a URL or libpq says."""
    if classify(error) is Failure.RECONNECT:
        return "without database: no usable connection"
    return f"paused: {describe(error)}"
