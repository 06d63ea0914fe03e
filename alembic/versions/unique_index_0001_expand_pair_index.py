"""Build the unique index behind the guard `index`, on a live database, and drop the look-up index that it replaces."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.exc import IntegrityError

from outbox_worker.errors import Refused
from outbox_worker.schema.catalogue import is_owned, pair_indexes
from outbox_worker.schema.tables import PAIR_INDEX, PAIR_LOOKUP_INDEX, build_tables, relation_name
from outbox_worker.store.guard import doubled_pairs

revision = "unique_index_0001"
down_revision = None
branch_labels = ("unique_index",)
depends_on = "core_0001"

SHOWN = 20

# what: an index by its name: on which table, whether that is ours, whether it is valid · index: the catalogue's own
NAMED = sa.text(
    """
    SELECT CAST(i.indrelid AS regclass) AS "table", i.indrelid = to_regclass(:relation) AS is_on_ours,
           i.indisvalid AS is_valid
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_index i ON i.indexrelid = c.oid
    WHERE n.nspname = :schema AND c.relname = :name
    """
)


def upgrade() -> None:
    purchases = build_tables(context.config.attributes["settings"]).purchases
    with op.get_context().autocommit_block():
        bind = op.get_bind()
        if not pair_indexes(bind, purchases):
            _refuse_duplicates(bind, purchases)
            _build(bind, purchases)
        if is_owned(bind, purchases):
            _drop(bind, purchases, PAIR_LOOKUP_INDEX)


def downgrade() -> None:
    purchases = build_tables(context.config.attributes["settings"]).purchases
    with op.get_context().autocommit_block():
        bind = op.get_bind()
        if is_owned(bind, purchases):
            bind.execute(
                sa.text(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {PAIR_LOOKUP_INDEX} {_on_pair(bind, purchases)}")
            )
        _drop(bind, purchases, PAIR_INDEX)


def _build(bind: sa.Connection, purchases: sa.Table) -> None:
    """Without time-outs: one that strikes leaves an INVALID index, which enforces already but is no guard."""
    bind.execute(sa.text("SET lock_timeout = 0"))
    bind.execute(sa.text("SET statement_timeout = 0"))
    _make_room(bind, purchases)
    try:
        bind.execute(sa.text(f"CREATE UNIQUE INDEX CONCURRENTLY {PAIR_INDEX} {_on_pair(bind, purchases)}"))
    except IntegrityError:
        _drop(bind, purchases, PAIR_INDEX)
        _refuse_duplicates(bind, purchases)
        raise


def _make_room(bind: sa.Connection, purchases: sa.Table) -> None:
    """Drop an INVALID leftover of ours; what else has our name is somebody's, and stays."""
    named = _named(bind, purchases, PAIR_INDEX)
    if named is None:
        return
    if not named.is_on_ours or (named.is_valid and not is_owned(bind, purchases)):
        raise Refused(
            f"{PAIR_INDEX} exists and is another index, on {named.table}. Rename it, then run migrate "
            "--with unique_index again. Nothing was changed."
        )
    _drop(bind, purchases, PAIR_INDEX)


def _drop(bind: sa.Connection, purchases: sa.Table, name: str) -> None:
    """Drop an index by its name where it is one of our table."""
    named = _named(bind, purchases, name)
    if named is not None and named.is_on_ours:
        schema = bind.dialect.identifier_preparer.quote_schema(purchases.schema)
        bind.execute(sa.text(f"DROP INDEX CONCURRENTLY {schema}.{name}"))


def _named(bind: sa.Connection, purchases: sa.Table, name: str) -> sa.Row[Any] | None:
    sought = {"schema": purchases.schema, "name": name, "relation": relation_name(purchases)}
    return bind.execute(NAMED, sought).one_or_none()


def _refuse_duplicates(bind: sa.Connection, purchases: sa.Table) -> None:
    found = doubled_pairs(bind, purchases, SHOWN + 1)
    if not found:
        return
    lines = [f"  student {student}, course {course}: {count} active purchases" for student, course, count in found]
    more = ["  … and more"] if len(lines) > SHOWN else []
    raise Refused(
        f"The unique index cannot be built: {relation_name(purchases)} holds more than one active purchase for\n"
        + "\n".join([*lines[:SHOWN], *more])
        + "\nDeactivate all but one of each pair, then run migrate --with unique_index again. Nothing was changed."
    )


def _on_pair(bind: sa.Connection, purchases: sa.Table) -> str:
    quote = bind.dialect.identifier_preparer.quote
    student, course, active = (quote(purchases.c[key].name) for key in ("student_id", "course_id", "is_active"))
    return f"ON {relation_name(purchases)} ({student}, {course}) WHERE {active}"
