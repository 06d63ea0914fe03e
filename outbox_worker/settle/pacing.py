"""What the next claim takes: how many events, and from where in the queue. Pure; the caller brings the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from outbox_worker.model import Position

FEWEST = 50
"""A slow database shrinks batches to this; below it the costs of a transaction are all that is left to save."""
STUCK_PASSES_MAX = 5
"""Full claims in a row of which nothing could be settled, before they make way for what is behind them."""
FEW_IN_DOUBT = 15
"""Whatever becomes of each of so many events, the savepoints of one transaction suffice to find it out."""
SWEEP_SHARE = 0.05
"""Of the time, at most, goes into looks from the beginning while claims come back full."""


@dataclass
class Frontier:
    """How far the claim loops of one process have come; they share it.

    A claim that begins at the first index entry walks all that were deleted since the oldest snapshot of the database,
    and all that other loops hold. So it begins where the last one ended, while claims come back full and all of them is
    settled. What becomes visible behind that mark (a late commit, a step back of the clock) is found by a sweep from
    the beginning.
    """

    mark: Position | None = None
    sweep_due: float = 0.0
    turn: int = 0
    """Counts returns to the beginning: a claim that was under way meanwhile does not move the mark."""

    def go_back(self) -> None:
        """Something was left behind the mark: the next claim begins at the beginning."""
        self.mark = None
        self.turn += 1


@dataclass
class Pacing:
    """The state of one claim loop between two batches.

    ``target_seconds`` bounds a batch in time: a producer that writes an event id again waits for our COMMIT.
    """

    batch_size: int
    target_seconds: float
    frontier: Frontier = field(default_factory=Frontier)
    limit: int = field(init=False)
    is_alone: bool = field(default=False, init=False)
    """The last failure was met by one event alone."""
    _passes_without_success: int = field(default=0, init=False)
    _turn: int = field(default=0, init=False)
    _ran_out: bool = field(default=False, init=False)
    _beyond: Position | None = field(default=None, init=False)
    """Behind which events in doubt the next claim begins."""
    _chosen: str | None = field(default=None, init=False)
    _chosen_before: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.limit = self.batch_size

    @property
    def is_stuck(self) -> bool:
        """What stands first could not be settled several times: it must make way."""
        return self._passes_without_success >= STUCK_PASSES_MAX

    def adopt(self, batch_size: int, target_seconds: float) -> None:
        """Go by other limits from the next claim on; batches grow to a larger size as they succeed."""
        self.batch_size, self.target_seconds = batch_size, target_seconds
        self.limit = min(self.limit, batch_size)

    def start(self, now: float) -> Position | None:
        """Behind which event the next claim begins; None: at the beginning. ``now`` in seconds, monotonic."""
        self._turn = self.frontier.turn
        if self._beyond is not None:
            return self._beyond
        return None if now >= self.frontier.sweep_due else self.frontier.mark

    def claimed(self, end: Position | None) -> None:
        """A claim came back full, with ``end`` as its last event: the next one begins there."""
        if self._turn == self.frontier.turn:
            self.frontier.mark = end

    def swept(self, began: float, now: float) -> None:
        """A look from the beginning took from ``began`` to ``now``: the next one in its share of the time."""
        self.frontier.sweep_due = now + (now - began) * (1 / SWEEP_SHARE - 1)

    def choose(self, kinds: Sequence[str]) -> str:
        """Of the types that a claim brought, in their order, the one whose turn it is.

        The first event's, but none twice in a row: what stands first may have to wait for others, and all behind it
        would wait, too. A transaction that is repeated keeps its turn.
        """
        self._chosen = next(kind for kind in kinds if kind != self._chosen_before)
        return self._chosen

    def failed(self) -> None:
        """A transaction was in the way of another: half of it next time, from the beginning."""
        self.is_alone = self.limit == 1
        self.limit = max(1, self.limit // 2)
        self.frontier.go_back()

    def interrupted(self) -> None:
        """Nothing of the transaction stands: its events are where they were."""
        self._beyond = None
        self.frontier.go_back()

    def in_doubt(self, end: Position | None) -> None:
        """Events were refused and nobody knows whether it is their fault or the database's: others must show it.

        Next come so few that each is tried for certain, then those behind them: ``end`` is where a full claim ended.
        """
        if self.limit > FEW_IN_DOUBT:
            self.limit = FEW_IN_DOUBT
        else:
            self._beyond = end

    def gave_up(self) -> None:
        """The database is in trouble; perhaps only with what this type of event needs of it."""
        self._end_turn()

    def made_way(self) -> None:
        """An event that waited alone was postponed."""
        self.is_alone = False

    def committed(self, *, claimed: int, settled: int, is_full: bool, seconds: float) -> None:
        """A batch was committed, which took ``seconds`` from its claim on."""
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
        """A batch takes all the savepoints there are and will not be through: half of it next time."""
        self._ran_out = True

    def _end_turn(self) -> None:
        self._chosen, self._chosen_before = None, self._chosen

    def _grown(self, claimed: int, seconds: float) -> int:
        """Twice as many events, up to the full size, and no more than fit into the time."""
        grown = min(self.batch_size, self.limit * 2)
        if not claimed or seconds <= 0:
            return grown
        affordable = int(claimed * self.target_seconds / seconds)
        return min(grown, max(affordable, min(self.limit, FEWEST)))
