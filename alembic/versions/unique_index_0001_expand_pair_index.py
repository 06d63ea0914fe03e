"""Build the unique index on student and course of active purchases (guard `index`).

The build does not block writers. This revision then drops the plain index on the same columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.exc import IntegrityError

if TYPE_CHECKING:
    from naming import TableNaming

revision = "unique_index_0001"
down_revision = None
branch_labels = ("unique_index",)
depends_on = "core_0001"

SHOWN = 20

# what: the table of the index with this name, whether the table is purchases, and whether the index
# is valid · lock: none · index: the catalogue's indexes
NAMED = sa.text(
    """
    SELECT CAST(i.indrelid AS regclass) AS "table", i.indrelid = to_regclass(:relation) AS is_on_ours,
           i.indisvalid AS is_valid
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_index i ON i.indexrelid = c.oid
    WHERE n.nspname = :schema AND c.relname = :name
    """
)

# what: whether a unique, valid, immediate index on exactly student and course exists. The index
# must cover exactly the active purchases
# lock: none · index: the catalogue's indexes
HAS_PAIR_INDEX = sa.text(
    """
    SELECT EXISTS (
        SELECT FROM pg_index i
        WHERE i.indrelid = to_regclass(:relation)
          AND i.indisunique AND i.indisvalid AND i.indisready AND i.indimmediate
          AND i.indexprs IS NULL AND i.indnkeyatts = 2
          AND NOT EXISTS (SELECT FROM generate_series(0, 1) AS k (position)
                          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.position]
                          JOIN pg_collation l ON l.oid IN (a.attcollation, i.indcollation[k.position])
                          WHERE a.attcollation <> i.indcollation[k.position] AND NOT l.collisdeterministic)
          AND pg_get_expr(i.indpred, i.indrelid) = ANY(CAST(:predicates AS text[]))
          AND (SELECT array_agg(CAST(a.attname AS text) ORDER BY CAST(a.attname AS text)) FROM pg_attribute a
               WHERE a.attrelid = i.indrelid AND a.attnum IN (i.indkey[0], i.indkey[1]))
            = (SELECT array_agg(n ORDER BY n) FROM unnest(CAST(:columns AS text[])) AS n)
    )
    """
)


def upgrade() -> None:
    purchases: TableNaming = context.config.attributes["naming"].of("purchases")
    with op.get_context().autocommit_block():
        bind = op.get_bind()
        if not _has_pair_index(bind, purchases):
            _refuse_duplicates(bind, purchases)
            _build(bind, purchases)
        if purchases.is_owned(bind):
            _drop(bind, purchases, purchases.pair_lookup_index)


def downgrade() -> None:
    purchases: TableNaming = context.config.attributes["naming"].of("purchases")
    with op.get_context().autocommit_block():
        bind = op.get_bind()
        if purchases.is_owned(bind):
            bind.execute(
                sa.text(
                    f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {purchases.pair_lookup_index} {_on_pair(bind, purchases)}"
                )
            )
        _drop(bind, purchases, purchases.pair_index)


def _has_pair_index(bind: sa.Connection, purchases: TableNaming) -> bool:
    """Return whether a unique index exists that the worker can use as its guard.

    The predicate of the index must have one of the three forms in ``predicates``.
    """
    active = bind.dialect.identifier_preparer.quote(purchases.column("is_active"))
    sought = {
        "relation": purchases.relation,
        "columns": [purchases.column(key) for key in ("student_id", "course_id")],
        "predicates": [active, f"({active} = true)", f"({active} IS TRUE)"],
    }
    return bool(bind.scalar(HAS_PAIR_INDEX, sought))


def _build(bind: sa.Connection, purchases: TableNaming) -> None:
    """Build the index without time-outs. A cancelled build would leave an INVALID index.

    An INVALID index rejects duplicate rows, but ON CONFLICT cannot use an INVALID index. The worker
    therefore cannot use an INVALID index as its guard.
    """
    bind.execute(sa.text("SET lock_timeout = 0"))
    bind.execute(sa.text("SET statement_timeout = 0"))
    _make_room(bind, purchases)
    try:
        bind.execute(sa.text(f"CREATE UNIQUE INDEX CONCURRENTLY {purchases.pair_index} {_on_pair(bind, purchases)}"))
    except IntegrityError:
        _drop(bind, purchases, purchases.pair_index)
        _refuse_duplicates(bind, purchases)
        raise


def _make_room(bind: sa.Connection, purchases: TableNaming) -> None:
    """Drop an INVALID index that a cancelled build left. If another index has the same name, refuse to build."""
    named = _named(bind, purchases, purchases.pair_index)
    if named is None:
        return
    if not named.is_on_ours or (named.is_valid and not purchases.is_owned(bind)):
        purchases.refuse(
            f"{purchases.pair_index} already exists, but it is another index, on {named.table}. Rename it, then run "
            "migrate --with unique_index again. Nothing was changed."
        )
    _drop(bind, purchases, purchases.pair_index)


def _drop(bind: sa.Connection, purchases: TableNaming, name: str) -> None:
    """Drop the index with this name if the index is on the purchases table."""
    named = _named(bind, purchases, name)
    if named is not None and named.is_on_ours:
        schema = bind.dialect.identifier_preparer.quote_schema(purchases.schema)
        bind.execute(sa.text(f"DROP INDEX CONCURRENTLY {schema}.{name}"))


def _named(bind: sa.Connection, purchases: TableNaming, name: str) -> sa.Row[Any] | None:
    sought = {"schema": purchases.schema, "name": name, "relation": purchases.relation}
    return bind.execute(NAMED, sought).one_or_none()


def _refuse_duplicates(bind: sa.Connection, purchases: TableNaming) -> None:
    found = _doubled_pairs(bind, purchases)
    if not found:
        return
    lines = [f"  student {student}, course {course}: {count} active purchases" for student, course, count in found]
    more = ["  … and more"] if len(lines) > SHOWN else []
    purchases.refuse(
        f"The unique index cannot be built: {purchases.relation} contains more than one active purchase for\n"
        + "\n".join([*lines[:SHOWN], *more])
        + "\nDeactivate all but one of each pair, then run migrate --with unique_index again. Nothing was changed."
    )


def _doubled_pairs(bind: sa.Connection, purchases: TableNaming) -> Sequence[sa.Row[Any, Any, int]]:
    """Return each student and course with several active purchases, and the number of purchases.

    The result has at most ``SHOWN`` + 1 rows. The caller shows ``SHOWN`` rows. If the result has
    one more row, the message says "and more".
    """
    table = sa.table(purchases.table, schema=purchases.schema)
    student, course = (sa.column(purchases.column(key), sa.types.NullType()) for key in ("student_id", "course_id"))
    active = sa.column(purchases.column("is_active"), sa.Boolean())
    found = sa.select(student, course, sa.func.count()).select_from(table).where(active).group_by(student, course)
    doubled = found.having(sa.func.count() > 1).order_by(student, course).limit(SHOWN + 1)
    return bind.execute(doubled).all()


def _on_pair(bind: sa.Connection, purchases: TableNaming) -> str:
    quote = bind.dialect.identifier_preparer.quote
    student, course, active = (quote(purchases.column(key)) for key in ("student_id", "course_id", "is_active"))
    return f"ON {purchases.relation} ({student}, {course}) WHERE {active}"
