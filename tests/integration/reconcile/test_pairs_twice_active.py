"""The audit lists pairs with two active purchases. It compares ids by the types of their columns.

A backfill makes one purchase for such a pair.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from outbox_worker.cli.views.audit import audit_object, next_steps, print_audit
from outbox_worker.database.engine import Database
from outbox_worker.database.planner import INDEX_PLANS, planned
from outbox_worker.diagnose.doctor.finding import Subject
from outbox_worker.diagnose.doctor.setup import guard, lock_key
from outbox_worker.diagnose.explanation import explain
from outbox_worker.reconcile import audit as audits
from outbox_worker.reconcile.audit import Audit
from outbox_worker.schema.requirements import check_schema, with_types_as_found
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.store import doubled
from outbox_worker.terminal import plain, print_json
from tests.support.backfilling import Operator
from tests.support.factories import Shop
from tests.support.guarding import without_index
from tests.support.makers import MakeDatabase
from tests.support.same_ids import KINDS, Kind, every_kind, pay, retype

SOME = [
    kind
    for kind in KINDS
    if kind.name in {"uuid", "numeric", "char", "citext elsewhere", "citext beside text", "loose"}
]
some_kinds = pytest.mark.parametrize("kind", SOME, ids=str)
GIFT = "INSERT INTO purchases (student_id, course_id, amount, currency) VALUES (%s, %s, 0, 'EUR') RETURNING id::text"


@without_index
@some_kinds
def test_a_pair_that_is_active_twice_is_listed(
    kind: Kind, guard_kind: str, shop: Shop, database: Database, tables: Tables, settings: Settings
) -> None:
    assert guard_kind == "lock"
    retype(shop, kind)
    shop.rows("ALTER TABLE purchases ALTER student_id DROP NOT NULL")
    ids = [shop.scalar(GIFT, student, "SQL") for student in (kind.one, kind.same)]
    for student in (kind.other, None, None):
        shop.rows(GIFT, student, "SQL")
    shop.rows(GIFT, kind.one, "another course")
    shop.rows(GIFT.replace(", currency", ", currency, is_active").replace("'EUR'", "'EUR', false"), kind.other, "SQL")
    report = Audit.start(database, tables).run()
    (pair,) = report.pairs_twice_active
    first, *_ = shop.rows("SELECT student_id::text FROM purchases WHERE id = %s", ids[0])
    assert (pair.student_id, pair.course_id, pair.purchases, pair.purchase_ids) == (first[0], "SQL", 2, ids)
    assert not report.ok
    assert next_steps(report) == [["why", ids[0]]]
    with database.transaction() as session:
        found = check_schema(session, tables)
        assert len(session.execute(doubled._doubled(found)).all()) == 1, "purchases without a student are no pair"
        told = explain(session, found, settings.retry_policy, None, ids[1])
        assert told.kinds == ["purchase"]
        assert len(explain(session, found, settings.retry_policy, None, kind.same).gifts) == 3


@pytest.mark.parametrize("json_wanted", [True, False], ids=["json", "terminal"])
@without_index
def test_what_the_command_says(
    json_wanted: bool,
    guard_kind: str,
    shop: Shop,
    database: Database,
    tables: Tables,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert guard_kind == "lock"
    payment = shop.payment()
    shop.purchase(payment)
    shop.purchase(None, *payment.pair)
    shop.purchase(None, *payment.pair)
    report = Audit.start(database, tables).run()
    if json_wanted:
        print_json(audit_object(report))
        (pair,) = json.loads(capsys.readouterr().out)["pairs_twice_active"]
        ids = pair.pop("purchase_ids")
        assert pair == {"student_id": str(payment.student_id), "course_id": str(payment.course_id), "purchases": 3}
        assert sorted(ids) == sorted(str(row.id) for row in shop.purchases())
        return
    print_audit(report, 100)
    said = capsys.readouterr().out
    assert "pairs twice active: deactivate all but one purchase of each" in said
    assert str(payment.student_id) in said
    assert "1 pair of student and course active twice." in " ".join(said.split())
    print_audit(report, 0)
    assert "… and 1 more pair active twice; use --limit N or --json to see more." in capsys.readouterr().out


@without_index
@some_kinds
def test_a_backfill_makes_one_purchase_of_a_pair(kind: Kind, guard_kind: str, shop: Shop, operator: Operator) -> None:
    """The backfill chooses payments in Python, where the texts of equal ids differ."""
    assert guard_kind == "lock"
    retype(shop, kind)
    oldest, _ = pay(shop, kind.one, confirmed=False)
    second, _ = pay(shop, kind.same, confirmed=False)
    pay(shop, kind.other, confirmed=False)
    report = operator.run()
    assert [each.payment_id for each in report.duplicates] == [second]
    assert len(report.owed) == len(report.made.created) == 2
    assert shop.scalar("SELECT count(*) FROM purchases WHERE payment_id = %s", oldest) == 1
    assert "pair" not in plain(report.owed[0])


def test_the_index_serves_the_search(shop: Shop, database: Database, tables: Tables) -> None:
    """The search reads purchases in the order of the pair's index.

    It needs no sort, no hash table and no row of the table.
    """
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, amount, currency)"
        " SELECT gen_random_uuid(), gen_random_uuid(), 1, 'EUR' FROM generate_series(1, 5000)"
    )
    shop.rows("VACUUM ANALYZE purchases")
    with database.transaction(**INDEX_PLANS) as session, planned(session, **doubled._BY_INDEX):
        statement = (
            doubled._doubled(tables).limit(1).compile(session.connection(), compile_kwargs={"literal_binds": True})
        )
        plan = session.scalar(text(f"EXPLAIN (FORMAT JSON) {statement}"))[0]["Plan"]
    kinds = []
    while plan:
        kinds.append(plan["Node Type"])
        plan = (plan.get("Plans") or [None])[0]
    assert kinds == ["Limit", "Aggregate", "Index Only Scan"]


def test_a_search_that_takes_long_is_repeated_with_more_time(
    shop: Shop, make_database: MakeDatabase, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database really cancels the first search."""
    tries = []
    find = doubled.doubled_pairs

    def slowly(session: Session, *given: Any) -> Any:
        tries.append(session.scalar(text("SHOW statement_timeout")))
        session.execute(text("SELECT pg_sleep(0.6)"))
        return find(session, *given)

    monkeypatch.setattr(audits, "doubled_pairs", slowly)
    shop.purchase(shop.payment())
    report = Audit.start(make_database(deadline_seconds=0.5), tables).run()
    assert report.ok
    assert tries == ["500ms", "1h"]


def test_amounts_are_summed_by_currency_whatever_its_spelling(shop: Shop, database: Database, tables: Tables) -> None:
    for table in ("payments", "purchases"):
        shop.rows(f"ALTER TABLE {table} ALTER currency TYPE text")
    for currency in ("EUR", "eur", " Eur  "):
        shop.purchase(shop.payment(currency=currency, amount="1.50"))
        shop.payment(currency=currency, amount="2.00")
    report = Audit.start(database, tables).run()
    assert {
        kind: {name: str(sum_) for name, sum_ in money.items()} for kind, money in report.money.items() if money
    } == {
        "active": {"EUR": "4.50"},
        "unexplained": {"EUR": "6.00"},
    }
    assert {each.currency for each in report.unexplained} == {"EUR"}


# --- doctor


def look(check: Any, database: Database, settings: Settings, tables: Tables) -> Any:
    with database.snapshot() as session:
        return list(check(Subject(session, settings, tables, database)))


@without_index
@every_kind
def test_the_doctor_prints_the_key_that_other_programs_must_use(
    kind: Kind, guard_kind: str, shop: Shop, database: Database, settings: Settings, tables: Tables
) -> None:
    """The printed statement works as it is. It takes the lock that the worker takes."""
    assert guard_kind == "lock"
    retype(shop, kind)
    payment, _ = pay(shop, kind.one)
    (found,) = look(lock_key, database, settings, tables)
    with database.transaction() as session:
        is_public = with_types_as_found(session, tables, ["payments", "purchases"]).ids.has_public_key
    assert (found.verdict, bool(found.remedy)) == ("ok", not is_public)
    if is_public:
        return
    assert shop.rows(found.remedy) == []
    with shop.connection.transaction():
        shop.rows(found.remedy.replace("00000000-0000-0000-0000-000000000000", str(payment)))
        locked = shop.scalar("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
    assert locked == 1


@pytest.mark.parametrize("kind", [each for each in KINDS if not each.is_indexed], ids=str)
def test_the_doctor_says_why_the_index_is_no_guard(
    kind: Kind, shop: Shop, database: Database, settings: Settings, tables: Tables
) -> None:
    """The remedy makes the index a guard."""
    retype(shop, kind)
    shop.rows(GIFT, kind.one, "SQL")
    (found,) = look(guard, database, settings, tables)
    assert found.verdict == "warning"
    assert "the types of payments treat more ids as equal" in found.evidence
    statement = found.remedy.removeprefix("as its owner: ").partition("; then")[0]
    shop.rows(statement)
    (found,) = look(guard, database, settings, tables)
    assert (found.verdict, found.evidence[:6]) == ("ok", "index:")
