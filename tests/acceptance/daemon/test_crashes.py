"""An event that kills its process is buried after three crashes with only this event in hand.

The other events are settled, and none of them is charged.
"""

from __future__ import annotations

import signal
import threading
from uuid import UUID

import pytest

from tests.support.factories import Shop
from tests.support.processes import Process, eventually, finish, start, start_script

KILLER = """
import os, sys
from outbox_worker.settle.handlers import ConfirmedPurchases
apply = ConfirmedPurchases.apply
payment = sys.argv.pop(1)
def deadly(self, session, batch, footing):
    if payment in batch.payment_ids:
        os.abort()
    return apply(self, session, batch, footing)
ConfirmedPurchases.apply = deadly
from outbox_worker.__main__ import main
main()
"""
"""The real command. It aborts its process when it settles the event of one payment."""


class Supervisor:
    """Restarts its worker after each death, as systemd does."""

    def __init__(self, payment: UUID, url: str) -> None:
        self.deaths = 0
        self.restarts: list[Process] = []
        self._payment, self._url = payment, url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            settings = {"batch_size": 50, "retry_base_seconds": 0.2}
            with start_script(KILLER, str(self._payment), "run", url=self._url, **settings) as process:
                self.restarts.append(process)
                while process.popen.poll() is None and not self._over.wait(0.02):
                    pass
                if process.popen.poll() is not None:
                    self.deaths += process.wait() == -signal.SIGABRT

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize("workers", [1, 4])
def test_a_deadly_event_is_buried_and_its_neighbours_are_settled(workers: int, database_url: str, shop: Shop) -> None:
    before = [shop.paid(due_in="-2 hours")[1] for _ in range(20)]
    deadly, event = shop.paid(due_in="-1 hour")
    shop.mark(event)  # the event is judged, not settled by the fast statement
    shop.pay_many(200)
    crew = [Supervisor(deadly.id, database_url) for _ in range(workers)]
    for supervisor in crew:
        supervisor.__enter__()
    try:
        eventually(lambda: shop.count("dead_letters") == 1 and shop.count("outbox") == 0, "the burial", patience=90)
    finally:
        for supervisor in crew:
            supervisor.__exit__()
    letter = shop.letter_of(event)
    counted = [f"{deaths} workers died while handling the event" for deaths in range(3, 3 + workers)]
    assert letter.reason == "crashed_worker"
    assert letter.detail in counted, "three deaths bury it; others may have had it in hand when the third was counted"
    assert shop.count("purchases") == 220
    assert all(shop.outcome_of(each) == "created" for each in before)
    deaths = sum(supervisor.deaths for supervisor in crew)
    assert 4 <= deaths <= 3 + workers * 2, "once in a batch for each worker or two, then three times alone"
    careful = [r for s in crew for p in s.restarts for r in p.records if r.get("event") == "going_carefully"]
    assert 3 <= len(careful) <= deaths + workers - 1, "each restart, and whoever first starts after a death"


def test_normal_speed_returns_by_itself(database_url: str, shop: Shop) -> None:
    """The next worker takes the events of one batch one by one.

    Then it takes whole batches again.
    """
    shop.pay_many(10)
    with start("run", url=database_url) as fallen:
        fallen.wait_for("worker_started")
        fallen.kill()
    shop.pay_many(500)
    drained = finish("run", "--drain", url=database_url, batch_size=100, log_level="DEBUG")
    sizes = [record["claimed"] for record in drained.records if record.get("event") == "batch_committed"]
    assert drained.record("going_carefully")["events"] == 100
    assert sizes[:100] == [1] * 100
    assert 100 in sizes[100:]
    assert max(shop.rows("SELECT count(*) FROM outbox")[0]) == 0
    again = finish("run", "--drain", url=database_url)
    assert [record for record in again.records if record.get("event") == "going_carefully"] == []


def test_a_stop_is_no_death(database_url: str, shop: Shop) -> None:
    shop.pay_many(10)
    assert finish("run", "--drain", url=database_url).code == 0
    with start("run", url=database_url) as stopped:
        stopped.wait_for("worker_started")
        stopped.signal()
        assert stopped.wait() == 0
    with start("run", url=database_url) as lives, start("run", url=database_url) as other:
        lives.wait_for("worker_started")
        other.wait_for("worker_started")
        other.signal()
        other.wait()
        assert "going_carefully" not in lives.stderr + other.stderr
