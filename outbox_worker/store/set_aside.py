"""Keeps the events that no claim takes, because the database refuses to remove or to postpone their rows.

All claim loops of a process share one ``SetAside``. ``Workers`` writes the events of this process into its row, and
reads the events of other workers from their rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

MOST = 1000
"""The largest number of events that one worker sets aside. If there are more, the cause is probably the database."""

FIRST_SECONDS = 15.0
"""The time for which an event is set aside if the database refuses for the first time to change its row.

Often, the cause ends by itself, for example when another service deletes its reference to the event.
"""

LATER_SECONDS = 600.0
"""The time for which an event is set aside if the database has refused before to change its row.

Each try makes a batch fail once, so tries must be rare.
"""

UNRECORDED_MAX = 3
"""After this many tries in a row whose outcome the database refused to record, an event is set aside.

Otherwise only the log would tell that the event can be neither settled nor buried.
"""


@dataclass
class SetAside:
    """The events that this worker or another worker has set aside, so that no claim takes them."""

    ids: Sequence[int] = ()
    """All events that a claim must not take. The list is replaced as a whole, so reading the list needs no lock."""
    known: set[int] = field(default_factory=set)
    """The events that this worker has set aside before."""
    _unrecorded: dict[int, int] = field(default_factory=dict)
    """For each event whose outcome the database refused to record: the number of such tries in a row."""
    _own: dict[int, tuple[str, float]] = field(default_factory=dict)
    """For each event of this worker: the refusal, and the time from which a claim may take the event again."""
    _others: frozenset[int] = frozenset()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def has_room(self, more: Iterable[int]) -> bool:
        """Return whether these events can be set aside without exceeding ``MOST``."""
        return len(self._own.keys() | set(more)) <= MOST

    def add(self, refusals: Mapping[int, str], now: float) -> None:
        """Set events aside from ``now`` on, in monotonic seconds. Call this method after COMMIT."""
        if not refusals:
            return
        with self._lock:
            for key, refusal in refusals.items():
                self._own[key] = refusal, now + (LATER_SECONDS if key in self.known else FIRST_SECONDS)
            self.known |= refusals.keys()
            self._gather()

    def add_unrecorded(self, refusals: Mapping[int, str], now: float) -> None:
        """Count the tries whose outcome could not be recorded. Set an event aside after ``UNRECORDED_MAX`` of them."""
        for key in refusals:
            self._unrecorded[key] = self._unrecorded.get(key, 0) + 1
        often = {key: refusal for key, refusal in refusals.items() if self._unrecorded[key] >= UNRECORDED_MAX}
        if self.has_room(often):
            self.add(often, now)

    def release_old(self, now: float) -> None:
        """Release the events of this worker whose time is over, so that the next claim takes them again."""
        with self._lock:
            self._own = {key: (refusal, until) for key, (refusal, until) in self._own.items() if until > now}
            self._gather()

    def forget(self, settled: Set[int]) -> None:
        """Forget that these events were refused before, because their outcome could be recorded now."""
        self.known.difference_update(settled)
        for key in self._unrecorded.keys() & settled:
            del self._unrecorded[key]

    def learn(self, others: Iterable[int]) -> None:
        """Replace the events that other workers have set aside."""
        with self._lock:
            self._others = frozenset(others)
            self._gather()

    def refusals(self) -> dict[str, str]:
        """Return the events of this worker as the value of ``workers.set_aside``."""
        with self._lock:
            return {str(key): refusal for key, (refusal, _) in sorted(self._own.items())}

    def _gather(self) -> None:
        self.ids = sorted(self._own.keys() | self._others)
