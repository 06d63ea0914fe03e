"""Values that no statement can judge: the audit reports them and fails.

Events of other payments are settled.
"""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from outbox_worker import terminal
from outbox_worker.cli.views import audit as audit_view
from outbox_worker.cli.views import backfill as backfill_view
from outbox_worker.cli.views import explanation as why_view
from outbox_worker.database.engine import Database
from outbox_worker.diagnose.explanation import explain
from outbox_worker.model import Outcome, PaymentTotals
from outbox_worker.reconcile.audit import Audit, AuditReport
from outbox_worker.reconcile.duplicates import Duplicates
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.store.payment_classes import CANNOT_BE_JUDGED, PaymentClass
from tests.support.backfilling import Operator
from tests.support.factories import ProbedProcessor, Shop, drain_all
from tests.support.oddities import MISSING, UNFIT, let_be_null, odd_payment

ODD = {**UNFIT, **MISSING}


@pytest.fixture(autouse=True)
def nullable(shop: Shop) -> None:
    let_be_null(shop)


def audited(database: Database, tables: Tables) -> AuditReport:
    """Return the audit's report, and print both of its outputs."""
    report = Audit.start(database, tables).run()
    json.dumps(terminal.plain(audit_view.audit_object(report)), allow_nan=False)
    audit_view.print_audit(report, 10)
    return report


def test_each_is_told_by_every_command_and_its_neighbours_are_made(
    operator: Operator,
    database: Database,
    tables: Tables,
    settings: Settings,
    shop: Shop,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = {odd_payment(shop, *value).id: name for name, value in ODD.items()}
    sound = shop.payment(amount="10.00")
    report = operator.run()
    assert [each.payment_id for each in report.made.created] == [sound.id]
    assert {each.payment_id for each in report.cannot_be_judged} == odd.keys()
    assert (report.ok, report.counts.refused.count, report.counts.explained.count) == (False, 0, 0)
    json.dumps(terminal.plain(backfill_view.backfill_object(report)), allow_nan=False)
    backfill_view.print_backfill(report, 1000, 100)
    assert f"{len(odd)} payments cannot be judged" in capsys.readouterr().out
    audit = audited(database, tables)
    assert {each.payment_id for each in audit.cannot_be_judged} == odd.keys()
    assert all(each.reason for each in audit.cannot_be_judged)
    assert (audit.ok, audit.unexplained, audit.counts[PaymentClass.ACTIVE]) == (False, [], 1)
    assert audit.money[PaymentClass.ACTIVE] == {"EUR": Decimal("10.00")}
    assert f"{len(odd)} payments cannot be judged" in capsys.readouterr().out
    for key, name in odd.items():
        with database.snapshot() as session:
            found = explain(session, tables, settings.retry_policy, None, str(key))
        json.dumps(terminal.plain(why_view.explanation_object(found)), allow_nan=False)
        why_view.print_explanation(found)
        assert found.stories[0].kind == (CANNOT_BE_JUDGED if name != "future" else PaymentClass.UNEXPLAINED), name


@pytest.mark.parametrize("by_time", [False, True])
def test_a_time_after_the_range_is_not_out_of_sight(
    by_time: bool, operator: Operator, database: Database, tables: Tables, shop: Shop
) -> None:
    if by_time:
        shop.rows("ALTER TABLE payments ALTER COLUMN created_at SET NOT NULL")
        shop.rows("CREATE INDEX ON payments (created_at, id)")
    late = {odd_payment(shop, "created_at", each).id for each in ("infinity", "10000-01-01", "2999-01-01")}
    settled, (waiting, _) = shop.payment(), shop.paid()
    shop.purchase(settled)
    for explained in (settled, waiting):
        shop.rows("UPDATE payments SET created_at = '2999-01-01' WHERE id = %s", explained.id)
    assert {each.payment_id for each in audited(database, tables).cannot_be_judged} == late
    assert {each.payment_id for each in operator.run().cannot_be_judged} == late


@pytest.mark.parametrize("name", MISSING)
def test_what_has_its_purchase_needs_no_judgement(name: str, database: Database, tables: Tables, shop: Shop) -> None:
    """Each has its purchase: an erased student, a course without price, an import without dates."""
    payment = shop.payment()
    shop.purchase(payment)
    column, value = MISSING[name]
    shop.rows(f"UPDATE payments SET {column} = %s WHERE id = %s", value, payment.id)
    report = audited(database, tables)
    assert (report.ok, report.cannot_be_judged) == (True, [])
    assert sum(report.counts.values()) == report.counts[PaymentClass.ACTIVE] == (0 if report.dated_ahead else 1)


@pytest.mark.parametrize("name", UNFIT)
def test_an_amount_that_no_sum_can_hold_is_told_even_with_a_purchase(
    name: str, database: Database, tables: Tables, shop: Shop
) -> None:
    payment = odd_payment(shop, *UNFIT[name])
    shop.purchase(payment)
    shop.purchase(shop.payment(amount="5.00"))
    report = audited(database, tables)
    assert [each.payment_id for each in report.cannot_be_judged] == [payment.id]
    assert report.money[PaymentClass.ACTIVE] == {"EUR": Decimal("5.00")}


def test_a_payment_without_an_id(operator: Operator, database: Database, tables: Tables, shop: Shop) -> None:
    payment = shop.payment(ago="1 hour")
    shop.rows("ALTER TABLE payments DROP CONSTRAINT payments_pkey CASCADE, ALTER COLUMN id DROP NOT NULL")
    shop.rows("UPDATE payments SET id = NULL WHERE id = %s", payment.id)
    assert [each.reason for each in audited(database, tables).cannot_be_judged] == ["it has no id"]
    assert not operator.run().ok


@pytest.mark.parametrize("status", [None, "Succeeded", "", "charged back"])
def test_a_status_that_is_not_known_makes_the_audit_fail(
    status: str | None, database: Database, tables: Tables, shop: Shop
) -> None:
    for _ in range(2):
        shop.rows("UPDATE payments SET status = %s WHERE id = %s", status, shop.payment().id)
    shop.payment("pending")
    report = audited(database, tables)
    assert (report.ok, report.unknown_statuses) == (False, {"NULL" if status is None else status: 2})


@pytest.mark.parametrize("column", ["amount", "currency"])
def test_a_duplicate_without_a_value_is_listed(column: str, database: Database, tables: Tables, shop: Shop) -> None:
    first = shop.payment()
    shop.purchase(first)
    again = shop.payment(student=first.student_id, course=first.course_id)
    shop.rows(f"UPDATE payments SET {column} = NULL WHERE id = %s", again.id)
    shop.rows("UPDATE purchases SET created_at = 'infinity'")
    (found,) = Duplicates.start(database, tables).list()
    assert (found.payment.payment_id, found.held_since) == (again.id, None)
    assert PaymentTotals.of([found.payment]).count == 1


def test_a_refunded_payment_without_an_amount(database: Database, tables: Tables, shop: Shop) -> None:
    payment = shop.payment("refunded")
    shop.purchase(payment)
    shop.rows("UPDATE payments SET amount = NULL, currency = NULL")
    assert [each.payment_id for each in audited(database, tables).refunded_but_active] == [payment.id]


@pytest.mark.parametrize("column", ["student_id", "course_id"])
@pytest.mark.usefixtures("both_guards")
def test_nobody_gets_a_purchase_for_nobody(
    column: str, processor: ProbedProcessor, database: Database, tables: Tables, shop: Shop
) -> None:
    """The column of purchases accepts NULL in this test.

    Only the event of the erased payment is refused.
    """
    erased, _ = shop.paid(payload={"student_id": None, "course_id": None})
    shop.rows(f"UPDATE payments SET {column} = NULL WHERE id = %s", erased.id)
    sound, _ = shop.paid()
    shop.rows("UPDATE outbox SET attempts = 9")
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DEAD: 1}
    assert [row.payment_id for row in shop.purchases()] == [sound.id]
    assert shop.scalar("SELECT reason || ': ' || detail FROM dead_letters") == (
        "rejected_by_database: the payment names no student or no course"
    )
    assert [each.payment_id for each in audited(database, tables).cannot_be_judged] == [erased.id]


def test_an_heir_that_cannot_be_judged_inherits_nothing(processor: ProbedProcessor, shop: Shop) -> None:
    first, _ = shop.paid()
    drain_all(processor)
    heir = shop.payment(student=first.student_id, course=first.course_id)
    shop.rows("UPDATE payments SET amount = 'NaN' WHERE id = %s", heir.id)
    shop.refund(first)
    assert drain_all(processor) == {Outcome.REVOKED: 1}
    assert [row.is_active for row in shop.purchases()] == [False]


@pytest.mark.parametrize("column", ["student_id", "course_id", "amount", "currency"])
@pytest.mark.parametrize("is_bought", [True, False])
def test_the_refund_of_an_erased_payment(column: str, is_bought: bool, processor: ProbedProcessor, shop: Shop) -> None:
    """The purchase keeps what was erased from the payment.

    If a column of purchases is NOT NULL, PostgreSQL refuses NULL even before ON CONFLICT.
    """
    shop.rows(f"ALTER TABLE purchases ALTER COLUMN {column} SET NOT NULL")
    payment = shop.payment()
    if is_bought:
        shop.purchase(payment)
    shop.rows(f"UPDATE payments SET {column} = NULL WHERE id = %s", payment.id)
    event = shop.refund(payment, payload={column: None}, attempts=9)
    assert drain_all(processor) == {Outcome.REVOKED if is_bought else Outcome.DEAD: 1}
    assert [row.is_active for row in shop.purchases()] == ([False] if is_bought else [])
    assert (shop.outcome_of(event) == "revoked") == is_bought
