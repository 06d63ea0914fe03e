"""Decides how many events the next claim asks for, and where the claim begins in the queue.

This module does no I/O. The caller passes the time. This module reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from outbox_worker.decision import Limits
from outbox_worker.model import Position
from outbox_worker.store.set_aside import SetAside

FEWEST = 50
"""If the database is slow, the worker shrinks its batches, but not below this size.

Smaller batches would spend most of their time on BEGIN and COMMIT.
"""
STUCK_PASSES_MAX = 5
"""If this number of full claims in a row settle no event, the worker postpones the claimed events.

A full claim finds as many events as it asks for. Without this limit, the worker would claim the
same events again and again. Later events would wait.
"""
FEW_IN_DOUBT = 15
"""The largest batch size at which one transaction can always try each event alone.

A larger batch could need more than ``MAX_SAVEPOINTS`` savepoints. Each halving takes two
savepoints.
"""
LONG_CLAIM_SECONDS = 1.0
"""The duration from which a claim from the start of the queue is too long.

If a claim that is too long finds no event, the next claim does not look further back.
"""
REACH_FIRST = 24 * 60 * 60.0
REACH_LEAST = 60.0
"""The first and the smallest reach (in seconds), if a claim from the start of the queue timed out.

The reach is the time by which a claim looks back.
"""
REACH_CUT = 8
"""The divisor of the reach. Four divisions shrink a reach of one day to ``REACH_LEAST``."""
START_SHARE = 0.05
"""The largest share of time that a claim loop spends on claims from the start of the queue.

This limit applies only while claims find events. If no event follows the last claim, the loop
claims from the start at once.
"""


@dataclass
class Frontier:
    """The position that the claim loops of one process have reached in the queue.

    The loops share one frontier. A claim from the start of the queue is slow. This claim must read
    the rows that other loops have locked. This claim must also read the index entries of rows that
    were deleted after the oldest open snapshot. Therefore, if all claimed events are settled, the
    next claim begins where the last claim ended. An event can still appear before that position
    after a late commit, or if the clock was set back. Therefore a claim begins at the start of the
    queue again from time to time.
    """

    mark: Position | None = None
    """The position where the last claim ended. If None, the next claim begins at the start of the queue."""
    start_due: float = 0.0
    """The time from which the next claim begins at the start of the queue."""
    reach: float = math.inf
    """How far back in time, in seconds, a claim from the start of the queue looks.

    If a transaction stays open for hours, many index entries of deleted rows remain. A claim that
    reads all of these entries exceeds the time limit of a statement. Claims then read only the
    newest part of the queue, and the worker still settles events.
    """
    start: Position | None = None
    """The position where a claim from the start of the queue begins.

    If None, the claim begins at the oldest event. ``reach`` determines this position.
    """
    turn: int = 0
    """The number of calls of ``go_back``. If this number changes during a claim, the claim does not set ``mark``."""

    def go_back(self) -> None:
        """Begin the next claim at the start of the queue.

        An event before ``mark`` is not settled yet.
        """
        self.mark = None
        self.turn += 1

    def look_back(self, reach: float, today: datetime) -> None:
        """Let claims from the start of the queue look ``reach`` seconds back.

        ``today`` is the time by the database's clock.
        """
        is_far = reach > REACH_FIRST
        self.reach = math.inf if is_far else reach
        self.start = None if is_far else Position((today - timedelta(seconds=reach)).isoformat(), 0)


@dataclass
class Pacing:
    """The state of one claim loop between two batches."""

    limits: Limits
    frontier: Frontier = field(default_factory=Frontier)
    set_aside: SetAside = field(default_factory=SetAside)
    """The events that no claim takes. All claim loops of one process share this object."""
    limit: int = field(init=False)
    """The number of events that the next claim asks for."""
    careful_limit: int = field(init=False)
    """The number of events that the next careful transaction takes.

    This number is at most ``limit``. If the database refuses many events, only this limit shrinks.
    The fast statement still claims full batches. The refused events therefore do not delay all
    other events.
    """
    is_alone: bool = field(default=False, init=False)
    """Whether the last transaction failed and had claimed only one event."""
    is_calm: bool = field(default=True, init=False)
    """False while the worker searches for the cause of a failure.

    The next transaction is then careful.
    """
    breaks_alone: bool = field(default=False, init=False)
    """Whether the connection broke while the worker settled an event that it had claimed alone."""
    may_reach_further: bool = field(default=False, init=False)
    """Whether the next claim from the start of the queue can look further back than before."""
    _passes_without_success: int = field(default=0, init=False)
    _turn: int = field(default=0, init=False)
    _in_hand: int = field(default=0, init=False)
    """The number of events that the last interrupted transaction had claimed."""
    _ran_out: bool = field(default=False, init=False)
    _beyond: Position | None = field(default=None, init=False)
    """The position after which the next claim begins, to skip refused events. If None, no event is skipped."""
    _chosen: str | None = field(default=None, init=False)
    _chosen_before: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.limit = self.careful_limit = self.limits.batch_size

    @property
    def is_stuck(self) -> bool:
        """Whether ``STUCK_PASSES_MAX`` full claims in a row settled no event.

        The worker must then postpone the first events of the queue.
        """
        return self._passes_without_success >= STUCK_PASSES_MAX

    def use(self, limits: Limits) -> None:
        """Use these limits from the next claim on.

        If the batch size is larger than before, batches grow in steps.
        """
        self.limits = limits
        self._shrink(limits.batch_size)

    def start(self, now: float) -> Position | None:
        """Return the position after which the next claim begins. None means the start of the queue.

        ``now`` is in monotonic seconds.
        """
        self._turn = self.frontier.turn
        if self._beyond is not None:
            return self._beyond
        return None if now >= self.frontier.start_due else self.frontier.mark

    def claimed(self, start: Position | None, end: Position | None, *, is_full: bool) -> None:
        """Begin the next claim where a claim from ``start`` ended.

        ``end`` is None if the claim found no event. If a claim from the start of the queue was not
        full, do not change ``mark``. This claim has found all due events, but its end is possibly
        before ``mark``.
        """
        is_short_from_start = start is None and not is_full and self.frontier.mark is not None
        if end is not None and not is_short_from_start and self._turn == self.frontier.turn:
            self.frontier.mark = end

    def claimed_from_start(self, began: float, now: float, *, has_found: bool) -> None:
        """Delay the next claim from the start of the queue.

        Claims from the start must use at most ``START_SHARE`` of the time. The last claim from the
        start took from ``began`` to ``now``. ``has_found`` says whether this claim found an event.
        """
        self.frontier.start_due = now + (now - began) * (1 / START_SHARE - 1)
        is_limited = self.frontier.start is not None
        self.may_reach_further = is_limited and (has_found or now - began < LONG_CLAIM_SECONDS)

    def reach_less(self, today: datetime) -> None:
        """Shorten the reach, because the last claim from the start of the queue timed out."""
        reach = min(self.frontier.reach / REACH_CUT, REACH_FIRST)
        self.frontier.look_back(max(reach, REACH_LEAST), today)

    def reach_further(self, today: datetime) -> None:
        """Let claims from the start of the queue look twice as far back."""
        self.may_reach_further = False
        self.frontier.look_back(self.frontier.reach * 2, today)

    def choose(self, kinds: Sequence[str]) -> str:
        """Choose the event type to settle now.

        Choose the first type of ``kinds`` that was not chosen for the last batch.

        Without this rule, the worker could always choose a type whose events cannot be settled.
        Events of other types would wait. A repeated transaction has the same event type as before.
        """
        self._chosen = next(kind for kind in kinds if kind != self._chosen_before)
        return self._chosen

    def failed(self) -> None:
        """Claim half as many events next time, from the start of the queue.

        Another transaction caused this failure. The claimed events are not at fault.
        """
        self.is_calm = False
        claimed = self._in_hand or self.limit
        self.is_alone = claimed == 1
        self._shrink(claimed // 2)
        self.frontier.go_back()

    def broke(self) -> None:
        """Claim far fewer events next time, because the connection broke while events were settled.

        An event can be the cause, for example if it fires a trigger that ends the connection. If
        the connection breaks for a single event, the worker postpones this event. Other events can
        then be settled.
        """
        self.is_calm = False
        claimed = self._in_hand or self.limit
        self.is_alone = self.breaks_alone = claimed == 1
        self._shrink(claimed // 8)
        self.frontier.go_back()

    def be_careful(self) -> None:
        """Settle the next batch in a careful transaction."""
        self.is_calm = False

    def interrupted(self, claimed: int) -> None:
        """Begin the next claim at the start of the queue, because the transaction was rolled back.

        The events of this transaction are still due. ``claimed`` is the number of these events, or
        0 if the transaction failed before its claim returned.
        """
        self._in_hand = claimed
        self._beyond = None
        self.frontier.go_back()

    def in_doubt(self, end: Position | None) -> None:
        """Change the next claim to find out whether the events or the database caused the refusals.

        First, claim only ``FEW_IN_DOUBT`` events, so that the worker tries each event alone. If the
        database refuses these events, too, the next claim begins after ``end``. ``end`` is the
        position of the last event of a full claim. If an event after ``end`` succeeds, the database
        is not the cause.
        """
        self.is_calm = False
        if self.limit > FEW_IN_DOUBT:
            self._shrink(FEW_IN_DOUBT)
        else:
            self._beyond = end

    def gave_up(self) -> None:
        """Choose another event type next time.

        The database error possibly occurs only with this type.
        """
        self._end_turn()

    def made_way(self) -> None:
        """Record that the worker postponed the event that was claimed alone."""
        self.is_alone = self.breaks_alone = False

    def committed(self, claimed: int, settled: int, *, is_full: bool, seconds: float) -> None:
        """Record that a batch was committed, ``seconds`` after its claim."""
        self.is_alone = self.breaks_alone = False
        self._end_turn()
        in_vain = is_full and not settled and not self.is_stuck
        self._passes_without_success = self._passes_without_success + 1 if in_vain else 0
        if settled < claimed or self._beyond is not None:
            self.frontier.go_back()
        self._beyond = None
        self.is_calm = not self.is_stuck
        careful = self.careful_limit // 2 if self._ran_out else self.careful_limit * 2
        if not self._ran_out:
            self.limit = self._grown(claimed if is_full else 0, seconds)
        self.careful_limit = min(max(1, careful), self.limit)
        self._ran_out = False

    def ran_out(self) -> None:
        """Halve the next careful transaction, because this transaction used all savepoints."""
        self._ran_out = True

    def _shrink(self, most: int) -> None:
        self.limit = max(1, min(self.limit, most))
        self.careful_limit = min(self.careful_limit, self.limit)

    def _end_turn(self) -> None:
        self._chosen, self._chosen_before = None, self._chosen

    def _grown(self, claimed: int, seconds: float) -> int:
        """Return twice the limit, but at most the batch size.

        If the batch takes too long for the target time, return fewer events.

        A slow database does not reduce the limit below ``FEWEST``.
        """
        grown = min(self.limits.batch_size, self.limit * 2)
        if not claimed or seconds <= 0:
            return grown
        affordable = int(claimed * self.limits.target_seconds / seconds)
        return min(grown, max(affordable, min(self.limit, FEWEST)))
