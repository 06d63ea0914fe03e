"""Runs writers of one pair (student, course) and one change of its unique index, step by step, in
any order.

A writer stops before it begins, before its INSERT, inside its INSERT, and before its COMMIT. Before
its INSERT, it has locked its pair. Inside its INSERT, it has its snapshot, but has not chosen the
indexes that it maintains. A change of the index stops before it begins and before its COMMIT. With
CONCURRENTLY, it stops in each of its waits instead, because another connection keeps a lock or an
old snapshot. If an actor waits for a different actor, it is blocked, and the others continue.
"""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import text

from outbox_worker.decision import RetryPolicy
from outbox_worker.model import FoundPayment, Guard
from outbox_worker.reconcile.owed import OwedPurchases
from outbox_worker.schema.tables import Tables
from outbox_worker.store.guard import GuardWatch
from tests.support.factories import Payment, ProbedProcessor, Shop, drain_all
from tests.support.history import find_twice_active, keep_history
from tests.support.interleaving import AT_ONCE
from tests.support.makers import Connect, MakeDatabase, MakeProcessor
from tests.support.sites import watch_charges
from tests.support.watching import on_commit, on_rollback, on_statement

PATIENCE = 60.0
_INSIDE = 4242
"""The first half of the advisory lock at which a writer stops inside its INSERT. The second half is
the pid of its backend."""
_INSERT = "INSERT INTO public.purchases"
_GRANTED = "DO UPDATE"
"""Only the INSERT of a refund contains these words. It activates no purchase."""
_INDEX = "pair_guard"

WRITERS = ("by index", "by lock", "refund", "backfill")
CHANGES = {
    "create": f"CREATE UNIQUE INDEX {_INDEX} ON purchases (student_id, course_id) WHERE is_active",
    "create concurrently": f"CREATE UNIQUE INDEX CONCURRENTLY {_INDEX} ON purchases (student_id, course_id)"
    " WHERE (is_active = true)",
    "drop": f"DROP INDEX {_INDEX}",
    "drop concurrently": f"DROP INDEX CONCURRENTLY {_INDEX}",
}
_ROW_LOCK, _LOOK_LOCK = (f"LOCK TABLE purchases IN {mode} MODE" for mode in ("ROW EXCLUSIVE", "ACCESS SHARE"))
_HOLDS: dict[str, list[str]] = {
    "create concurrently": [_ROW_LOCK, _ROW_LOCK, "SELECT count(*) FROM outbox"],
    "drop concurrently": [_LOOK_LOCK, _LOOK_LOCK],
}
"""The statements that make a change wait for the first, second, … time. CREATE waits twice for
writers, and then for old snapshots. DROP waits twice for all transactions that have locked the
table."""

Trace = list[tuple[list[str], str]]
"""For each step: the actors that could continue, and the actor that did."""
Choose = Callable[[int, list[str]], str]


class Actor(ABC):
    """Runs in a thread of its own. ``go`` lets it take one step."""

    def __init__(self, name: str) -> None:
        self.name, self.pid = name, 0
        self._turn = threading.Semaphore(0)
        self.stands_at = ""
        self.is_free = False
        self.future: Future[None]

    def stop(self, place: str) -> None:
        """Stop at this place until ``go`` is called. The actor's thread calls this."""
        if self.is_free:
            return
        self.stands_at = place
        assert self._turn.acquire(timeout=PATIENCE), f"{self.name} stands at {place} for ever"

    def go(self) -> None:
        """Let the actor take one step."""
        self.stands_at = ""
        self._turn.release()

    def start(self, pool: ThreadPoolExecutor) -> None:
        self._turn = threading.Semaphore(0)
        self.stands_at, self.is_free = "", False
        self.future = pool.submit(self._run)

    def _run(self) -> None:
        self.stop("start")
        self.act()

    @abstractmethod
    def act(self) -> None: ...

    @abstractmethod
    def stands_behind(self, blockers: Sequence[int]) -> bool:
        """Return whether the actor waits only for the connection with which the stage stops it."""


class Writer(Actor):
    """Writes purchases of the pair through one connection."""

    def __init__(self, name: str, stage: Stage) -> None:
        super().__init__(name)
        self.stage = stage
        self.database = stage.make_database(connections=1, deadline_seconds=100)
        self.shop = Shop(stage.connect(autocommit=True))
        self.processor = stage.make_processor(batch_size=1, policy=AT_ONCE, database=self.database)
        with self.database.transaction() as session:
            self.pid = int(session.scalar(text("SELECT pg_backend_pid()")) or 0)
        self._wrote = False
        on_statement(self.database, self._before)
        on_commit(self.database, self._before_commit)
        on_rollback(self.database, self._forget)

    def _before(self, statement: str) -> None:
        if _INSERT in statement and _GRANTED not in statement:
            self._wrote = True
            if self.stops_before_insert:
                self.stop("INSERT")

    def _before_commit(self) -> None:
        if self._wrote:
            self._wrote = False
            self.stop("COMMIT")

    def _forget(self) -> None:
        self._wrote = False

    stops_before_insert = True

    def go(self) -> None:
        if self.stands_at:
            super().go()
        else:
            self.stage.let_through(self.pid, hold_again=not self.is_free)

    def stands_behind(self, blockers: Sequence[int]) -> bool:
        return list(blockers) == [self.stage.keeper_pid]

    def prepare(self, pair: Pair) -> None:
        """Write the rows that the schedule needs before it begins."""

    def probe(self) -> None:
        with self.database.transaction() as session:
            self.processor.watch.probe(session)


@dataclass
class Pair:
    """The pair of one schedule."""

    student: UUID
    course: UUID
    active: list[Payment]
    """Payments to refund. The first payment has the active purchase of the pair. Each other payment
    can get it."""

    def pay(self, shop: Shop) -> Payment:
        return shop.payment(student=self.student, course=self.course)


class ByIndex(Writer):
    """Settles a new event by the fast statement. This statement locks no pair if it finds the
    index."""

    stops_before_insert = False

    def prepare(self, pair: Pair) -> None:
        self.pair = pair

    def probe(self) -> None:
        super().probe()
        watch = self.processor.watch  # the trigger that stops writers changes no row
        watch.state = replace(watch.state, triggers_on=frozenset())

    def act(self) -> None:
        self.probe()
        with self.shop.connection.transaction():
            self.shop.paid(student=self.pair.student, course=self.pair.course)
        self.processor.process_batch()


class ByLock(ByIndex):
    """Settles a new event in a careful transaction. The worker does not know that the index
    exists."""

    stops_before_insert = True

    def probe(self) -> None:
        watch = self.processor.watch
        watch.state = replace(watch.state, guard=Guard.LOCK, predicate="", lock_capacity=100)
        self.processor.is_careful = True


class Refund(Writer):
    """Settles a refund. Then the oldest other payment that is owed the course gets the purchase."""

    def prepare(self, pair: Pair) -> None:
        if not pair.active:
            pair.active.append(pair.pay(self.shop))
            self.shop.purchase(pair.active[0])
        pair.active.append(pair.pay(self.shop))
        self.refunded = pair.active[-2]

    def act(self) -> None:
        self.probe()
        self.shop.refund(self.refunded)
        self.processor.process_batch()


class Backfill(Writer):
    """Creates the purchase of a payment that has no event."""

    def prepare(self, pair: Pair) -> None:
        self.owed = pair.pay(self.shop)

    def act(self) -> None:
        self.stage.backfill(self.processor, self.owed)


class Change(Actor):
    """Changes the index. The holders are connections that make the change wait."""

    def __init__(self, stage: Stage, operation: str) -> None:
        super().__init__(operation)
        self._operation, self._stage = operation, stage
        self._connection = stage.connect(autocommit=True)
        self.pid = self._connection.info.backend_pid
        holds = _HOLDS.get(operation, [])
        self._holders = [(stage.connect(), hold) for hold in holds]
        for connection, _ in self._holders:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        self._rung = 0

    def start(self, pool: ThreadPoolExecutor) -> None:
        self._rung = 0
        for connection, hold in [*self._holders[:1], *self._holders[2:]]:
            connection.execute(hold)
        super().start(pool)

    def act(self) -> None:
        statement = CHANGES[self._operation]
        if self._holders:
            self._connection.execute(statement)
            return
        with self._connection.transaction():
            self._connection.execute(statement)
            self.stop("COMMIT")

    def go(self) -> None:
        if self.stands_at:
            super().go()
            return
        if self._rung + 1 < min(2, len(self._holders)):
            connection, hold = self._holders[self._rung + 1]
            connection.execute(hold)
        self._holders[self._rung][0].rollback()
        self._rung += 1

    def stands_behind(self, blockers: Sequence[int]) -> bool:
        holders = self._holders[self._rung : self._rung + 1]
        return [connection.info.backend_pid for connection, _ in holders] == list(blockers)

    def let_go(self) -> None:
        for connection, _ in self._holders:
            connection.rollback()


_MADE: dict[str, type[Writer]] = {"by index": ByIndex, "by lock": ByLock, "refund": Refund, "backfill": Backfill}


class Stage:
    """Runs schedules on one database, one after the other. Each schedule has a pair of its own."""

    def __init__(
        self,
        shop: Shop,
        connect: Connect,
        tables: Tables,
        make_database: MakeDatabase,
        make_processor: MakeProcessor,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.shop, self.connect, self.pool = shop, connect, pool
        self.make_database, self.make_processor = make_database, make_processor
        self._tables = tables
        self._keeper = connect(autocommit=True)
        self.keeper_pid = self._keeper.info.backend_pid
        self._finisher = make_processor(policy=AT_ONCE, database=make_database(connections=1))
        self._writers: dict[tuple[str, int], Writer] = {}
        self._changes: dict[str, Change] = {}
        self.runs = 0
        self.blocked = 0
        """The number of steps before which an actor waited for a different actor."""
        self._set()

    def _set(self) -> None:
        keep_history(self.shop)
        watch_charges(self.shop)
        self.shop.rows(
            f"""
            CREATE FUNCTION stand_inside() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF current_query() !~ '{_GRANTED}' THEN
                    PERFORM pg_advisory_lock_shared({_INSIDE}, pg_backend_pid());
                    PERFORM pg_advisory_unlock_shared({_INSIDE}, pg_backend_pid());
                END IF;
                RETURN NULL;
            END $$
            """
        )
        self.shop.rows(
            "CREATE TRIGGER stand_inside BEFORE INSERT ON purchases FOR EACH STATEMENT EXECUTE FUNCTION stand_inside()"
        )

    def hold(self, pid: int) -> None:
        self._keeper.execute("SELECT pg_advisory_lock(%s, %s)", (_INSIDE, pid))

    def let_through(self, pid: int, *, hold_again: bool) -> None:
        self._keeper.execute("SELECT pg_advisory_unlock(%s, %s)", (_INSIDE, pid))
        if hold_again:
            self.hold(pid)

    def backfill(self, by: ProbedProcessor, payment: Payment) -> None:
        same = str(payment.student_id), str(payment.course_id)
        found = FoundPayment(payment.id, *payment.pair, Decimal(payment.amount), payment.currency, None, 0, same)
        policy: RetryPolicy = AT_ONCE
        watch = GuardWatch(self._tables.purchases, lambda _: None)
        list(OwedPurchases.start(by.database, self._tables, policy, watch).make([found], lambda *_: None))

    def run(self, kinds: Sequence[str], operation: str, choose: Choose) -> Trace:
        """Run one schedule, and check its result."""
        self.runs += 1
        self._clear(operation)
        pair = Pair(uuid4(), uuid4(), [])
        actors: list[Actor] = [self._writer(kind, kinds[:place].count(kind)) for place, kind in enumerate(kinds)]
        for writer in actors:
            assert isinstance(writer, Writer)
            writer.prepare(pair)
            self.hold(writer.pid)
        actors.append(self._change(operation))
        try:
            for actor in actors:
                actor.start(self.pool)
            trace = self._play(actors, choose)
        finally:
            self._let_go(actors)
        for actor in actors:
            actor.future.result(PATIENCE)
        self._check(trace)
        return trace

    def _play(self, actors: Sequence[Actor], choose: Choose) -> Trace:
        trace: Trace = []
        by_name = {actor.name: actor for actor in actors}
        while ready := self._settle_down(actors):
            name = choose(len(trace), ready)
            trace.append((ready, name))
            by_name[name].go()
        return trace

    def _settle_down(self, actors: Sequence[Actor]) -> list[str]:
        """Wait until no actor runs and at least one is stopped, or all are done. Return the names
        of the stopped actors."""
        deadline, pause = time.monotonic() + PATIENCE, 0.001
        while True:
            live = [actor for actor in actors if not actor.future.done()]
            asked = [actor.pid for actor in live if not actor.stands_at]
            query = "SELECT pid, pg_blocking_pids(pid) FROM unnest(%s::int[]) AS pid"
            blockers = dict(self._keeper.execute(query, [asked]).fetchall()) if asked else {}
            waiting = {actor.name: blockers[actor.pid] for actor in live if blockers.get(actor.pid)}
            ready = [
                actor.name
                for actor in live
                if (actor.name in waiting and actor.stands_behind(waiting[actor.name]))
                or (actor.pid not in blockers and actor.stands_at)
            ]
            if not live or (ready and len(ready) + len(waiting.keys() - set(ready)) == len(live)):
                self.blocked += bool(waiting.keys() - set(ready))
                return ready
            assert time.monotonic() < deadline, (ready, waiting, [actor.name for actor in live])
            time.sleep(pause)
            pause = min(0.02, 1.5 * pause)

    def _let_go(self, actors: Sequence[Actor]) -> None:
        for actor in actors:
            actor.is_free = True
            if isinstance(actor, Change):
                actor.let_go()
            elif actor.pid:
                self.let_through(actor.pid, hold_again=False)
            actor._turn.release(100)

    def _clear(self, operation: str) -> None:
        """Create the index if the schedule drops it. Drop the index if the schedule creates it."""
        if self.runs % 100 == 0:
            self.shop.rows("TRUNCATE purchases, payments, outbox, processed_events")
        self.shop.rows("TRUNCATE purchase_history")
        self.shop.rows(f"DROP INDEX IF EXISTS {_INDEX}")
        if operation.startswith("drop"):
            self.shop.rows(CHANGES["create"])

    def _check(self, trace: Trace) -> None:
        """Assert that no pair had two active purchases. Assert that no purchase is owed at the end,
        and that no event has a failed try."""
        told = [name for _, name in trace]
        assert find_twice_active(self.shop) == [], told
        self.shop.make_due()
        with self._finisher.database.transaction() as session:
            self._finisher.watch.probe(session)
        drain_all(self._finisher)
        if self.shop.owed():
            for row in self.shop.rows("SELECT id, student_id, course_id, amount, currency FROM payments"):
                self.backfill(
                    self._finisher, Payment(row.id, row.student_id, row.course_id, str(row.amount), row.currency)
                )
        assert find_twice_active(self.shop) == [], told
        left = {name: self.shop.count(name) for name in ("outbox", "charged", "dead_letters")}
        assert (self.shop.owed(), left) == (0, dict.fromkeys(left, 0)), told

    def _writer(self, kind: str, number: int) -> Writer:
        if (kind, number) not in self._writers:
            name = kind if number == 0 else f"{kind} {number + 1}"
            self._writers[kind, number] = _MADE[kind](name, self)
        return self._writers[kind, number]

    def _change(self, operation: str) -> Change:
        if operation not in self._changes:
            self._changes[operation] = Change(self, operation)
        return self._changes[operation]


def at_random(chance: random.Random) -> Choose:
    return lambda _, ready: chance.choice(ready)


def following(prefix: Sequence[str]) -> Choose:
    """Choose the actors of ``prefix`` first, if they can continue. Then choose the first actor that
    can continue."""
    return lambda place, ready: prefix[place] if place < len(prefix) and prefix[place] in ready else ready[0]


def all_schedules(run: Callable[[Choose], Trace]) -> Iterator[Trace]:
    """Run every possible order of the actors once, depth-first."""
    prefix: list[str] = []
    while True:
        trace = run(following(prefix))
        yield trace
        while trace and trace[-1][0][-1] == trace[-1][1]:
            trace.pop()
        if not trace:
            return
        ready, chosen = trace.pop()
        prefix = [name for _, name in trace] + [ready[ready.index(chosen) + 1]]
