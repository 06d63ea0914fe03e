"""Finds pairs (a student and a course) with more than one active purchase.

``schema.ids`` defines which ids are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, cast, func, literal, select
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.orm import Session

from outbox_worker.database.planner import planned
from outbox_worker.schema.catalogue import has_index_paths
from outbox_worker.schema.tables import Tables
from outbox_worker.store.identity import grouped_purchases, has_grouped_pair

SHOWN_PURCHASES = 20
"""The largest number of purchases of one pair that is listed. This limit keeps the output short."""

_BY_INDEX: Mapping[str, str] = {"enable_seqscan": "off", "enable_hashagg": "off", "jit": "off"}
"""Planner settings to read the pairs in the order of their index, without a sort or hash table."""
_BY_SORT: Mapping[str, str] = {"work_mem": "256MB"}


@dataclass(frozen=True, slots=True)
class DoubledPair:
    """A pair with more than one active purchase."""

    student_id: str
    """The student's id in the oldest purchase.

    Other purchases of the pair can write the same id in another way.
    """
    course_id: str
    purchases: int
    purchase_ids: Sequence[str]
    """The ids of the oldest purchases of the pair, at most ``SHOWN_PURCHASES``."""


def doubled_pairs(session: Session, tables: Tables, limit: int | None = None) -> list[DoubledPair]:
    """Find pairs with more than one active purchase.

    If such a pair exists, the unique index cannot be built. The first statement only checks whether
    such a pair exists. Usually no such pair exists. If ``purchases`` has an index on the pair, the
    first statement reads only this index.
    """
    by_index = tables.ids.is_indexable and has_index_paths(session, tables.purchases)
    with planned(session, **(_BY_INDEX if by_index else _BY_SORT)):
        is_some = session.scalar(_doubled(tables).limit(1))
    if is_some is None:
        return []
    with planned(session, **_BY_SORT):
        return [DoubledPair(*row) for row in session.execute(_named(tables, limit))]


def _doubled(tables: Tables) -> Select[Any]:
    """what: pairs with more than one active purchase · lock: none
    index: that on the pair; without it, PostgreSQL sorts all purchases

    The statement leaves out purchases without a student or a course. GROUP BY would count all these
    purchases as one pair.
    """
    purchases = tables.purchases
    pair = grouped_purchases(tables.ids, purchases)
    has_both = purchases.c.student_id.is_not(None), purchases.c.course_id.is_not(None)
    counted = select(func.count().label("purchases"), *pair).where(purchases.c.is_active, *has_both)
    return counted.group_by(*(each.element for each in pair)).having(func.count() > 1)


def _named(tables: Tables, limit: int | None) -> Select[Any]:
    """what: the pairs of ``_doubled`` with the ids of their purchases
    lock: none · index: that on the pair
    """
    doubled = _doubled(tables).limit(limit).cte("doubled").prefix_with("MATERIALIZED")
    bought = tables.purchases.alias("bought")
    columns = bought.c.student_id, bought.c.course_id, bought.c.id
    student, course, ids = (_oldest_first(cast(each, Text), bought.c.created_at, bought.c.id) for each in columns)
    first = literal(1)
    named = select(student[first], course[first], doubled.c.purchases, ids[1:SHOWN_PURCHASES])
    rows = doubled.join(bought, has_grouped_pair(tables.ids, bought, doubled))
    grouped = doubled.c.student_id, doubled.c.course_id, doubled.c.purchases
    return named.select_from(rows).where(bought.c.is_active).group_by(*grouped).order_by(*grouped)


def _oldest_first(value: ColumnElement[Any], *order: ColumnElement[Any]) -> Any:
    return func.array_agg(aggregate_order_by(value, *order))
