"""Defines the claim loop and its thread. A claim loop takes due events and settles the events."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial

from outbox_worker.daemon.bell import Bell
from outbox_worker.daemon.signals import Signals
from outbox_worker.daemon.supervision import Pulse
from outbox_worker.database.retry import wait_out_outage
from outbox_worker.decision import next_pause
from outbox_worker.settings import Settings
from outbox_worker.settle.processor import Processor
from outbox_worker.telemetry.reporter import BatchReport

HEARD_SECONDS = 10.0
"""The longest pause between two looks for events while notifications arrive.

A larger ``poll_max_seconds`` replaces this value.
"""
JUDGED_WITHIN_SECONDS = 30.0
"""The longest time that the claim loops of a new worker wait before their first claim.

During this time, the worker finds out whether another worker has died. This check needs three
heartbeats (about 15 seconds).
"""


class ClaimLoop:
    """Claims (locks) and settles events on one connection until ``pulse`` is set.

    Each step settles one batch. The pulse records the end of each step, each failed try and each
    part of a sleep. Any thread can replace ``settings``. The next step then uses the new limits.
    """

    def __init__(
        self,
        processor: Processor,
        settings: Settings,
        pulse: Pulse,
        on_trouble: Callable[[BaseException, float], None],
        may_claim: threading.Event,
        bell: Bell,
    ) -> None:
        self._processor = processor
        self.settings = settings
        self._pulse = pulse
        self._on_trouble = on_trouble
        self._may_claim = may_claim
        self._bell = bell
        self._pause = 0.0

    def run_once(self, until: datetime | None = None, patience: float | None = None) -> BatchReport | None:
        """Settle one batch. If the database fails, try again for ``patience`` seconds.

        If ``patience`` is None, try again without a time limit. Return None if the flag ``pulse``
        was set before a batch was settled.
        """
        settle = partial(self._processor.process_batch, until, self.settings.limits)
        report = wait_out_outage(settle, self._pulse, self._meet_trouble, patience)
        if report is not None:
            self._pulse.succeeded()
        return report

    def run(self) -> bool:
        """Settle events until the flag ``pulse`` is set."""
        self._pulse.rest(self._may_claim, JUDGED_WITHIN_SECONDS)
        is_rung = False
        while not self._pulse.is_set() and (report := self.run_once()) is not None:
            if report.settled or is_rung:
                self._bell.looked(in_vain=not report.settled)
            is_rung = not _may_be_more(report) and self._rest(is_busy=report.settled > 0)
        return True

    def drain(self, until: datetime, is_empty: Callable[[datetime], bool]) -> bool:
        """Settle all events due by ``until``. Return False if other transactions kept due rows locked for too long."""
        self._pulse.rest(self._may_claim, JUDGED_WITHIN_SECONDS)
        deadline = self.settings.database_deadline_seconds
        progress = time.monotonic()
        while not self._pulse.is_set():
            report = self.run_once(until, patience=deadline)
            has_settled = report is not None and report.settled > 0
            if has_settled or (report is not None and report.has_made_way):
                progress = time.monotonic()
            if report is not None and _may_be_more(report):
                continue
            if wait_out_outage(partial(is_empty, until), self._pulse, self._meet_trouble, deadline):
                return True
            if time.monotonic() - progress > deadline:
                return False
            self._sleep(self._next_pause(self.settings.poll_max_seconds, is_busy=has_settled))
        return True

    def _meet_trouble(self, error: BaseException, pause_seconds: float) -> None:
        self._pulse.failed(error)
        self._on_trouble(error, pause_seconds)

    def _rest(self, *, is_busy: bool) -> bool:
        """Sleep until an event is possibly due. Return whether a notification woke the loop.

        If other workers were faster after the last notification, wait a little after the next
        notification, and then look for events. Also look for events after each pause. ``is_busy``
        says whether the last claim settled events. If notifications arrive and no event is due,
        pauses can be longer than ``poll_max_seconds``.
        """
        longest, until_due, is_rung = self.settings.poll_max_seconds, math.inf, False
        while until_due > 0 and not self._pulse.is_set():
            is_rung = self._sleep(min(self._next_pause(longest, is_busy=is_busy), until_due))
            if is_rung and not self._bell.restraint_seconds:
                break
            if is_rung:
                self._pulse.wait(self._bell.restraint_seconds)
            until_due, is_busy = self._look(), False
            self._pulse.is_idle = until_due > 0
            if is_rung and until_due > 0:
                self._bell.looked(in_vain=True)
            longest = max(longest, HEARD_SECONDS) if self._bell.is_heard else self.settings.poll_max_seconds
        self._pulse.is_idle = False
        return is_rung

    def _next_pause(self, longest: float, *, is_busy: bool) -> float:
        """Return the seconds to sleep. If the last claim settled no event, double the last pause.

        A random part shortens each pause. Workers then do not all claim at the same moment.
        """
        shortest = self.settings.poll_min_seconds
        self._pause = next_pause(0.0 if is_busy else self._pause, minimum=shortest, maximum=longest)
        return self._pause * random.uniform(0.75, 1)  # noqa: S311 - spreads load; not a secret

    def _sleep(self, seconds: float) -> bool:
        return self._pulse.rest(self._bell, seconds)

    def _look(self) -> float:
        """Return the seconds until an event is due.

        After a failure, return 0, so that a claim tries again.
        """
        try:
            until_due = self._processor.seconds_until_due()
        except Exception as error:  # noqa: BLE001 - reported; run_once waits for the database
            self._meet_trouble(error, 0.0)
            return 0.0
        self._pulse.succeeded()
        return until_due


def _may_be_more(report: BatchReport) -> bool:
    """Return whether more events are probably due now. This is the case after a full claim."""
    return report.is_full and report.settled > 0


class LoopThread(threading.Thread):
    """A thread that runs one loop. When the loop ends, the thread wakes the main thread."""

    def __init__(self, body: Callable[[], bool], signals: Signals) -> None:
        super().__init__(daemon=True)
        self._body = body
        self._signals = signals
        self.is_done = False
        self._result: bool | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._body()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread, by result()
            self._error = error
        finally:
            self.is_done = True
            self._signals.wake()

    def result(self) -> bool:
        """Return the result of the body, or True if the body has not ended. Raise the error that the body raised."""
        if self._error is not None:
            raise self._error
        return self._result is not False


def all_done(threads: Iterable[LoopThread]) -> bool:
    return all(thread.is_done for thread in threads)
