"""A storm: confirmations, refunds and second payments, changes of the index, backfills and kills, all at once."""

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
"""So many pairs, the youngest, are told of again and again."""
FORGOTTEN = 40
"""So many payments without an event wait for a backfill before their pair is told of."""
INDEX = "storm_guard"
PREDICATES = ("is_active", "(is_active = true)")
_LOCK_TIMEOUT = "SET lock_timeout = '2s'"
"""A plain change of the index gives up before those that queue behind it do."""


@dataclass
class Storm:
    """What happens is chosen by ``seed``; what it meets is not."""

    url: str
    shop: Shop
    connect: Connect
    operator: Operator
    seed: int
    pairs: list[Pair] = field(default_factory=list)
    forgotten: list[Pair] = field(default_factory=list)
    """Pairs that were paid for without an event. After a while they are told of like the others."""
    counts: Counter[str] = field(default_factory=Counter)
    over: threading.Event = field(default_factory=threading.Event)
    doubled: list[str] = field(default_factory=list)
    """What builds of the index said of pairs that were active twice."""

    def rage(self, seconds: float) -> None:
        """Let everybody do their worst for so long. Raises what stopped one of them."""
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
        """New pairs, one of them paid without an event; and of young ones what comes: paid, paid twice, refunded."""
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
        """Run a backfill. One that the starved machine cuts off is run again later, as an operator would."""
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
        """Drop the index, or build it; either with and without CONCURRENTLY, and by either form of its predicate."""
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
        """What happened, and how often."""
        return f"seed {self.seed}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
