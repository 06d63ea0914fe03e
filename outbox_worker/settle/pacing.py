"""How many events the next claim takes, and from which position in the queue. Pure; the caller passes the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from outbox_worker.model import Position

FEWEST = 50
"""A slow database shrinks batches to this size; smaller batches would mostly pay for their transactions."""
STUCK_PASSES_MAX = 5
"""After this many full claims in a row of which no event could be settled, the events are postponed."""
FEW_IN_DOUBT = 15
"""The savepoints of one transaction suffice to try each of this many events, whatever happens to them."""
START_SHARE = 0.05
"""Largest share of loop time spent on claims from the start of the queue, while claims come back full."""


@dataclass
class Frontier:
    """How far the claim loops of one process have come in the queue; they share it.

    A claim from the start of the queue passes all index entries that were deleted since the oldest snapshot of the
    database, and all rows that other loops have locked. So while claims come back full and are settled completely, the
    next claim begins where the last one ended. Events that become visible before that position (a late commit, a clock
    set back) are found by a claim from the start now and then.
    """

    mark: Position | None = None
    """Where the last full claim ended; None: the next claim begins at the start."""
    start_due: float = 0.0
    """When the next claim from the start is due."""
    turn: int = 0
    """Counts returns to the start: a claim that was running meanwhile does not move the mark."""

    def go_back(self) -> None:
        """An event was left before the mark: the next claim begins at the start."""
        self.mark = None
        self.turn += 1


@dataclass
class Pacing:
    """The state of one claim loop between two batches.

    ``target_seconds`` bounds the duration of a batch: a producer that inserts a claimed event id again waits for the
    batch's COMMIT.
    """

    batch_size: int
    target_seconds: float
    frontier: Frontier = field(default_factory=Frontier)
    limit: int = field(init=False)
    is_alone: bool = field(default=False, init=False)
    """The last transaction that failed had claimed one event only."""
    _passes_without_success: int = field(default=0, init=False)
    _turn: int = field(default=0, init=False)
    _ran_out: bool = field(default=False, init=False)
    _beyond: Position | None = field(default=None, init=False)
    """The next claim begins after this position, behind events that are in doubt."""
    _chosen: str | None = field(default=None, init=False)
    _chosen_before: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.limit = self.batch_size

    @property
    def is_stuck(self) -> bool:
        """Whether the first events of the queue could not be settled several times, and must be postponed."""
        return self._passes_without_success >= STUCK_PASSES_MAX

    def adopt(self, batch_size: int, target_seconds: float) -> None:
        """Use other limits from the next claim on; batches grow to a larger size as they succeed."""
        self.batch_size, self.target_seconds = batch_size, target_seconds
        self.limit = min(self.limit, batch_size)

    def start(self, now: float) -> Position | None:
        """The position after which the next claim begins; None: the start. ``now`` in seconds, monotonic."""
        self._turn = self.frontier.turn
        if self._beyond is not None:
            return self._beyond
        return None if now >= self.frontier.start_due else self.frontier.mark

    def claimed(self, end: Position | None) -> None:
        """A claim came back full, with ``end`` as its last event: the next claim begins there."""
        if self._turn == self.frontier.turn:
            self.frontier.mark = end

    def claimed_from_start(self, began: float, now: float) -> None:
        """A claim from the start took from ``began`` to ``now``: the next one waits until its share of time allows."""
        self.frontier.start_due = now + (now - began) * (1 / START_SHARE - 1)

    def choose(self, kinds: Sequence[str]) -> str:
        """Choose one of the event types that a claim brought: the first, but no type twice in a row.

        If one type had all turns, the others would wait as long as its first events cannot be settled. A transaction
        that is repeated keeps its choice.
        """
        self._chosen = next(kind for kind in kinds if kind != self._chosen_before)
        return self._chosen

    def failed(self) -> None:
        """A transaction failed because of another one: claim half as many next time, from the start."""
        self.is_alone = self.limit == 1
        self.limit = max(1, self.limit // 2)
        self.frontier.go_back()

    def interrupted(self) -> None:
        """The transaction was rolled back: its events are where they were."""
        self._beyond = None
        self.frontier.go_back()

    def in_doubt(self, end: Position | None) -> None:
        """Events were refused, and it is not clear whether the fault is theirs or the database's: other events show it.

        The next claim is so small that each event is tried; the one after it begins behind ``end``, where a full claim
        ended.
        """
        if self.limit > FEW_IN_DOUBT:
            self.limit = FEW_IN_DOUBT
        else:
            self._beyond = end

    def gave_up(self) -> None:
        """The database failed, perhaps only for this type of event: the next claim chooses another type."""
        self._end_turn()

    def made_way(self) -> None:
        """An event that was claimed alone was postponed."""
        self.is_alone = False

    def committed(self, *, claimed: int, settled: int, is_full: bool, seconds: float) -> None:
        """A batch was committed; it took ``seconds`` from its claim on."""
        self.is_alone = False
        self._end_turn()
        in_vain = is_full and not settled and not self.is_stuck
        self._passes_without_success = self._passes_without_success + 1 if in_vain else 0
        if not is_full or settled < claimed or self._beyond is not None:
            self.frontier.go_back()
        self._beyond = None
        self.limit = max(1, self.limit // 2) if self._ran_out else self._grown(claimed if is_full else 0, seconds)
        self._ran_out = False

    def ran_out(self) -> None:
        """A batch used up the savepoints before all events were tried: claim half as many next time."""
        self._ran_out = True

    def _end_turn(self) -> None:
        self._chosen, self._chosen_before = None, self._chosen

    def _grown(self, claimed: int, seconds: float) -> int:
        """Twice as many events, up to the full size, and no more than fit into the target time."""
        grown = min(self.batch_size, self.limit * 2)
        if not claimed or seconds <= 0:
            return grown
        affordable = int(claimed * self.target_seconds / seconds)
        return min(grown, max(affordable, min(self.limit, FEWEST)))
