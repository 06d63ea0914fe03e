"""Every payment is put in one class.

The statements have a time limit and plans that ignore statistics.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from outbox_worker.database.engine import Database
from outbox_worker.database.statements import Statement
from outbox_worker.reconcile import scan
from outbox_worker.reconcile.audit import Audit
from outbox_worker.reconcile.scan import PaymentScan, ScanLimits, ScanPaths, ScanRange, plans
from outbox_worker.schema.tables import Tables
from outbox_worker.store.payment_classes import PaymentClass, page_statement, portion_statement
from tests.support.factories import Payment, Shop
from tests.support.makers import MakeDatabase

BY_TIME = "CREATE INDEX ON payments (created_at, id)"


@pytest.fixture(params=["id", "created_at"])
def order(request: pytest.FixtureRequest, shop: Shop) -> str:
    """Read by the primary key, and by time if an index serves that order."""
    if request.param == "created_at":
        shop.rows(BY_TIME)
    return str(request.param)


def always(*_: float) -> bool:
    return True


def far_away() -> datetime:
    return datetime.now(UTC) + timedelta(days=1)


def begin_scan(
    database: Database, tables: Tables, span: ScanRange, lists: int | None = None, **limits: int
) -> PaymentScan:
    with database.transaction() as session:
        paths = ScanPaths.read(session, tables)
    return PaymentScan(database, tables, paths, span, limits=ScanLimits(**limits), lists=lists)


def one_of_each(shop: Shop, ago: str = "0 seconds") -> dict[str, Payment]:
    """Write one payment of every class, and some payments that did not succeed."""
    found = {
        name: shop.payment(ago=ago) for name in ("active", "revoked", "unexplained", "dead", "waived", "in_flight")
    }
    shop.purchase(found["active"])
    shop.purchase(found["revoked"], active=False)
    found["duplicate"] = shop.payment(student=found["active"].student_id, course=found["active"].course_id, ago=ago)
    shop.confirm(found["in_flight"], payload={"payment_id": str(found["in_flight"].id).upper()}, due_in="1 hour")
    shop.dead_letter(found["dead"], reason="payment_mismatch")
    waived = shop.dead_letter(found["waived"], state="discarded", reason="payment_mismatch")
    shop.rows("UPDATE dead_letters SET note = 'a gift' WHERE event_id = %s", waived)
    for status in ("pending", "failed", "refunded"):
        shop.payment(status=status, ago=ago)
    return found


@pytest.mark.usefixtures("both_guards")
def test_each_is_of_its_class(order: str, database: Database, tables: Tables, shop: Shop) -> None:
    """Read ten payments of each class in pages of two. No payment is left out or counted twice."""
    kinds = [one_of_each(shop, ago="0 seconds" if turn % 2 else "2 hours") for turn in range(10)]
    looked = begin_scan(database, tables, ScanRange(None, far_away()), page_max=2)
    assert looked.order == (("id",) if order == "id" else ("created_at", "id"))
    assert looked.run(always)
    assert looked.totals.counts == dict.fromkeys(PaymentClass, 10)
    assert {str(money) for each in looked.totals.money.values() for money in each.values()} == {"499.00"}
    assert looked.totals.passed == shop.count("payments") == 100
    assert {each.payment_id for each in looked.totals.unexplained} == {each["unexplained"].id for each in kinds}


@pytest.mark.parametrize("payments", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("page", [1, 2, 4])
def test_pages_fit_together(
    order: str, payments: int, page: int, database: Database, tables: Tables, shop: Shop
) -> None:
    """Some payments were created at the same moment."""
    for _ in range(payments):
        shop.payment()
    shop.rows("UPDATE payments SET created_at = '2026-01-01'")
    looked = begin_scan(database, tables, ScanRange(None, far_away()), page_max=page)
    assert (looked.run(always), looked.order[0]) == (True, order)
    assert (looked.totals.passed, looked.totals.counts[PaymentClass.UNEXPLAINED]) == (payments, payments)
    assert len({each.payment_id for each in looked.totals.unexplained}) == payments


def test_a_sweep_goes_on_behind_a_place(order: str, database: Database, tables: Tables, shop: Shop) -> None:
    for turn in range(9):
        shop.payment(ago=f"{turn} hours")
    span = ScanRange(None, far_away())
    whole = begin_scan(database, tables, span)
    whole.run(always)
    found = sorted(whole.totals.unexplained, key=lambda each: tuple(whole.cursor_of(each)))
    if order == "created_at":
        assert found == sorted(found, key=lambda each: each.age)
    rest = begin_scan(database, tables, span, page_max=2)
    rest.run(always, whole.cursor_of(found[3]))
    assert {each.payment_id for each in rest.totals.unexplained} == {each.payment_id for each in found[4:]}


def test_a_span_begins_with_since_and_ends_before(order: str, database: Database, tables: Tables, shop: Shop) -> None:
    for moment in ("09:59:59.999999", "10:00:00", "10:59:59.999999", "11:00:00"):
        shop.rows("UPDATE payments SET created_at = %s WHERE id = %s", f"2026-05-01 {moment}+00", shop.payment().id)
    at = datetime(2026, 5, 1, 10, tzinfo=UTC)
    looked = begin_scan(database, tables, ScanRange(at, at + timedelta(hours=1)))
    looked.run(always)
    assert sorted(each.created_at.microsecond for each in looked.totals.unexplained if each.created_at) == [0, 999999]
    assert looked.totals.recent.count == 2
    assert looked.totals.passed == (4 if order == "id" else 2), "an index on the time spares the others"


def test_times_that_no_client_reads(order: str, database: Database, tables: Tables, shop: Shop) -> None:
    for moment in ("-infinity", "4000-01-01 BC", "infinity"):
        shop.rows("UPDATE payments SET created_at = %s WHERE id = %s", moment, shop.payment().id)
    looked = begin_scan(database, tables, ScanRange(None, far_away()), page_max=1)
    looked.run(always)
    assert looked.order[0] == order
    assert [each.created_at for each in looked.totals.cannot_be_judged] == [None, None]
    assert looked.totals.unexplained == []


def test_payments_that_come_later_are_not_judged(database: Database, tables: Tables, shop: Shop) -> None:
    shop.payment()
    audit = Audit.start(database, tables)
    shop.payment()
    assert len(audit.run().unexplained) == 1
    assert len(Audit.start(database, tables).run().unexplained) == 2


def test_an_explained_page_does_not_touch_the_outbox(
    database: Database, tables: Tables, shop: Shop, connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """Another session has locked the outbox.

    The scan reads the outbox only if no purchase explains a payment.
    """
    shop.pay_many(300)
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT student_id, course_id, id, amount, currency FROM payments"
    )
    other = connect()
    other.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
    looked = begin_scan(database, tables, ScanRange(None, far_away()))
    assert looked.run(always)
    assert looked.totals.counts[PaymentClass.ACTIVE] == 300
    shop.payment()
    with pytest.raises(Exception, match="lock timeout"):
        begin_scan(database, tables, ScanRange(None, far_away())).run(always)


# --- plans


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def executed(database: Database, statement: Statement, values: dict[str, Any], by_index: bool = True) -> list[Any]:
    """Return the nodes of a plan after its execution."""
    given = {"since": None, "before": "infinity", **values}
    explain = copy.copy(statement)
    explain._rendered = statement._rendered._replace(sql=f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}")
    with database.transaction(**plans(by_index)) as session:
        found = explain.execute(session, given).scalar()
    (plan,) = json.loads(found) if isinstance(found, str) else found or []
    return list(nodes(plan["Plan"]))


def scans(found: list[Any], relation: str) -> list[Any]:
    return [node for node in found if node.get("Relation Name") == relation and node["Actual Loops"]]


def grown_behind_its_statistics(shop: Shop, n: int) -> None:
    """Analyze empty tables.

    Then write ``n`` payments: a third is active, all others are in flight.
    """
    shop.rows("ANALYZE payments, outbox, purchases, dead_letters")
    shop.rows("ALTER TABLE payments SET (autovacuum_enabled = off)")
    shop.rows("ALTER TABLE outbox SET (autovacuum_enabled = off)")
    shop.rows("ALTER TABLE purchases SET (autovacuum_enabled = off)")
    shop.pay_many(n)
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT student_id, course_id, id, amount, currency FROM payments LIMIT %s",
        n // 3,
    )


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("fresh_statistics", [True, False])
def test_a_page_goes_through_indexes(
    order: str, fresh_statistics: bool, make_database: MakeDatabase, tables: Tables, shop: Shop
) -> None:
    grown_behind_its_statistics(shop, 30_000)
    if fresh_statistics:
        shop.rows("ANALYZE")
    keys = ("id",) if order == "id" else ("created_at", "id")
    for page in (50, 5_000):
        statement = Statement(page_statement(tables, keys, by_index=True, is_first=True))
        found = executed(make_database(deadline_seconds=60), statement, {"limit": page})
        assert {node["Node Type"] for node in scans(found, "payments")} <= {"Index Scan", "Index Only Scan"}
        assert {node["Node Type"] for node in scans(found, "purchases")} <= {"Index Scan", "Index Only Scan"}
        assert all(node["Actual Rows"] <= page for node in scans(found, "payments"))
        assert scans(found, "outbox") == []


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("fresh_statistics", [True, False])
def test_a_portion_scans_the_outbox_once(
    fresh_statistics: bool, make_database: MakeDatabase, tables: Tables, shop: Shop
) -> None:
    grown_behind_its_statistics(shop, 30_000)
    if fresh_statistics:
        shop.rows("ANALYZE")
    ids = [str(row.id) for row in shop.rows("SELECT id FROM payments LIMIT 5000")]
    statement = Statement(portion_statement(tables, by_index=True))
    found = executed(make_database(deadline_seconds=60), statement, {"ids": ids, "lists": True})
    (outbox,) = scans(found, "outbox")
    assert outbox["Actual Loops"] == 1
    assert not [node for node in found if node["Node Type"] == "Nested Loop" and "outbox" in str(node)]
    assert {node["Node Type"] for node in scans(found, "payments")} <= {"Index Scan"}
    assert {node["Node Type"] for node in scans(found, "purchases")} <= {"Index Scan", "Index Only Scan"}


def test_without_indexes_tables_are_hashed_not_read_per_payment(
    make_database: MakeDatabase, tables: Tables, shop: Shop
) -> None:
    shop.rows("ALTER TABLE purchases DROP CONSTRAINT purchases_payment_id_key")
    shop.rows("DROP INDEX purchases_active_student_course_key")
    grown_behind_its_statistics(shop, 3_000)
    shop.rows("ANALYZE")
    statement = Statement(page_statement(tables, ("id",), by_index=False, is_first=True))
    found = executed(make_database(deadline_seconds=60), statement, {"limit": 3_000}, by_index=False)
    assert all(node["Actual Loops"] == 1 for node in scans(found, "purchases"))
    looked = begin_scan(make_database(deadline_seconds=60), tables, ScanRange(None, far_away()))
    looked.run(always)
    assert (looked.totals.counts[PaymentClass.ACTIVE], looked.totals.counts[PaymentClass.IN_FLIGHT]) == (1000, 2000)


# --- time


def make_slow(shop: Shop, milliseconds: int) -> None:
    """Replace payments by a view that needs some time for every row."""
    shop.rows("ALTER TABLE payments RENAME TO payments_of_old")
    shop.rows(
        "CREATE FUNCTION slowly(given text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS"
        f" $$ BEGIN PERFORM pg_sleep({milliseconds / 1000}); RETURN given; END $$"
    )
    shop.rows(
        "CREATE VIEW payments AS SELECT id, student_id, course_id, amount, currency, created_at, updated_at,"
        " slowly(status) AS status FROM payments_of_old"
    )


def test_a_statement_that_takes_too_long_is_repeated_with_half_as_much(
    make_database: MakeDatabase, tables: Tables, shop: Shop
) -> None:
    shop.pay_many(300)
    make_slow(shop, 5)
    looked = begin_scan(make_database(deadline_seconds=0.8), tables, ScanRange(None, far_away()))
    sizes: list[int] = []
    assert looked.run(lambda passed, _: not sizes.append(passed))  # type: ignore[func-returns-value]
    assert looked.totals.counts[PaymentClass.IN_FLIGHT] == 300
    assert looked.totals.passed == 300
    assert len(sizes) > 4


def test_what_is_too_slow_alone_is_an_error(
    make_database: MakeDatabase, tables: Tables, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "LEAST", 2)
    shop.pay_many(5)
    make_slow(shop, 500)
    with pytest.raises(Exception, match="statement timeout"):
        begin_scan(make_database(deadline_seconds=0.3), tables, ScanRange(None, far_away()), page_max=4).run(always)


def test_a_page_follows_its_time() -> None:
    grown = scan._fitting(1000, 100.0, 50_000)
    assert grown == 2000
    assert scan._fitting(1000, 0.5, 50_000) == 500
    assert scan._fitting(1000, 0.0001, 50_000) == scan.LEAST
    assert scan._fitting(40_000, 10.0, 50_000) == 50_000
    assert scan._fitting(3, 10.0, 4) == 4


def test_a_sweep_ends_when_it_is_told_to(database: Database, tables: Tables, shop: Shop) -> None:
    shop.pay_many(10)
    looked = begin_scan(database, tables, ScanRange(None, far_away()), page_max=2)
    assert not looked.run(lambda passed, _: passed < 4)
    assert looked.totals.passed == 4


def test_the_list_is_bounded_where_that_is_wished(
    database: Database, tables: Tables, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(30):
        shop.payment()
    monkeypatch.setattr(scan, "PAGE_FIRST", 5)
    looked = begin_scan(database, tables, ScanRange(None, far_away()), lists=7, page_max=5, portion=5)
    looked.run(always)
    assert looked.totals.counts[PaymentClass.UNEXPLAINED] == 30
    assert 7 < len(looked.totals.unexplained) < 30
    assert looked.totals.value(PaymentClass.UNEXPLAINED).written() == {"count": 30, "money": {"EUR": "1497.00"}}


def test_the_estimate_is_about_right(order: str, database: Database, tables: Tables, shop: Shop) -> None:
    shop.pay_many(1000)
    shop.rows("ANALYZE payments")
    looked = begin_scan(database, tables, ScanRange(None, far_away()))
    assert looked.order[0] == order
    assert looked.estimate() == pytest.approx(1000, rel=0.1)
