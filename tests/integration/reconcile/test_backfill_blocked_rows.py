"""A row that is locked, or that a trigger swallows, affects its own payment and no other."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from outbox_worker.cli.common import in_a_sentence
from outbox_worker.database.engine import Database
from outbox_worker.errors import NothingWritten
from outbox_worker.reconcile import backfill as by_hand
from outbox_worker.reconcile import owed as making
from outbox_worker.reconcile.audit import Audit
from outbox_worker.reconcile.owed import NOT_WRITTEN
from outbox_worker.schema.tables import Tables
from tests.support.backfilling import Operator, always
from tests.support.factories import Shop
from tests.support.makers import Connect

SWALLOW = """
CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN IF {} THEN RETURN NULL; END IF; RETURN NEW; END $$
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_hand, "ROUNDS", 1)
    monkeypatch.setattr(by_hand, "_ROUND_SECONDS", 0)
    monkeypatch.setattr(making, "_LOCK_SECONDS", 0.05)


def with_students(shop: Shop) -> None:
    shop.rows("CREATE TABLE students (id uuid PRIMARY KEY)")
    shop.rows("INSERT INTO students SELECT student_id FROM payments")
    shop.rows("ALTER TABLE purchases ADD FOREIGN KEY (student_id) REFERENCES students (id)")


@pytest.mark.usefixtures("both_guards")
def test_a_row_that_stays_locked_is_contended_and_all_others_are_made(
    operator: Operator, shop: Shop, connect: Connect
) -> None:
    paid, other = [shop.payment() for _ in range(7)], connect()
    with_students(shop)
    other.execute("SELECT FROM students WHERE id = %s FOR UPDATE", [paid[2].student_id])
    report = operator.run()
    assert [each.payment_id for each in report.made.contended] == [paid[2].id]
    assert (report.counts.made.count, report.counts.refused.count, report.ok) == (6, 0, False)
    assert shop.scalar("SELECT counts -> 'left' ->> 'count' FROM backfill_runs") == "1"
    other.rollback()
    assert operator.run().ok
    assert shop.count("purchases") == 7


def test_a_row_that_is_unlocked_meanwhile_is_made(operator: Operator, shop: Shop, connect: Connect) -> None:
    paid, other = [shop.payment() for _ in range(3)], connect()
    with_students(shop)
    other.execute("SELECT FROM students WHERE id = %s FOR UPDATE", [paid[0].student_id])
    work = operator.begin()
    work.look(always)
    told: list[int] = []

    def let_go(*_: float) -> bool:
        told.append(1)
        if len(told) == 2:
            other.rollback()
        return True

    report = work.make(let_go)
    assert (report.counts.made.count, report.ok) == (3, True)


def test_a_whole_table_that_is_locked_is_not_waited_for_row_by_row(
    operator: Operator, shop: Shop, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "_BLOCKED_IN_A_ROW", 2)
    monkeypatch.setattr(making, "CHUNK", 8)
    transactions: list[int] = []
    inner = making.OwedPurchases._transact

    def counted(self: Any, part: Any, *given: Any) -> Any:
        transactions.append(len(part))
        return inner(self, part, *given)

    monkeypatch.setattr(making.OwedPurchases, "_transact", counted)
    for _ in range(24):
        shop.payment()
    other = connect()
    other.execute("LOCK TABLE processed_events IN SHARE MODE")
    report = operator.run()
    assert (report.counts.contended.count, report.counts.made.count) == (24, 0)
    once = [8, 4, 2, 1, 1, 2, 4, 8, 8]
    assert transactions == once * 2, "the list, and one round more"


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("table", ["purchases", "processed_events"])
def test_what_a_trigger_swallows_is_refused(
    table: str, operator: Operator, database: Database, tables: Tables, shop: Shop
) -> None:
    odd, *sound = [shop.payment() for _ in range(4)]
    shop.rows(SWALLOW.format(f"NEW.payment_id = '{odd.id}'"))
    shop.rows(f"CREATE TRIGGER swallow BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION swallow()")
    report = operator.run()
    assert [(each.payment.payment_id, each.detail) for each in report.made.refused] == [(odd.id, NOT_WRITTEN)]
    assert (report.counts.made.count, report.counts.explained.count, report.ok) == (len(sound), 0, False)
    assert [each.payment_id for each in Audit.start(database, tables).run().unexplained] == [odd.id]
    assert shop.scalar("SELECT counts -> 'left' ->> 'count' FROM backfill_runs") == "1"


@pytest.mark.parametrize("what", ["INSERT", "UPDATE"])
def test_a_run_that_cannot_be_recorded_ends_with_a_sentence(what: str, operator: Operator, shop: Shop) -> None:
    shop.payment()
    shop.rows(SWALLOW.format("true"))
    shop.rows(f"CREATE TRIGGER swallow BEFORE {what} ON backfill_runs FOR EACH ROW EXECUTE FUNCTION swallow()")
    with pytest.raises(NothingWritten, match="backfill_runs was not written"):
        operator.run()
    assert shop.count("purchases") == 0


def test_a_run_that_somebody_deletes(operator: Operator, shop: Shop) -> None:
    shop.payment()
    work = operator.begin()
    shop.rows("DELETE FROM backfill_runs")
    with pytest.raises(NothingWritten):
        work.look(always)


@pytest.mark.parametrize(
    ("cause", "code", "said"),
    [
        ("SET LOCAL lock_timeout = '20ms'; LOCK TABLE held", 69, "holds a lock"),
        ("SET LOCAL statement_timeout = '20ms'; SELECT pg_sleep(1)", 69, "took longer"),
        ("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40P01'; END $$", 69, "waited for each other's locks"),
        ("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$", 69, "changed the same rows"),
        ("SET TRANSACTION READ ONLY; DELETE FROM payments", 69, "accepts no writes"),
        ("SET ROLE pg_monitor; DELETE FROM payments", 78, "permission denied"),
        ("SELECT 1 / 0", 1, "SQLSTATE 22012"),
        ("SELECT pg_terminate_backend(pg_backend_pid())", 69, "No connection to the database"),
    ],
)
def test_a_sentence_names_its_cause(
    cause: str, code: int, said: str, database: Database, shop: Shop, connect: Connect
) -> None:
    shop.rows("CREATE TABLE held ()")
    other = connect()
    other.execute("LOCK TABLE held")
    with pytest.raises(DBAPIError) as failed, database.transaction() as session:
        session.connection().exec_driver_sql(cause)
    sentence = in_a_sentence(failed.value)
    assert (sentence.exit_code, said in str(sentence)) == (code, True), sentence
    assert ("onnection" in str(sentence)) == (said == "No connection to the database")
