"""Processes events one at a time after a worker has died.

One of these events possibly killed the worker. Before this process settles an event, it *accuses*
the event. To accuse an event, it commits the event's id into the row of this process in
``workers``. The transaction that settles the event removes the id from the row. If the process dies
before that, the row still names the event. The worker that takes over the row can then count a
crash for the event (``Workers.take_over_dead_workers``). The process also removes the id if it
gives up the event or stops. If the process cannot reach the database, it leaves a note (a file) on
this host.

A process has only one row in ``workers``, and all claim loops of a process die together. Therefore
all other claim loops wait while one claim loop processes an event alone. Otherwise a batch of
another claim loop could kill the process. The row would then name an event that is not the cause.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime

from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import Failure, classify
from outbox_worker.model import Guard
from outbox_worker.settle.pacing import STUCK_PASSES_MAX
from outbox_worker.store.claims import IsolatedEvent
from outbox_worker.store.outbox import Outbox
from outbox_worker.store.workers import Workers

_WAIT_SECONDS = 0.5
"""The interval at which a claim loop that waits for other loops reports that it is alive."""


class Isolation:
    """Counts the events that this process must still process alone.

    Only one claim loop at a time can process an event alone.

    All claim loops of the process share one ``Isolation``.
    """

    def __init__(self, database: Database, workers: Workers) -> None:
        self._database, self._workers = database, workers
        self._changed = threading.Condition()
        self._batches = 0
        self._is_one_alone = False
        self._to_isolate = 0
        self._is_accusing = False

    @property
    def is_careful(self) -> bool:
        """Whether the next events must be processed one at a time."""
        return self._to_isolate > 0

    def isolate_next(self, events: int) -> None:
        """Process the next ``events`` events one at a time.

        One of these events possibly killed a worker.
        """
        self._to_isolate = events

    @contextmanager
    def together(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Process a batch inside the ``with`` block.

        Other loops can process batches at the same time. While another loop processes an event
        alone, wait, and call ``on_wait`` from time to time.
        """
        with self._changed:
            self._wait(lambda: not self._is_one_alone, on_wait)
            self._batches += 1
        try:
            yield
        finally:
            with self._changed:
                self._batches -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Process one event inside the ``with`` block. Meanwhile, no other loop begins a batch.

        First wait until the other loops have ended their batches, and call ``on_wait`` from time to
        time.
        """
        with self._changed:
            self._wait(lambda: not self._is_one_alone, on_wait)
            self._is_one_alone = True
        try:
            with self._changed:
                self._wait(lambda: not self._batches, on_wait)
            yield
        finally:
            with self._changed:
                self._is_one_alone = False
                self._changed.notify_all()

    def _wait(self, until: Callable[[], bool], on_wait: Callable[[], None]) -> None:
        while not self._changed.wait_for(until, _WAIT_SECONDS):
            on_wait()

    def isolate(
        self, outbox: Outbox, key: int | None, guard: Guard, until: datetime | None, plans: Mapping[str, str]
    ) -> IsolatedEvent | None:
        """Choose a due event and accuse it: write its id into the row of this process.

        Return None if no event is due, or if the row could not be written. ``key`` is the id of the
        event to choose. If ``key`` is None, choose the first event of the queue. If the queue then
        contains no due event, the process settles whole batches again.
        """
        with self._database.transaction(**plans) as session:
            event = outbox.isolate(session, key, until, set_aside=self._workers.set_aside.ids)
            if event is not None:
                if not self._workers.accuse(session, guard, event.id):
                    return None
                self._is_accusing = True  # stays true even if the answer to COMMIT is lost
        if key is None:
            self._to_isolate = 0 if event is None else max(0, self._to_isolate - 1)
        return event

    def clear_crash(self, session: Session) -> None:
        """Remove the event's id from the row of this process.

        The same transaction must settle or postpone the event.
        """
        self._workers.withdraw(session)

    def settled(self) -> None:
        """Record that the transaction with ``clear_crash`` was committed."""
        self._is_accusing = False

    def withdraw(self) -> None:
        """Withdraw the accusation: remove the event's id from the row of this process.

        Call this method if the process gives up the event or stops. If the database cannot be
        reached, leave a note (a file) on this host.
        """
        if not self._is_accusing:
            return
        try:
            with self._database.transaction() as session:
                self._workers.withdraw(session)
        except Exception:  # noqa: BLE001 - the caller has reported the error, or the process ends
            self._workers.withdraw_here()
        else:
            self._is_accusing = False

    def withdraw_here(self) -> None:
        """If the row of this process still names an event, leave a note (a file) on this host.

        This method needs no database.
        """
        if self._is_accusing:
            self._workers.withdraw_here()


class LoneEvents:
    """The events that one claim loop must process alone, including the current event."""

    def __init__(self, isolation: Isolation, outbox: Outbox) -> None:
        self._isolation, self._outbox = isolation, outbox
        self._failures = 0
        self.event: IsolatedEvent | None = None
        self.crash_suspects: list[int] = []
        """Events that the last batches left out. A worker died while it processed these events."""

    @property
    def is_next(self) -> bool:
        """Whether the next event must be processed alone."""
        return bool(self.event or self.crash_suspects) or self._isolation.is_careful

    @property
    def is_stuck(self) -> bool:
        """Whether the event must be postponed.

        True after ``STUCK_PASSES_MAX`` transient or unclear errors.
        """
        return self._failures >= STUCK_PASSES_MAX

    def choose(self, guard: Guard, until: datetime | None, plans: Mapping[str, str]) -> IsolatedEvent | None:
        """Choose the next event to process alone, and accuse it.

        First choose the event that this loop gave up before. If the loop gave up no event, choose
        an event of ``crash_suspects``. If ``crash_suspects`` is empty, choose the first event of
        the queue. To accuse an event, write its id into the row of this process.
        """
        before, key = self.event, None
        if before is not None:
            key = before.id
        elif self.crash_suspects:
            key = self.crash_suspects[-1]
        try:
            self.event = self._isolation.isolate(self._outbox, key, guard, until, plans)
        except Exception:
            self._isolation.withdraw()
            raise
        if before is None and self.crash_suspects:
            self.crash_suspects.pop()
        if self.event is None:
            self._failures = 0
        return self.event

    def gave_up(self, error: Exception) -> None:
        """Withdraw the accusation, because the event did not kill the process.

        The loop tries the event again later.
        """
        self._failures += classify(error) in (Failure.RETRY, Failure.UNCLEAR, Failure.RECONNECT)
        self._isolation.withdraw()

    def done(self) -> None:
        self._isolation.settled()
        self.event, self._failures = None, 0
