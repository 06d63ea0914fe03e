"""Decides how many events the next claim asks for, and where the claim begins in the queue.

This module does no I/O. This module does not read the clock either, because the caller passes the time.
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
"""If the database is slow, the worker makes its batches smaller, but not smaller than this size.

Smaller batches would spend most of their time on BEGIN and COMMIT.
"""
STUCK_PASSES_MAX = 5
"""If this number of full claims in a row settle no event, the worker postpones the claimed events.

Otherwise the same events would be claimed again and again, and later events would wait.
"""
FEW_IN_DOUBT = 15
"""The largest batch size at which one transaction can always try each event alone.

A larger batch could need more than ``MAX_SAVEPOINTS`` savepoints, because each halving takes two of them.
"""
LONG_CLAIM_SECONDS = 1.0
"""If a claim from the start finds no event for longer than this, the next one does not look further back in time."""
REACH_FIRST = 24 * 60 * 60.0
REACH_LEAST = 60.0
"""How far back, in seconds, a claim from the start looks at first and at least, after such a claim took too long."""
REACH_CUT = 8
"""By how much the reach shrinks each time. With four times, it shrinks from a day to less than a minute."""
START_SHARE = 0.05
"""The largest share of its time that a claim loop spends on claims from the start of the queue.

This limit applies only while claims find events. A claim that finds none after the last claim begins at the start.
"""


@dataclass
class Frontier:
    """The position that the claim loops of one process have reached in the queue. The loops share one frontier.

    A claim from the start of the queue is slow, because it must read the rows that other loops have locked, and also
    the index entries of rows that were deleted after the oldest open snapshot. So while all claimed events are settled,
    the next claim begins where the last claim ended. An event can still appear before that position, because of a late
    commit or because the clock was set back. So from time to time, a claim begins at the start of the queue again.
    """

    mark: Position | None = None
    """The position where the last claim ended. If None, the next claim begins at the start of the queue."""
    start_due: float = 0.0
    """The time from which the next claim begins at the start of the queue."""
    reach: float = math.inf
    """How far back, in seconds, a claim from the start looks.

    While a transaction stays open for hours, no claim can read all index entries of deleted rows within the time limit
    of a statement. Claims then look at the newest part of the queue only, so that the queue does not stand still.
    """
    start: Position | None = None
    """The position where a claim from the start begins, which follows from ``reach``. None is the oldest event."""
    turn: int = 0
    """The number of calls of ``go_back``. If this number changes during a claim, the claim does not set ``mark``."""

    def go_back(self) -> None:
        """Begin the next claim at the start of the queue, because an event before ``mark`` is not settled yet."""
        self.mark = None
        self.turn += 1

    def look_back(self, reach: float, today: datetime) -> None:
        """Let claims from the start look ``reach`` seconds back. ``today`` is the time by the database's clock."""
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
    """The number of events that the next careful transaction takes. It is at most ``limit``.

    If many events are refused, this limit shrinks alone, so that the fast statement still claims full batches. So the
    refused events do not delay those that nothing speaks against.
    """
    is_alone: bool = field(default=False, init=False)
    """Whether the last transaction failed and had claimed only one event."""
    is_calm: bool = field(default=True, init=False)
    """Whether no failure is being looked into. Otherwise the next transaction is a careful one."""
    breaks_alone: bool = field(default=False, init=False)
    """Whether the connection broke while an event was settled that had been claimed alone."""
    may_reach_further: bool = field(default=False, init=False)
    """Whether the next claim from the start may look further back than the last one."""
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
        """Whether the first events must be postponed, because ``STUCK_PASSES_MAX`` full claims settled no event."""
        return self._passes_without_success >= STUCK_PASSES_MAX

    def use(self, limits: Limits) -> None:
        """Use these limits from the next claim on. If the size is larger than before, batches grow to it in steps."""
        self.limits = limits
        self._shrink(limits.batch_size)

    def start(self, now: float) -> Position | None:
        """Return the position after which the next claim begins, or None for the start.

        ``now`` is in monotonic seconds.
        """
        self._turn = self.frontier.turn
        if self._beyond is not None:
            return self._beyond
        return None if now >= self.frontier.start_due else self.frontier.mark

    def claimed(self, start: Position | None, end: Position | None, *, is_full: bool) -> None:
        """Begin the next claim where a claim from ``start`` ended. ``end`` is None if the claim found no event.

        A claim from the start of the queue that is not full leaves the mark where it is. Such a claim has found all due
        events, but it may have ended before the mark.
        """
        is_short_from_start = start is None and not is_full and self.frontier.mark is not None
        if end is not None and not is_short_from_start and self._turn == self.frontier.turn:
            self.frontier.mark = end

    def claimed_from_start(self, began: float, now: float, *, has_found: bool) -> None:
        """Delay the next claim from the start so that such claims use at most ``START_SHARE`` of the time.

        The last claim from the start took from ``began`` to ``now``. ``has_found`` tells whether it found an event.
        """
        self.frontier.start_due = now + (now - began) * (1 / START_SHARE - 1)
        is_limited = self.frontier.start is not None
        self.may_reach_further = is_limited and (has_found or now - began < LONG_CLAIM_SECONDS)

    def reach_less(self, today: datetime) -> None:
        """Let claims from the start look less far back, because such a claim took longer than a statement may take."""
        reach = min(self.frontier.reach / REACH_CUT, REACH_FIRST)
        self.frontier.look_back(max(reach, REACH_LEAST), today)

    def reach_further(self, today: datetime) -> None:
        """Let claims from the start look twice as far back."""
        self.may_reach_further = False
        self.frontier.look_back(self.frontier.reach * 2, today)

    def choose(self, kinds: Sequence[str]) -> str:
        """Choose the event type to settle now: the first of ``kinds`` that was not chosen for the last batch.

        Without this rule, events of a type that cannot be settled could be chosen again and again, and events of other
        types would wait. If a transaction is repeated, the same type is chosen again.
        """
        self._chosen = next(kind for kind in kinds if kind != self._chosen_before)
        return self._chosen

    def failed(self) -> None:
        """Claim half as many events next time, from the start of the queue.

        The events are not at fault, because another transaction caused this failure.
        """
        self.is_calm = False
        claimed = self._in_hand or self.limit
        self.is_alone = claimed == 1
        self._shrink(claimed // 2)
        self.frontier.go_back()

    def broke(self) -> None:
        """Claim far fewer events next time, because the connection broke while events were settled.

        An event may be the cause, for example by a trigger that ends the connection. After a claim of this single
        event, the event is postponed, so that others can be settled.
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
        """Begin the next claim at the start, because the transaction was rolled back and its events are still due.

        ``claimed`` is the number of these events; 0 if the transaction failed before its claim returned.
        """
        self._in_hand = claimed
        self._beyond = None
        self.frontier.go_back()

    def in_doubt(self, end: Position | None) -> None:
        """Change the next claim to find out what caused the refusals: the refused events, or the database.

        The first such claim asks for only ``FEW_IN_DOUBT`` events, so that each is tried alone. If these events are
        refused, too, the next claim begins after ``end``, the position of the last event of a full claim. If an event
        after ``end`` succeeds, the database is not the cause.
        """
        self.is_calm = False
        if self.limit > FEW_IN_DOUBT:
            self._shrink(FEW_IN_DOUBT)
        else:
            self._beyond = end

    def gave_up(self) -> None:
        """Choose another event type next time, because the database error may occur only with this type."""
        self._end_turn()

    def made_way(self) -> None:
        """Record that the event that was claimed alone is now postponed, so that other events can be claimed."""
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
        """Take half as many events into the next careful transaction, because this one used all its savepoints."""
        self._ran_out = True

    def _shrink(self, most: int) -> None:
        self.limit = max(1, min(self.limit, most))
        self.careful_limit = min(self.careful_limit, self.limit)

    def _end_turn(self) -> None:
        self._chosen, self._chosen_before = None, self._chosen

    def _grown(self, claimed: int, seconds: float) -> int:
        """Double the limit, but not beyond the batch size or the number of events that fit into the target time.

        A slow database does not reduce the limit below ``FEWEST``.
        """
        grown = min(self.limits.batch_size, self.limit * 2)
        if not claimed or seconds <= 0:
            return grown
        affordable = int(claimed * self.limits.target_seconds / seconds)
        return min(grown, max(affordable, min(self.limit, FEWEST)))
