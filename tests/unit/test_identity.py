"""Ids of the usual types are compared, ordered and locked by their columns without conversion."""

from __future__ import annotations

import pytest
from sqlalchemy import and_, select
from sqlalchemy.dialects import postgresql

from outbox_worker.model import Guard
from outbox_worker.schema.ids import DEFAULT_COLLATION, UUIDS, IdColumn, PairIds, SameId
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import Settings
from outbox_worker.store.identity import pair_key, same_pair, written_order
from outbox_worker.store.purchases import PurchaseRepository

TABLES = build_tables(Settings())
TEXT, VARCHAR, CHAR = (IdColumn(name, collation=DEFAULT_COLLATION) for name in ("text", "varchar", "bpchar"))
USUAL = [
    SameId(IdColumn("int8"), IdColumn("int8")),
    SameId(IdColumn("int4"), IdColumn("int8")),
    SameId(TEXT, VARCHAR),
    SameId(CHAR, CHAR),
    SameId(*[IdColumn("text", collation='pg_catalog."C"')] * 2),
]


def expressions(ids: PairIds) -> str:
    own = same_pair(ids, TABLES.purchases, TABLES.payments)
    told = select(own, pair_key(ids, TABLES.payments), *written_order(ids, TABLES.payments))
    return str(told.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("same", USUAL, ids=lambda same: f"{same.paid} {same.bought}")
def test_usual_ids_need_no_conversion(same: SameId) -> None:
    assert expressions(PairIds(same, same)) == expressions(UUIDS)


def test_the_conditions_and_the_key_are_plain() -> None:
    paid, bought = TABLES.payments.c, TABLES.purchases.c
    plain = and_(bought.student_id == paid.student_id, bought.course_id == paid.course_id)
    assert same_pair(UUIDS, TABLES.purchases, TABLES.payments).compare(plain)
    student, course = (f"CAST(public.payments.{key} AS TEXT)" for key in ("student_id", "course_id"))
    assert f"hashtextextended({student} || ':' || {course}, 0)" in expressions(UUIDS)


@pytest.mark.parametrize("guard", Guard)
def test_the_insert_orders_by_the_columns(guard: Guard) -> None:
    sql = str(PurchaseRepository(TABLES)._insert(guard, "is_active"))
    assert "ORDER BY payment.student_id, payment.course_id, event.due_at, event.id" in " ".join(sql.split())
    assert ("DISTINCT ON (payment.student_id, payment.course_id)" in sql) == (guard is Guard.LOCK)
