"""A model of how workers count deaths: two workers and one event, in every possible order of moves.

A state contains the data of the database (rows of ``workers``, ``crashes`` of the event) and what
each process knows. It also contains the truth, but no row shows the truth. A move is an action of a
process, a kill, a start or a failure. Time can also pass. The production function ``judge_death``
decides what a row proves. To *accuse* an event, a worker writes it into its own row. It then
processes the event alone.

If the database answers, a living worker writes a heartbeat between any two heartbeats of the other
worker. Therefore the judge can count its own heartbeats to detect that the other worker is silent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from outbox_worker.decision import (
    CRASHES_MAX,
    HEARTBEATS_BEFORE_JUDGING,
    WORKER_SILENT_AFTER_SECONDS,
    Death,
    IsolationTrace,
    Traces,
    judge_death,
)

DEADLINE = 10.0
DEATHS_TOLD = 8
"""The model counts at most this number of deaths. A deadly event must become a dead letter
before."""


class Truth:
    """What really happened to the process of a row."""

    LIVES = "lives"
    KILLED_AT_WORK = "killed while it worked on the event"
    KILLED_BESIDE = "killed while it did not work on the event"
    STOPPED = "stopped cleanly"


class Row(NamedTuple):
    """An open row of ``workers``, with all that a judge reads about it."""

    accuses: bool = False
    lived_on: bool = False
    """Whether the last heartbeat is long after the accusation."""
    is_old_server: bool = False
    """Whether the server has restarted or failed over after the accusation."""
    is_silent: bool = False
    has_note: bool = False
    doubted_by: tuple[bool, bool] = (False, False)
    """Which of the two workers has noticed an outage that ended after the accusation."""
    truth: str = Truth.LIVES
    is_given_up: bool = False
    """Whether the process gave up the event, or ended, when it had no database. The row then still
    contains an accusation that is no longer true."""


class Worker(NamedTuple):
    """A running process."""

    row: Row = Row()
    is_cut_off: bool = False
    """Whether the worker has no database or is frozen. The other worker can continue."""
    in_hand: bool = False
    """Whether the worker processes the event alone."""
    heartbeats: int = 0
    is_fresh: bool = True
    """Whether the worker has written a heartbeat after the last heartbeat of the other worker."""
    is_taken: bool = False
    """Whether the other worker took over the row although this worker lives."""
    is_charged: bool = False
    """Whether a death of this living worker is counted and not yet subtracted."""


class State(NamedTuple):
    workers: tuple[Worker | None, Worker | None] = (Worker(), Worker())
    orphans: tuple[Row, ...] = ()
    """Open rows of processes that have ended."""
    is_away: bool = False
    """Whether the database is unreachable for all workers."""
    crashes: int = 0
    deaths: int = 0
    """The number of kills while a worker processed the event alone."""
    is_over: bool = False
    """Whether the event is settled or a dead letter."""


Judge = Callable[[Traces, float], Death]


@dataclass(frozen=True)
class Protocol:
    """The rules and the possible failures of one model. A broken protocol lacks one of the
    rules."""

    same_host: bool = True
    cuts: bool = True
    """Whether one worker can lose the database while the other worker has it."""
    outages: bool = True
    """Whether the database can be unreachable for all workers."""
    restarts: bool = True
    """Whether the server can restart or fail over."""
    lives_on: bool = True
    """Whether a worker can live long after its accusation without withdrawing it."""
    is_deadly: bool = False
    """Whether the event kills each worker that processes it. The model then has no other failures,
    and counts deaths."""
    judge: Judge = judge_death
    withdraws_at_stop: bool = True
    withdraws_when_it_gives_up: bool = True
    leaves_notes: bool = True
    takes_back: bool = True
    orphans_max: int = 1


class Wrong(NamedTuple):
    """A row whose death was counted although the worker did not die of the event."""

    row: Row
    is_doubted: bool
    """Whether the judge has noticed an outage that ended after the accusation."""


@dataclass
class Course:
    """Explores all states that are possible under a protocol."""

    protocol: Protocol
    states: dict[State, list[State]] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)
    """The deaths that were counted by mistake."""

    def explore(self, *, until: Callable[[State], bool] = lambda _: False) -> Course:
        """Explore the states breadth-first. Stop at the first state for which ``until`` is true."""
        waiting = deque([State()])
        while waiting:
            state = waiting.popleft()
            if until(state):
                self.states[state] = []
                break
            if state not in self.states:
                following = {self._canonical(each) for each in self.moves(state)}
                self.states[state] = list(following)
                waiting.extend(each for each in following if each not in self.states)
        return self

    def _canonical(self, state: State) -> State:
        """Reset the fields that no later move reads. So states that differ only in these fields
        become one state."""
        if state.is_over:
            return State(is_over=True, deaths=state.deaths)
        judges_later = self.protocol.is_deadly or bool(state.orphans)
        pair = [
            None if worker is None else self._without_the_unread(worker, counts=judges_later or at == 1)
            for at, worker in enumerate(state.workers)
        ]
        return state._replace(workers=(pair[0], pair[1]))

    def _without_the_unread(self, worker: Worker, *, counts: bool) -> Worker:
        if not worker.row.accuses and not worker.is_taken:
            worker = worker._replace(row=Row())
        if self.protocol.same_host:
            return worker._replace(heartbeats=0, is_fresh=True)
        return worker if counts else worker._replace(heartbeats=0)

    def cannot_end(self) -> set[State]:
        """Return the states from which the event can never be settled or become a dead letter."""
        before: dict[State, list[State]] = {}
        for state, following in self.states.items():
            for each in following:
                before.setdefault(each, []).append(state)
        ending = deque(state for state in self.states if state.is_over)
        found = set(ending)
        while ending:
            fresh = [each for each in before.get(ending.popleft(), ()) if each not in found]
            found.update(fresh)
            ending.extend(fresh)
        return self.states.keys() - found

    def moves(self, state: State) -> Iterator[State]:
        if state.is_over:
            return
        for at, worker in enumerate(state.workers):
            if worker is None:
                if not self.protocol.is_deadly or self.protocol.same_host or all(r.is_silent for r in state.orphans):
                    yield _with(state, at, Worker(is_fresh=False))
                continue
            if self._has_database(state, worker):
                yield from self._work(state, at, worker)
                yield from self._judge(state, at, worker)
                yield from self._beat(state, at, worker)
            yield from self._end(state, at, worker)
            if not self.protocol.is_deadly:
                yield from self._give_up(state, at, worker)
            if self.protocol.cuts:
                yield from self._lose(state, at, worker)
        if self.protocol.outages:
            yield from self._server(state)
        yield from self._silence(state)

    @property
    def _leaves_note(self) -> bool:
        """Whether a worker leaves a note. Only a judge on the same host can read the note."""
        return self.protocol.leaves_notes and self.protocol.same_host

    def _has_database(self, state: State, worker: Worker) -> bool:
        return not state.is_away and not worker.is_cut_off

    def _work(self, state: State, at: int, worker: Worker) -> Iterator[State]:
        """Accuse the event. If it is accused already, settle it or withdraw the accusation."""
        if not worker.in_hand:
            if (at or state.orphans) and not self.protocol.is_deadly:
                return  # one accused row is enough: each row is judged separately
            state, worker = self._reopened(state, worker)
            row = Row(accuses=True)
            if state.crashes >= CRASHES_MAX:
                yield state._replace(is_over=True)
            elif not self._must_wait(state, at, worker):
                yield _with(state, at, worker._replace(row=row, in_hand=True))
        elif not self.protocol.is_deadly:
            yield state._replace(is_over=True)
            yield self._withdrawn(state, at, worker)

    def _must_wait(self, state: State, at: int, worker: Worker) -> bool:
        """Return whether the worker must wait, because it judges open rows before it works. It also
        waits for rows that it cannot judge yet."""
        deaths = [self._verdict(at, worker, row, is_running=False) for row in state.orphans]
        return any(death is not Death.NONE for death in deaths)

    def _withdrawn(self, state: State, at: int, worker: Worker) -> State:
        state, worker = self._reopened(state, worker)
        row = worker.row
        if self.protocol.withdraws_when_it_gives_up:
            row = Row()
        return _with(state, at, worker._replace(row=row, in_hand=False))

    def _reopened(self, state: State, worker: Worker) -> tuple[State, Worker]:
        """Open the row again if the other worker took it over. The living worker subtracts the
        counted death."""
        if not worker.is_taken:
            return state, worker
        is_charged = worker.is_charged and not self.protocol.takes_back
        return state, worker._replace(row=Row(), is_taken=False, is_charged=is_charged)

    def _beat(self, state: State, at: int, worker: Worker) -> Iterator[State]:
        """Write a heartbeat, soon or long after the accusation. A worker writes its next heartbeat
        only after one of the other worker."""
        neighbour = state.workers[1 - at]
        if neighbour is not None and self._has_database(state, neighbour):
            if worker.is_fresh and not neighbour.is_fresh:
                return
            state = _with(state, 1 - at, neighbour._replace(is_fresh=False))
        state, worker = self._reopened(state, worker)
        heartbeats = min(HEARTBEATS_BEFORE_JUDGING, worker.heartbeats + 1)
        worker = worker._replace(heartbeats=heartbeats, is_fresh=True, row=worker.row._replace(is_silent=False))
        yield _with(state, at, worker)
        if worker.row.accuses and self.protocol.lives_on:
            yield _with(state, at, worker._replace(row=worker.row._replace(lived_on=True)))

    def _end(self, state: State, at: int, worker: Worker) -> Iterator[State]:
        """End the process: the event kills it, somebody kills it, or it stops cleanly."""
        has_database = self._has_database(state, worker)
        if self.protocol.is_deadly:
            if worker.in_hand and state.deaths < DEATHS_TOLD:
                yield self._orphaned(state, at, worker, Truth.KILLED_AT_WORK)
            return
        yield self._orphaned(state, at, worker, Truth.KILLED_AT_WORK if worker.in_hand else Truth.KILLED_BESIDE)
        if has_database and self.protocol.withdraws_at_stop:
            state, _ = self._reopened(state, worker)
            yield _with(state, at, None)
        else:
            noted = worker.row._replace(has_note=self._leaves_note and not has_database)
            yield self._orphaned(state, at, worker._replace(row=noted), Truth.STOPPED)

    def _orphaned(self, state: State, at: int, worker: Worker, truth: str) -> State:
        is_given_up = worker.row.is_given_up or not self._has_database(state, worker)
        row = worker.row._replace(truth=truth, is_given_up=is_given_up)
        is_open = row.accuses and not worker.is_taken and len(state.orphans) < self.protocol.orphans_max
        orphans = (*state.orphans, row) if is_open else state.orphans
        deaths = state.deaths + (self.protocol.is_deadly and truth is Truth.KILLED_AT_WORK)
        return _with(state._replace(orphans=orphans, deaths=deaths), at, None)

    def _lose(self, state: State, at: int, worker: Worker) -> Iterator[State]:
        """Let one worker lose the database, or reach it again. If the workers are on different
        hosts, only the worker whose row is judged does so."""
        if at and not self.protocol.same_host:
            return
        if not worker.is_cut_off:
            yield _with(state, at, worker._replace(is_cut_off=True))
        elif not state.is_away:
            yield _noticed(_with(state, at, worker._replace(is_cut_off=False)), at)

    def _give_up(self, state: State, at: int, worker: Worker) -> Iterator[State]:
        """Give up the event without a database. Only a note on the host can record this."""
        if worker.in_hand and not self._has_database(state, worker):
            row = worker.row._replace(has_note=self._leaves_note, is_given_up=True)
            yield _with(state, at, worker._replace(in_hand=False, row=row))

    def _server(self, state: State) -> Iterator[State]:
        """Make the database unreachable or reachable again. It can return unchanged, restarted or
        after a failover."""
        if not state.is_away:
            yield state._replace(is_away=True)
            return
        back = state._replace(is_away=False)
        for at, worker in enumerate(state.workers):
            if worker is not None and not worker.is_cut_off:
                back = _noticed(back, at)
        yield back
        if self.protocol.restarts:
            yield _rows(back, lambda row: row._replace(is_old_server=True))

    def _silence(self, state: State) -> Iterator[State]:
        """Let time pass. Workers that cannot write heartbeats become silent."""

        def silent(row: Row) -> Row:
            return row._replace(is_silent=True)

        orphans = tuple(silent(row) for row in state.orphans)
        later = state._replace(orphans=orphans)
        for at, worker in enumerate(state.workers):
            if worker is not None and not self._has_database(state, worker):
                later = _with(later, at, worker._replace(row=silent(worker.row)))
        if later != state:
            yield later

    def _judge(self, state: State, at: int, judge: Worker) -> Iterator[State]:
        for row in state.orphans:
            death = self._verdict(at, judge, row, is_running=False)
            if death in (Death.UNPROVEN, Death.PROVEN):
                rest = list(state.orphans)
                rest.remove(row)
                yield self._counted(state._replace(orphans=tuple(rest)), at, row, death)
        other = state.workers[1 - at]
        if other is not None and other.row.accuses and not other.is_taken:
            death = self._verdict(at, judge, other.row, is_running=True)
            if death in (Death.UNPROVEN, Death.PROVEN):
                taken = other._replace(is_taken=True, is_charged=death is Death.PROVEN)
                yield self._counted(_with(state, 1 - at, taken), at, other.row, death)

    def _verdict(self, at: int, judge: Worker, row: Row, *, is_running: bool) -> Death:
        isolation = IsolationTrace(
            lived_on_seconds=2 * DEADLINE if row.lived_on else 0.0,
            is_same_server=not row.is_old_server,
            judge_was_cut_off=row.doubted_by[at],
            is_withdrawn=row.has_note,
        )
        traces = Traces(
            is_running=is_running if self.protocol.same_host else None,
            silent_seconds=WORKER_SILENT_AFTER_SECONDS + 1 if row.is_silent else 0.0,
            judge_heartbeats=judge.heartbeats,
            isolation=isolation,
        )
        return self.protocol.judge(traces, DEADLINE)

    def _counted(self, state: State, judge: int, row: Row, death: Death) -> State:
        if death is not Death.PROVEN:
            return state
        if row.truth is not Truth.KILLED_AT_WORK:
            self.wrong.append(Wrong(row, row.doubted_by[judge]))
        return state._replace(crashes=state.crashes + 1) if self.protocol.is_deadly else state


def _with(state: State, at: int, worker: Worker | None) -> State:
    pair = (worker, state.workers[1]) if at == 0 else (state.workers[0], worker)
    return state._replace(workers=pair)


def _rows(state: State, change: Callable[[Row], Row]) -> State:
    """Apply ``change`` to every row that accuses the event."""
    workers = [
        worker._replace(row=change(worker.row)) if worker is not None and worker.row.accuses else worker
        for worker in state.workers
    ]
    return state._replace(workers=(workers[0], workers[1]), orphans=tuple(change(row) for row in state.orphans))


def _noticed(state: State, at: int) -> State:
    """Let a worker notice that it has the database again. It then doubts every accusation that
    exists, and counts its heartbeats from 0."""

    def doubt(row: Row) -> Row:
        doubts = (True, row.doubted_by[1]) if at == 0 else (row.doubted_by[0], True)
        return row._replace(doubted_by=doubts)

    state = _rows(state, doubt)
    worker = state.workers[at]
    assert worker is not None
    return _with(state, at, worker._replace(heartbeats=0, is_fresh=False))
