"""Writes the heartbeats of this process, and takes over the rows of workers that have died.

A new worker takes over dead workers when it starts. A running worker only takes over those that died while they
processed an event alone, so that the death is counted even if no worker starts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.decision import HEARTBEATS_BEFORE_JUDGING
from outbox_worker.model import Guard
from outbox_worker.settings import Settings
from outbox_worker.settle.isolation import Isolation
from outbox_worker.store.workers import Contact, Takeover, Workers
from outbox_worker.telemetry.reporter import Telemetry


class Heartbeats:
    """The heartbeats of one process. ``isolation`` is told if an event may have killed another worker.

    The claim loops wait until ``may_claim`` is set: a new worker must first judge a death of which it cannot be sure
    yet. Otherwise it could die of the same event, and the worker after it as well, and nobody would count the deaths.
    """

    def __init__(
        self, database: Database, workers: Workers, isolation: Isolation, telemetry: Telemetry, settings: Settings
    ) -> None:
        self._database, self._workers, self._isolation = database, workers, isolation
        self._telemetry = telemetry
        self._batch_size, self._deadline_seconds = settings.batch_size, settings.database_deadline_seconds
        self._contact = Contact()
        self.may_claim = threading.Event()

    def start(self, session: Session, guard: Guard) -> Takeover:
        """Insert the row of this process, and take over the rows of dead workers."""
        self._answered(self._workers.join(session, guard))
        return self._workers.take_over_dead_workers(session, self._contact, self._deadline_seconds)

    def started(self, found: Takeover) -> None:
        """Begin with single events if this start, which is committed now, took over a dead worker."""
        self._report(found)
        if found.dead:
            self._go_carefully()
        if not found.is_undecided:
            self.may_claim.set()

    def beat(self, session: Session, guard: Guard, metrics: Mapping[str, float], *, stopped: bool) -> None:
        """Write a heartbeat. If ``stopped``, close the row of this process."""
        self._answered(self._workers.beat(session, guard, metrics, stopped=stopped))

    def written(self, *, stopped: bool) -> None:
        """Record that a heartbeat was committed. Unless it is the last one, judge the other workers."""
        if stopped:
            self._isolation.settled()
            return
        self._contact.heartbeats += 1
        self._judge()

    def review_set_aside(self, session: Session) -> Sequence[int]:
        """Release events that were set aside long ago, and read those of other workers. Return all that are left."""
        set_aside = self._workers.set_aside
        set_aside.release_old(time.monotonic())
        self._workers.learn_set_aside(session)
        return set_aside.ids

    def _judge(self) -> None:
        """Take over the rows of workers that died while they processed one event.

        If it is not proven that this event was the cause, or if the claim loops have waited for the judgement, process
        the next events one at a time.
        """
        with self._database.transaction() as session:
            found = self._workers.take_over_dead_workers(
                session, self._contact, self._deadline_seconds, only_accusers=True
            )
        self._report(found)
        is_over = not found.is_undecided or self._contact.heartbeats >= HEARTBEATS_BEFORE_JUDGING
        is_begun = is_over and not self.may_claim.is_set()
        if not all(each.is_counted for each in found.dead) or (is_begun and (found.dead or found.is_undecided)):
            self._go_carefully()
        if is_over:
            self.may_claim.set()

    def lost(self) -> None:
        """Record that the database was away. From then on, count the heartbeats of this process anew."""
        self._contact.lost()

    def _answered(self, at: datetime | None) -> None:
        if at is not None:
            self._contact.answered(at)

    def _go_carefully(self) -> None:
        self._telemetry.isolating_after_crash(self._batch_size)
        self._isolation.isolate_next(self._batch_size)

    def _report(self, found: Takeover) -> None:
        for each in found.dead:
            if each.is_counted:
                self._telemetry.crash_counted(each.host, each.pid, each.isolated)
