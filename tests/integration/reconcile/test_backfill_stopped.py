"""A backfill that is stopped in the middle: who continues it, and from which payment."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

import pytest

from outbox_worker.reconcile import owed as making
from tests.support.backfilling import Operator, always
from tests.support.factories import Shop, hold_pair
from tests.support.makers import Connect


class Killed(BaseException):
    """Stands for kill -9: the backfill writes nothing any more."""


def kill_after(transactions: int) -> Callable[..., bool]:
    told = [0]

    def tell(*_: float) -> bool:
        told[0] += 1
        if told[0] >= transactions:
            raise Killed
        return True

    return tell


@pytest.mark.usefixtures("both_guards")
def test_one_that_was_killed_is_continued(
    order: str, operator: Operator, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "CHUNK", 3)
    twice = [shop.payment(ago="2 days") for _ in range(10)]
    for each in twice[:4]:
        shop.payment(student=each.student_id, course=each.course_id, ago="1 day")
    work = operator.begin()
    work.look(always)
    with pytest.raises(Killed):
        work.make(kill_after(2))
    assert shop.count("purchases") == 6
    (run,) = shop.rows("SELECT * FROM backfill_runs")
    assert (run.finished_at, run.outcome, run.counts["made"]["count"]) == (None, None, 6)
    assert len(run.cursor) == (1 if order == "id" else 2)
    report = operator.run(actor="somebody else")
    assert report.continued is not None
    assert report.continued.id == run.id
    assert (report.counts.made.count, report.counts.looked_at, report.counts.owed.count) == (10, 14, 10)
    assert len(report.owed) == 4, "behind the cursor nothing is looked at twice"
    assert {row.payment_id for row in shop.purchases()} == {each.id for each in twice}
    assert shop.count("backfill_runs") == 1
    assert shop.scalar("SELECT counts -> 'left' ->> 'count' FROM backfill_runs") == "0"
    assert operator.run().continued is None


def test_one_that_was_killed_before_it_made_anything_begins_anew(operator: Operator, shop: Shop) -> None:
    shop.payment()
    with pytest.raises(Killed):
        operator.begin().look(kill_after(1))
    report = operator.run()
    assert report.continued is not None
    assert (report.counts.made.count, report.counts.looked_at) == (1, 1)


def test_another_range_is_another_backfill(operator: Operator, shop: Shop) -> None:
    shop.payment()
    operator.begin()
    assert operator.run(since=datetime(2020, 1, 1, tzinfo=UTC)).continued is None
    assert operator.run(dry_run=True).continued is None
    assert operator.run().continued is not None


def test_one_that_lives_is_left_alone(operator: Operator, shop: Shop) -> None:
    """A backfill on another host is alive, then silent for a minute, then silent for 25 hours.

    Another run continues it only in the second case.
    """
    shop.payment()
    operator.begin()
    shop.rows("UPDATE backfill_runs SET host = 'elsewhere'")
    assert operator.run(dry_run=False).continued is None
    shop.rows("DELETE FROM backfill_runs WHERE finished_at IS NOT NULL")
    shop.rows("UPDATE backfill_runs SET seen_at = clock_timestamp() - interval '61 seconds'")
    assert operator.run().continued is not None
    operator.begin()
    shop.rows("UPDATE backfill_runs SET seen_at = clock_timestamp() - interval '25 hours' WHERE finished_at IS NULL")
    assert operator.run().continued is None


def test_the_cursor_stays_before_a_pair_that_is_held(
    operator: Operator, shop: Shop, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a backfill that continues from the cursor would skip the locked pair."""
    monkeypatch.setattr(making, "CHUNK", 2)
    payments = sorted((shop.payment() for _ in range(6)), key=lambda each: each.id.int)
    other = connect()
    hold_pair(other, payments[2])
    work = operator.begin()
    work.look(always)
    with pytest.raises(Killed):
        work.make(kill_after(3))
    assert [UUID(each) for each in shop.scalar("SELECT cursor FROM backfill_runs")] == [payments[1].id]
    assert shop.count("purchases") == 5
    other.rollback()
    report = operator.run()
    assert (report.counts.made.count, report.counts.contended.count) == (6, 0)
    assert shop.count("purchases") == 6


def test_an_index_that_comes_or_goes_moves_nobody_s_cursor(
    operator: Operator, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "CHUNK", 2)
    for hours in range(6):
        shop.payment(ago=f"{hours} hours")
    work = operator.begin()
    work.look(always)
    with pytest.raises(Killed):
        work.make(kill_after(1))
    shop.rows("CREATE INDEX ON payments (created_at, id)")
    assert operator.run().counts.made.count == 6
