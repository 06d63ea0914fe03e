"""Only the oldest unexplained payment of a pair is owed the purchase, in whatever range."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from outbox_worker.cli.views import backfill as view
from outbox_worker.reconcile import owed as making
from tests.support.backfilling import Operator, always
from tests.support.factories import Payment, Shop


def two_days_ago() -> datetime:
    return datetime.now(UTC) - timedelta(days=2)


def younger_of(shop: Shop, older: Payment, ago: str = "1 day") -> Payment:
    return shop.payment(student=older.student_id, course=older.course_id, ago=ago)


@pytest.mark.usefixtures("both_guards", "order")
@pytest.mark.parametrize("dry_run", [True, False])
def test_the_younger_gets_nothing_while_the_older_lies_outside(
    dry_run: bool, operator: Operator, shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    older = shop.payment(ago="10 days")
    younger, alone = younger_of(shop, older), shop.payment(ago="1 day")
    report = operator.run(since=two_days_ago(), dry_run=dry_run)
    assert [each.payment_id for each in report.withheld] == [younger.id]
    assert [each.payment_id for each in report.owed] == [alone.id]
    assert (report.ok, report.counts.withheld.count, report.counts.owed.count) == (True, 1, 1)
    assert [row.payment_id for row in shop.purchases()] == ([] if dry_run else [alone.id])
    assert view.backfill_object(report)["withheld"] == report.withheld
    view.print_backfill(report, 1000, 100)
    assert "an older payment of the pair lies outside the range" in capsys.readouterr().out
    whole = operator.run()
    assert [row.payment_id for row in shop.purchases(older.pair)] == [older.id]
    assert whole.withheld == []


def revoke(shop: Shop, older: Payment) -> None:
    shop.purchase(older, active=False)


def confirm(shop: Shop, older: Payment) -> None:
    shop.confirm(older)


def refund(shop: Shop, older: Payment) -> None:
    shop.set_status(older, "refunded")


@pytest.mark.parametrize("explained", [revoke, confirm, refund])
def test_an_older_one_that_is_explained_withholds_nothing(
    explained: Callable[[Shop, Payment], None], operator: Operator, shop: Shop
) -> None:
    older = shop.payment(ago="10 days")
    explained(shop, older)
    younger = younger_of(shop, older)
    assert [each.payment_id for each in operator.run(since=two_days_ago()).made.created] == [younger.id]


@pytest.mark.parametrize("asked", [{"until": datetime.now(UTC) - timedelta(days=2)}, {"older_than": timedelta(days=2)}])
def test_a_younger_one_outside_withholds_nothing(asked: dict[str, object], operator: Operator, shop: Shop) -> None:
    older = shop.payment(ago="10 days")
    younger_of(shop, older)
    report = operator.run(**asked)
    assert ([each.payment_id for each in report.made.created], report.withheld) == ([older.id], [])


@pytest.mark.usefixtures("both_guards")
def test_one_that_becomes_visible_after_the_scan(operator: Operator, shop: Shop) -> None:
    """The backfill searches again for older payments under the lock of the pair."""
    work = operator.begin(since=two_days_ago())
    younger = shop.payment(ago="1 day")
    work = operator.begin(since=two_days_ago())
    assert work.look(always) == 1
    shop.payment(student=younger.student_id, course=younger.course_id, ago="10 days")
    report = work.make(always)
    assert ([each.payment_id for each in report.withheld], report.made.created) == ([younger.id], [])
    assert shop.count("purchases") == 0
    assert shop.scalar("SELECT counts -> 'left' ->> 'count' FROM backfill_runs ORDER BY started_at DESC LIMIT 1") == "1"


class Killed(BaseException):
    """Stands for kill -9: the backfill writes nothing any more."""


def test_a_continued_backfill_does_not_grant_the_younger(
    operator: Operator, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database refused the older payment. Then the backfill was killed after that payment."""
    monkeypatch.setattr(making, "CHUNK", 1)
    shop.rows("CREATE INDEX ON payments (created_at, id)")
    older = shop.payment(ago="10 days", amount="13.00")
    shop.payment(ago="9 days")
    shop.rows("ALTER TABLE purchases ADD CONSTRAINT unlucky CHECK (amount <> 13)")
    younger = younger_of(shop, older)
    work = operator.begin()
    work.look(always)

    def kill(*_: float) -> bool:
        if shop.count("purchases"):
            raise Killed
        return True

    with pytest.raises(Killed):
        work.make(kill)
    report = operator.run()
    assert report.continued is not None
    assert [each.payment_id for each in report.withheld] == [younger.id]
    assert shop.purchases(older.pair) == []


def test_a_dry_run_needs_no_privilege_to_insert(
    operator: Operator, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = shop.payment(ago="10 days")
    younger_of(shop, older)
    shop.rows("GRANT SELECT ON ALL TABLES IN SCHEMA public TO pg_monitor")
    limits = operator.database._limits
    monkeypatch.setattr(operator.database, "_limits", lambda: limits() | {"role": "pg_monitor"})
    assert operator.run(since=two_days_ago(), dry_run=True).counts.withheld.count == 1
