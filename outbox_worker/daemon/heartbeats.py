"""Writes the heartbeats of this process into the table ``workers``, and takes over the rows of dead workers.

A worker takes over the rows of dead workers when it starts. A running worker takes over a row only
if the dead worker was processing a single event. The death is then counted for this event even if
no new worker starts.
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
    """Writes the heartbeats of one process.

    After another worker has died, ``isolation`` makes this process settle events one at a time. The
    claim loops wait until ``may_claim`` is set. A new worker must first find out whether an event
    has killed another worker. Otherwise one event could kill one new worker after another, and no
    worker would count the deaths.
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
        """Begin with single events if the start took over the row of a dead worker.

        Call this method after the start is committed.
        """
        self._report(found)
        if found.dead:
            self._go_carefully()
        if not found.is_undecided:
            self.may_claim.set()

    def beat(self, session: Session, guard: Guard, metrics: Mapping[str, float], *, stopped: bool) -> None:
        """Write a heartbeat. If ``stopped``, also record in the row that this process has ended."""
        self._answered(self._workers.beat(session, guard, metrics, stopped=stopped))

    def written(self, *, stopped: bool) -> None:
        """Record that a heartbeat was committed. If this process goes on, check whether other workers have died."""
        if stopped:
            self._isolation.settled()
            return
        self._contact.heartbeats += 1
        self._judge()

    def written_only(self) -> None:
        """Record that a heartbeat was committed, without a check of other workers."""
        self._contact.heartbeats += 1

    def review_set_aside(self, session: Session) -> Sequence[int]:
        """Return the ids of the events that are set aside (events that this worker must not claim).

        First release events that were set aside long ago. Then read which events other workers have
        set aside.
        """
        set_aside = self._workers.set_aside
        set_aside.release_old(time.monotonic())
        self._workers.learn_set_aside(session)
        return set_aside.ids

    def _judge(self) -> None:
        """Take over the rows of workers that died while they processed one event.

        If no event is proven to have caused a death, process the next events one at a time. Also
        process single events if a worker died, or may have died, while the claim loops waited for
        this check.
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
        """Record that the database did not answer.

        The count of heartbeats of this process begins again at 0.
        """
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
