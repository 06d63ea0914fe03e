"""A storm runs confirmations, refunds, second payments, index changes, backfills and kills at
once."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.failures import Failure, classify
from tests.support.backfilling import Operator
from tests.support.factories import Payment, Shop
from tests.support.history import keep_history
from tests.support.makers import Connect
from tests.support.processes import Process, start
from tests.support.refunding import CONFIRM_A, OPS, Pair, tell
from tests.support.sites import watch_charges

HANDS = 3
BATCH = 50
BACKLOG = 4 * BATCH
HOT = 80
"""The storm writes events again and again for this number of the youngest pairs."""
FORGOTTEN = 40
"""This number of payments without an event wait for a backfill. Only then does the storm write
events for their pairs."""
INDEX = "storm_guard"
PREDICATES = ("is_active", "(is_active = true)")
_LOCK_TIMEOUT = "SET lock_timeout = '2s'"
"""A change of the index without CONCURRENTLY must give up before the sessions that wait behind it
do."""


@dataclass
class Storm:
    """``seed`` determines the actions of the storm, but not their timing."""

    url: str
    shop: Shop
    connect: Connect
    operator: Operator
    seed: int
    pairs: list[Pair] = field(default_factory=list)
    forgotten: list[Pair] = field(default_factory=list)
    """Pairs whose payment has no event. After a while the storm writes events for these pairs,
    too."""
    counts: Counter[str] = field(default_factory=Counter)
    over: threading.Event = field(default_factory=threading.Event)
    doubled: list[str] = field(default_factory=list)
    """The errors of index builds that met a pair with two active purchases."""

    def rage(self, seconds: float) -> None:
        """Run the storm for ``seconds``. If one of its threads fails, raise the exception of this
        thread."""
        watch_charges(self.shop)
        keep_history(self.shop)
        turns: list[tuple[Callable[[random.Random], None], float]] = [
            (partial(self._produce, Shop(self.connect(autocommit=True))), 0.1),
            (partial(self._change_index, self.connect(autocommit=True)), 0.15),
            (self._backfill, 2.0),
        ]
        with ThreadPoolExecutor(len(turns)) as pool, ExitStack() as stack:
            workers = [self._hire() for _ in range(HANDS)]
            for _, hired in workers:
                stack.push(hired)
            running = [pool.submit(self._repeat, turn, pause, place) for place, (turn, pause) in enumerate(turns)]
            try:
                self._kill_until(time.monotonic() + seconds, workers, stack, running)
            finally:
                self.over.set()
            for each in running:
                each.result()
            for worker, _ in workers:
                worker.end_well()

    def _repeat(self, turn: Callable[[random.Random], None], pause: float, place: int) -> None:
        chance = random.Random(f"{self.seed} {place}")
        while not self.over.is_set():
            turn(chance)
            self.over.wait(chance.uniform(0, 2 * pause))

    def _hire(self) -> tuple[Process, ExitStack]:
        stack = ExitStack()
        worker = stack.enter_context(
            start("run", url=self.url, batch_size=BATCH, retry_base_seconds=0.1, log_level="WARNING")
        )
        return worker, stack

    def _kill_until(
        self, end: float, workers: list[tuple[Process, ExitStack]], stack: ExitStack, running: list[Future[None]]
    ) -> None:
        chance = random.Random(f"{self.seed} kills")
        while time.monotonic() < end and not any(each.done() for each in running):
            self.over.wait(min(chance.uniform(1, 5), max(0.0, end - time.monotonic())))
            victim, hired = workers.pop(chance.randrange(HANDS))
            victim.signal(signal.SIGKILL)
            assert victim.wait() == -signal.SIGKILL, victim.stderr
            hired.close()
            workers.append(self._hire())
            stack.push(workers[-1][1])
            self.counts["kills"] += 1

    def _produce(self, shop: Shop, chance: random.Random) -> None:
        """Write new pairs, one of them paid without an event. Write random events of young
        pairs."""
        if shop.count("outbox") >= BACKLOG:
            return
        forgotten, new = Pair(), [Pair(), Pair()]
        self._pay(shop, forgotten.payments["A"])
        forgotten.told.append(CONFIRM_A)
        self.forgotten.append(forgotten)
        self.pairs += [*self.forgotten[:-FORGOTTEN], *new]
        del self.forgotten[:-FORGOTTEN]
        young = self.pairs[-HOT:]
        tellings = [(pair, chance.choice(OPS)) for pair in chance.sample(young, min(len(young), BATCH))]
        tell(shop, tellings)
        self.counts["payments without an event"] += 1
        for _, op in tellings:
            self.counts[f"told {op.event_type}"] += 1

    def _pay(self, shop: Shop, payment: Payment) -> None:
        shop.payment("succeeded", payment.student_id, payment.course_id, id=payment.id)

    def _backfill(self, _: random.Random) -> None:
        """Run a backfill. If the overloaded machine cuts it off, a later call runs it again."""
        try:
            report = self.operator.run(max_repairs=10**6)
        except DBAPIError as error:
            if classify(error) not in (Failure.RECONNECT, Failure.RETRY):
                raise
            self.counts["backfills cut off"] += 1
            return
        self.counts["backfills"] += 1
        self.counts["purchases by backfills"] += len(report.made.purchases)

    def _change_index(self, connection: psycopg.Connection[Any], chance: random.Random) -> None:
        """Drop or build the index, with or without CONCURRENTLY, with one of the two forms of its
        predicate."""
        way = chance.choice(["", " CONCURRENTLY"])
        found = connection.execute("SELECT to_regclass(%s)", [INDEX]).fetchone()
        is_there = found is not None and found[0] is not None
        action = "DROP INDEX" if is_there else "CREATE UNIQUE INDEX"
        target = "" if is_there else f" ON purchases (student_id, course_id) WHERE {chance.choice(PREDICATES)}"
        connection.execute(_LOCK_TIMEOUT if not way else "SET lock_timeout = 0")
        try:
            connection.execute(f"{action}{way} {INDEX}{target}".encode())
        except psycopg.errors.UniqueViolation as error:
            self.doubled.append(str(error))
            self.counts["builds that met duplicates"] += 1
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            self.counts["changes that gave up"] += 1
        else:
            self.counts[f"{action}{way}"] += 1
        if chance.random() < 0.02:
            connection.execute("SET lock_timeout = 0")
            connection.execute("VACUUM ANALYZE outbox, purchases, payments, processed_events, workers")
            self.counts["vacuums"] += 1

    def told(self) -> str:
        """Return a text with the number of each action."""
        return f"seed {self.seed}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
