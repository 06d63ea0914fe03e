"""Build the unique index behind the guard `index`, on a live database, and drop the look-up index that it replaces."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.exc import IntegrityError

from outbox_worker.errors import Refused
from outbox_worker.guard import pair_indexes, relation_name
from outbox_worker.health import is_owned
from outbox_worker.schema import PAIR_INDEX, PAIR_LOOKUP_INDEX, build_tables

revision = "unique_index_0001"
down_revision = None
branch_labels = ("unique_index",)
depends_on = "core_0001"

SHOWN = 20


def upgrade() -> None:
    purchases = build_tables(context.config.attributes["settings"]).purchases
    with op.get_context().autocommit_block():
        bind = op.get_bind()
        if not pair_indexes(bind, purchases):
            _refuse_duplicates(bind, purchases)
            _build(bind, purchases)
        bind.execute(sa.text(f"DROP INDEX CONCURRENTLY IF EXISTS {_index_name(bind, purchases, PAIR_LOOKUP_INDEX)}"))


def downgrade() -> None:
    purchases = build_tables(context.config.attributes["settings"]).purchases
    with op.get_context().autocommit_block():
        bind = op.get_bind()
        if is_owned(bind, purchases):
            bind.execute(
                sa.text(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {PAIR_LOOKUP_INDEX} {_on_pair(bind, purchases)}")
            )
        bind.execute(sa.text(f"DROP INDEX CONCURRENTLY IF EXISTS {_index_name(bind, purchases, PAIR_INDEX)}"))


def _build(bind: sa.Connection, purchases: sa.Table) -> None:
    """Without time-outs: one that strikes leaves an INVALID index, which enforces already but is no guard."""
    bind.execute(sa.text("SET lock_timeout = 0"))
    bind.execute(sa.text("SET statement_timeout = 0"))
    drop = sa.text(f"DROP INDEX CONCURRENTLY IF EXISTS {_index_name(bind, purchases, PAIR_INDEX)}")
    bind.execute(drop)  # an INVALID leftover: a sound one was looked for before
    try:
        bind.execute(sa.text(f"CREATE UNIQUE INDEX CONCURRENTLY {PAIR_INDEX} {_on_pair(bind, purchases)}"))
    except IntegrityError:
        bind.execute(drop)
        _refuse_duplicates(bind, purchases)
        raise


def _refuse_duplicates(bind: sa.Connection, purchases: sa.Table) -> None:
    c = purchases.c
    query = (
        sa.select(c.student_id, c.course_id, sa.func.count())
        .where(c.is_active)
        .group_by(c.student_id, c.course_id)
        .having(sa.func.count() > 1)
        .order_by(c.student_id, c.course_id)
        .limit(SHOWN + 1)
    )
    found = bind.execute(query).all()
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


def _index_name(bind: sa.Connection, purchases: sa.Table, name: str) -> str:
    return f"{bind.dialect.identifier_preparer.quote_schema(purchases.schema)}.{name}"
