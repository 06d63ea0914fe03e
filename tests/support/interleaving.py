"""Runs two workers step by step. One worker stops before one of its statements, and the other
works."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from outbox_worker.database.engine import Database
from outbox_worker.decision import RetryPolicy
from outbox_worker.model import Outcome
from outbox_worker.telemetry.reporter import BatchReport
from tests.support.factories import Payment, ProbedProcessor, Shop, drain_all
from tests.support.watching import on_commit, on_statement

T = TypeVar("T")
PATIENCE = 20.0

AT_ONCE = RetryPolicy(max_attempts=10, base=timedelta(milliseconds=1), maximum=timedelta(milliseconds=1))
"""A postponed event is due again at once."""


class Brake:
    """Stops a worker just before its n-th statement, until ``released`` is set. The claim is the
    first statement, and COMMIT counts as one."""

    def __init__(self, database: Database, step: int) -> None:
        self._step, self._seen = step, 0
        self.reached, self.released = threading.Event(), threading.Event()
        self.statement = ""
        on_statement(database, self._before)
        on_commit(database, partial(self._count, "COMMIT"))

    def _before(self, statement: str) -> None:
        if not any(word in statement for word in ("set_config", "SAVEPOINT", "SET CONSTRAINTS")):
            self._count(statement)

    def _count(self, statement: str) -> None:
        self._seen += 1
        if self._seen == self._step:
            self.statement = statement
            self.reached.set()
            assert self.released.wait(PATIENCE), "never released"


@dataclass(frozen=True)
class Steps:
    """Stops the slow worker before its 1st, 2nd, … statement. Meanwhile the fast worker processes a
    batch."""

    shop: Shop
    fast: ProbedProcessor
    make_slow: Callable[[], ProbedProcessor]
    """Makes a processor with a Database of its own. ``through`` closes this Database after the
    step."""
    pool: ThreadPoolExecutor

    def through(
        self, prepare: Callable[[], T], meanwhile: Callable[[T], None] | None = None
    ) -> Iterator[tuple[T, str]]:
        """Yield for each step what ``prepare`` made, and the statement before which the slow worker
        stopped. The statement is "" if the worker did not stop.

        ``meanwhile`` runs while the slow worker is stopped. After both workers have processed a
        batch, the fast worker drains the rest. Only then does ``through`` yield.
        """
        for step in range(1, 40):
            made, slow = prepare(), self.make_slow()
            brake = Brake(slow.database, step)
            braked = self.pool.submit(slow.process_batch)
            poll(partial(_any_of, brake.reached.is_set, braked.done), "the statement, or the end")
            if meanwhile is not None:
                meanwhile(made)
            other = self.pool.submit(self.fast.process_batch)
            poll(partial(_any_of, other.done, self.shop.waiting), "the other worker is done or waits")
            brake.released.set()
            braked.result(PATIENCE), other.result(PATIENCE)
            drain_all(self.fast)
            yield made, brake.statement
            assert errors(slow) == {}, brake.statement
            slow.database.close()
            if not brake.reached.is_set():
                return
        raise AssertionError("a batch without end")


def _any_of(*hold: Callable[[], object]) -> bool:
    return any(holds() for holds in hold)


def poll(holds: Callable[[], Any], what: str) -> Any:
    deadline, turn = time.monotonic() + PATIENCE, threading.Event()
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        turn.wait(0.005)
    return found


def errors(*processors: ProbedProcessor) -> dict[str, float]:
    """Count the database errors of the processors, by class."""
    total: Counter[str] = Counter()
    for processor in processors:
        for name, value in processor.telemetry.metrics.snapshot().items():
            if name.startswith("outbox_database_errors_total") and value:
                total[name] += int(value)
    return dict(total)


def deadlocks(shop: Shop, *databases: Database) -> int:
    """Return the server's count of deadlocks. A session reports its counts only when it ends."""
    for database in databases:
        database.close()
    poll(lambda: not shop.sessions(), "sessions end")
    shop.rows("SELECT pg_stat_clear_snapshot()")
    return int(shop.scalar("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"))


def settle_all(processor: ProbedProcessor, shop_is_empty: Callable[[], bool]) -> Counter[Outcome]:
    """Process batches until the outbox is empty, like a claim loop. Later batches try rows and
    pairs again that others had locked."""
    outcomes: Counter[Outcome] = Counter()
    deadline = time.monotonic() + PATIENCE
    while not shop_is_empty():
        outcomes += processor.process_batch().outcomes()
        assert time.monotonic() < deadline, outcomes
    return outcomes


def run_together(pool: ThreadPoolExecutor, *processors: ProbedProcessor) -> list[BatchReport]:
    """Process one batch per processor. Each processor waits after its claim until all have
    claimed."""
    meeting = threading.Barrier(len(processors), timeout=PATIENCE)
    for processor in processors:
        processor.meeting = meeting
    batches = [pool.submit(processor.process_batch) for processor in processors]
    return [future.result(PATIENCE) for future in batches]


GATE = 4242


def stop_insert_of(shop: Shop, payment: Payment, moment: str, *, is_active: bool = True, gate: int = GATE) -> None:
    """Make the INSERT of this payment's purchase wait for the advisory lock ``gate``. ``moment`` is
    BEFORE (the row) or AFTER (all rows)."""
    shop.rows(
        f"""
        CREATE FUNCTION wait_at_{gate}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.payment_id = '{payment.id}' AND NEW.is_active = {is_active} THEN
                PERFORM pg_advisory_xact_lock({gate});
            END IF;
            RETURN NEW;
        END $$
        """
    )
    shop.rows(f"CREATE TRIGGER gate_{gate} {moment} INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION wait_at_{gate}()")


def waits_at(shop: Shop, gate: int) -> bool:
    """Return whether a session waits for this advisory lock."""
    return bool(shop.scalar(f"SELECT count(*) FROM pg_locks WHERE {_OF_US} AND objid = %s", gate))


def waits_beside(shop: Shop, gate: int) -> bool:
    """Return whether a session waits for a lock that is not this advisory lock."""
    beside = "(locktype <> 'advisory' OR objid <> %s)"
    return bool(shop.scalar(f"SELECT count(*) FROM pg_locks WHERE {_OF_US} AND {beside}", gate))


_OF_US = "NOT granted AND pid IN (SELECT pid FROM pg_stat_activity WHERE datname = current_database())"
