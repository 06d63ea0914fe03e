"""Columns of adopted tables that can be NULL: each is reported with statements that work."""

from __future__ import annotations

import re
from typing import Any

import pytest

from outbox_worker.cli.views.status import print_status, status_object
from outbox_worker.daemon.worker import Worker
from outbox_worker.database.engine import Database
from outbox_worker.diagnose.doctor.finding import Severity
from outbox_worker.diagnose.doctor.report import examine
from outbox_worker.diagnose.status import read_status
from outbox_worker.model import Outcome
from outbox_worker.reconcile.audit import Audit
from outbox_worker.schema.nullable import find_nullable, nullable_columns
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings, load_settings
from outbox_worker.store.outbox import Backlog
from outbox_worker.store.payment_classes import PaymentClass
from tests.support.factories import ProbedProcessor, Shop, drain_all
from tests.support.makers import MakeProcessor
from tests.support.oddities import NULLABLE, let_be_null

CLAIMABLE = ("payload", "created_at", "attempts", "crashes")
NEVER = ("event_id", "event_type", "due_at")


def statements(remedy: str) -> list[str]:
    """Return the statements that a person pastes: the text from the first SQL word on."""
    found = re.search(r"(SELECT|UPDATE|ALTER) .*", remedy)
    assert found is not None, remedy
    return [each for each in found[0].split(";") if each.strip()]


def test_tables_of_ours_have_none(database: Database, tables: Tables) -> None:
    with database.transaction() as session:
        assert find_nullable(session, tables) == []


def test_each_column_is_told_and_the_remedies_work_when_pasted(
    database: Database, tables: Tables, settings: Settings, shop: Shop
) -> None:
    let_be_null(shop)
    with database.transaction() as session:
        named = nullable_columns(session, tables)
        remedies = [each.remedy for each in find_nullable(session, tables)]
    assert named == [f"public.{table}.{column}" for table in NULLABLE for column in NULLABLE[table]]
    for each in remedies:
        for statement in statements(each):
            shop.rows(statement)
    assert next(each for each in examine(settings).checks if each.name == "tables").verdict is Severity.OK


@pytest.mark.parametrize(
    ("table", "column"), [(table, column) for table, columns in NULLABLE.items() for column in columns]
)
def test_a_row_with_null_does_not_spoil_the_remedy(
    table: str, column: str, database: Database, tables: Tables, shop: Shop
) -> None:
    """The remedy fills the row, or it shows the row and names no statement that would fail."""
    payment, event = shop.paid()
    shop.purchase(payment)
    shop.mark(event)
    shop.rows(f"ALTER TABLE {table} ALTER COLUMN {column} DROP NOT NULL")
    shop.rows(f"UPDATE {table} SET {column} = NULL")
    with database.transaction() as session:
        (found,) = find_nullable(session, tables)
    assert re.search(rf"\b{column}\b", found.finding)
    shown = [row for each in statements(found.remedy) for row in shop.rows(each)]
    with database.transaction() as session:
        left = find_nullable(session, tables)
    assert bool(left) == bool(shown)
    assert len(shown) <= 1


def test_names_that_need_quotes(shop: Shop, database: Database) -> None:
    """The statement quotes the names of table and column."""
    shop.rows('ALTER TABLE outbox RENAME TO "My Outbox"')
    shop.rows('ALTER TABLE "My Outbox" RENAME COLUMN due_at TO "due At"')
    shop.rows('ALTER TABLE "My Outbox" ALTER COLUMN "due At" DROP NOT NULL')
    named = load_settings(tables={"outbox": "My Outbox"}, columns={"outbox.due_at": "due At"})
    with database.transaction() as session:
        (found,) = find_nullable(session, build_tables(named))
    for each in statements(found.remedy):
        shop.rows(each)
    assert '"due At"' in found.finding


def test_the_owner_is_named_where_another_role_looks(database: Database, tables: Tables, shop: Shop) -> None:
    shop.rows("ALTER TABLE outbox ALTER COLUMN due_at DROP NOT NULL")
    shop.rows("GRANT SELECT ON outbox TO pg_monitor")
    with database.transaction() as session:
        session.connection().exec_driver_sql("SET LOCAL ROLE pg_monitor")
        (found,) = find_nullable(session, tables)
    owner = shop.scalar("SELECT quote_ident(pg_get_userbyid(relowner)) FROM pg_class WHERE relname = 'outbox'")
    assert found.remedy.startswith(f"as {owner}: ALTER TABLE public.outbox ALTER COLUMN due_at SET NOT NULL")


def test_the_worker_starts_and_warns(settings: Settings, shop: Shop, records: list[dict[str, Any]]) -> None:
    shop.rows("ALTER TABLE outbox ALTER COLUMN due_at DROP NOT NULL")
    worker = Worker(settings)
    worker.start()
    worker._database.close()
    (warned,) = [each for each in records if each.get("event") == "nullable_columns"]
    assert warned["columns"] == ["public.outbox.due_at"]


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("column", CLAIMABLE)
def test_an_event_without_a_value_is_settled_or_buried_by_itself(
    column: str, processor: ProbedProcessor, shop: Shop
) -> None:
    let_be_null(shop)
    _, odd = shop.paid()
    _, sound = shop.paid()
    shop.rows(f"UPDATE outbox SET {column} = NULL WHERE event_id = %s", odd)
    outcomes = drain_all(processor)
    assert shop.outcome_of(sound) == "created"
    if column == "payload":
        assert outcomes == {Outcome.CREATED: 1, Outcome.DEAD: 1}
        assert shop.rows("SELECT reason, payload FROM dead_letters") == [("invalid_payload", None)]
    else:
        assert outcomes == {Outcome.CREATED: 2}
    assert shop.count("outbox") == 0


@pytest.mark.parametrize("column", ["created_at", "attempts", "crashes"])
def test_an_event_without_a_value_is_retried_and_buried(column: str, make_processor: MakeProcessor, shop: Shop) -> None:
    let_be_null(shop)
    processor = make_processor()
    event = shop.confirm(shop.payment("pending"))
    shop.rows(f"UPDATE outbox SET {column} = NULL")
    assert drain_all(processor) == {Outcome.RETRIED: 1}
    assert shop.event(event).attempts == 1
    shop.rows("UPDATE outbox SET attempts = 9")
    if column != "attempts":
        shop.rows(f"UPDATE outbox SET {column} = NULL")
    shop.make_due()
    assert drain_all(processor) == {Outcome.DEAD: 1}
    assert shop.letter_of(event).attempts == 10


@pytest.mark.parametrize("unknown_types", ["bury", "ignore"])
@pytest.mark.parametrize("column", NEVER)
def test_an_event_that_nobody_can_claim_is_told_and_not_in_flight(
    column: str, unknown_types: Any, make_processor: MakeProcessor, database: Database, tables: Tables, shop: Shop
) -> None:
    let_be_null(shop)
    payment, odd = shop.paid()
    _, sound = shop.paid()
    shop.rows(f"UPDATE outbox SET {column} = NULL WHERE event_id = %s", odd)
    processor = make_processor(unknown_types=unknown_types)
    assert drain_all(processor) == {Outcome.CREATED: 1}
    assert shop.outcome_of(sound) == "created"
    with database.transaction() as session:
        assert processor.outbox.backlog(session) == Backlog(0, 0, 0.0)
        assert not processor.outbox.has_due(session, shop.scalar("SELECT now() + interval '1 day'"))
    report = Audit.start(database, tables).run()
    assert (report.counts[PaymentClass.IN_FLIGHT], [each.payment_id for each in report.unexplained]) == (
        0,
        [payment.id],
    )
    status = read_status(database, tables, unknown_types)
    is_of_others = column == "event_type" and unknown_types == "ignore"
    assert status.never_claimed == status_object(status)["never_claimed"] == (0 if is_of_others else 1)
    print_status(status)


@pytest.mark.parametrize("due_at", ["infinity", "294276-01-01", "9999-01-01"])
def test_due_at_infinity_is_never(database: Database, tables: Tables, shop: Shop, due_at: str) -> None:
    shop.paid()
    shop.rows(f"UPDATE outbox SET due_at = '{due_at}'")
    status = read_status(database, tables, None)
    assert (status.never_claimed, status.backlog.waiting) == (1, 0)
    assert len(Audit.start(database, tables).run().unexplained) == 1


@pytest.mark.usefixtures("both_guards")
def test_a_purchase_that_is_neither_active_nor_not_is_not_active(
    processor: ProbedProcessor, database: Database, tables: Tables, shop: Shop
) -> None:
    """Its payment gets no second purchase, and the purchase does not hold its pair."""
    let_be_null(shop)
    own, event = shop.paid()
    shop.purchase(own)
    gift, second = shop.paid()
    shop.purchase(student=gift.student_id, course=gift.course_id)
    shop.rows("UPDATE purchases SET is_active = NULL")
    assert drain_all(processor) == {Outcome.SUPPRESSED: 1, Outcome.CREATED: 1}
    assert (shop.outcome_of(event), shop.outcome_of(second)) == ("suppressed", "created")
    counts = Audit.start(database, tables).run().counts
    assert (counts[PaymentClass.REVOKED], counts[PaymentClass.ACTIVE]) == (1, 1)


def test_a_mark_without_an_outcome_is_a_mark(processor: ProbedProcessor, shop: Shop) -> None:
    let_be_null(shop)
    _, event = shop.paid()
    shop.mark(event)
    shop.rows("UPDATE processed_events SET outcome = NULL, event_type = NULL, processed_at = NULL")
    assert drain_all(processor) == {Outcome.RECOVERED: 1}
