"""Keeps the events that are *set aside*. Claims skip these events.

The database refuses to delete or to postpone the rows of these events. All claim loops of a process
share one ``SetAside``. The class ``Workers`` writes the events of this process into the row of this
process. ``Workers`` reads the events of other workers from their rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

MOST = 1000
"""The largest number of events that one worker sets aside.

If the database refuses more events, the cause is probably the database itself.
"""

FIRST_SECONDS = 15.0
"""The time for which an event is set aside after the database refused to change its row once.

Often, the cause disappears without help. For example, another service deletes its reference to the
event.
"""

LATER_SECONDS = 600.0
"""The time for which an event is set aside after the database refused repeatedly to change its row.

Each try makes a batch fail once. Therefore tries must be rare.
"""

UNRECORDED_MAX = 3
"""After this many unrecorded tries in a row, the worker sets an event aside.

A try is unrecorded if the database refused to record its outcome. Without this limit, only the log
would show that the event can neither be settled nor become a dead letter.
"""


@dataclass
class SetAside:
    """The events that this worker or another worker has set aside. Claims skip these events."""

    ids: Sequence[int] = ()
    """All events that a claim must skip.

    The list is replaced as a whole. Therefore reading the list needs no lock.
    """
    known: set[int] = field(default_factory=set)
    """The events that this worker has set aside before."""
    _unrecorded: dict[int, int] = field(default_factory=dict)
    """The number of tries in a row, by event, whose outcome the database refused to record."""
    _own: dict[int, tuple[str, float]] = field(default_factory=dict)
    """The events that this worker has set aside.

    Each entry has the text of the refusal, and the time from which a claim can take the event
    again.
    """
    _others: frozenset[int] = frozenset()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def has_room(self, more: Iterable[int]) -> bool:
        """Return whether these events can be set aside without exceeding ``MOST``."""
        return len(self._own.keys() | set(more)) <= MOST

    def add(self, refusals: Mapping[int, str], now: float) -> None:
        """Set events aside. ``now`` is in monotonic seconds. Call this method after COMMIT."""
        if not refusals:
            return
        with self._lock:
            for key, refusal in refusals.items():
                self._own[key] = refusal, now + (LATER_SECONDS if key in self.known else FIRST_SECONDS)
            self.known |= refusals.keys()
            self._gather()

    def add_unrecorded(self, refusals: Mapping[int, str], now: float) -> None:
        """Count the unrecorded tries. Set an event aside after ``UNRECORDED_MAX`` such tries."""
        for key in refusals:
            self._unrecorded[key] = self._unrecorded.get(key, 0) + 1
        often = {key: refusal for key, refusal in refusals.items() if self._unrecorded[key] >= UNRECORDED_MAX}
        if self.has_room(often):
            self.add(often, now)

    def release_old(self, now: float) -> None:
        """Release the events of this worker whose time is over.

        The next claim can take these events again.
        """
        with self._lock:
            self._own = {key: (refusal, until) for key, (refusal, until) in self._own.items() if until > now}
            self._gather()

    def forget(self, settled: Set[int]) -> None:
        """Forget that the database refused these events before.

        Call this method if the outcome of these events was recorded.
        """
        self.known.difference_update(settled)
        for key in self._unrecorded.keys() & settled:
            del self._unrecorded[key]

    def learn(self, others: Iterable[int]) -> None:
        """Replace the list of the events that other workers have set aside."""
        with self._lock:
            self._others = frozenset(others)
            self._gather()

    def refusals(self) -> dict[str, str]:
        """Return the events of this worker as the value of ``workers.set_aside``."""
        with self._lock:
            return {str(key): refusal for key, (refusal, _) in sorted(self._own.items())}

    def _gather(self) -> None:
        self.ids = sorted(self._own.keys() | self._others)
