"""Keeps the events that no claim takes, because the database refuses to remove or to postpone their rows.

All claim loops of a process share one ``SetAside``. ``Workers`` writes its events into the process's row, and reads the
events of the other workers from there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MOST = 1000
"""The largest number of events that one worker sets aside. If there are more, the database itself is in trouble."""

FIRST_SECONDS = 15.0
"""The time for which an event is set aside when its row is refused for the first time.

Often, the cause ends by itself, for example when another service deletes its reference to the event.
"""

LATER_SECONDS = 600.0
"""The time for which an event is set aside when its row was refused before.

Each try makes a batch fail once, so it must be rare.
"""


@dataclass
class SetAside:
    """The events set aside by this worker, each with the refusal of the database, and those of other workers."""

    ids: Sequence[int] = ()
    """All events that a claim must not take. It is replaced as a whole, so reading it needs no lock."""
    known: set[int] = field(default_factory=set)
    """The events that this worker has set aside before."""
    _own: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Each event with the refusal, and the time at which it is released."""
    _others: frozenset[int] = frozenset()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def has_room(self, more: Iterable[int]) -> bool:
        """Return whether these events can be set aside, too."""
        return len(self._own.keys() | set(more)) <= MOST

    def add(self, refusals: Mapping[int, str], now: float) -> None:
        """Set events aside from ``now`` on, in monotonic seconds. Call it after COMMIT."""
        if not refusals:
            return
        with self._lock:
            for key, refusal in refusals.items():
                self._own[key] = refusal, now + (LATER_SECONDS if key in self.known else FIRST_SECONDS)
            self.known |= refusals.keys()
            self._gather()

    def release_old(self, now: float) -> None:
        """Let the next claim try the events again that this worker set aside long enough ago."""
        with self._lock:
            self._own = {key: (refusal, until) for key, (refusal, until) in self._own.items() if until > now}
            self._gather()

    def forget(self, settled: Iterable[int]) -> None:
        """Treat these events as new if they are ever refused again, because their rows could be removed."""
        self.known.difference_update(settled)

    def learn(self, others: Iterable[int]) -> None:
        """Replace what is known of the other workers."""
        with self._lock:
            self._others = frozenset(others)
            self._gather()

    def refusals(self) -> dict[str, str]:
        """Return the events of this worker as the value of ``workers.set_aside``."""
        with self._lock:
            return {str(key): refusal for key, (refusal, _) in sorted(self._own.items())}

    def _gather(self) -> None:
        self.ids = sorted(self._own.keys() | self._others)
