"""Let the ids of our own table ``purchases`` grow with time (UUIDv7).

``core_0001`` gave the ids random values. In a large table, each random id changes another page of the index. After a
checkpoint, PostgreSQL writes each of these pages into the write-ahead log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from alembic import context, op

if TYPE_CHECKING:
    from naming import TableNaming

revision = "core_0007"
down_revision = "core_0006"
branch_labels = None
depends_on = None

RANDOM = "gen_random_uuid()"
HAS_FUNCTION = 180000
"""PostgreSQL has the function ``uuidv7`` from version 18 on."""
ORDERED = "uuidv7()"
BEFORE_18 = (
    "CAST(lpad(to_hex(CAST(floor(date_part('epoch', clock_timestamp()) * 1000) AS bigint)), 12, '0')"
    " || '7' || substr(replace(CAST(gen_random_uuid() AS text), '-', ''), 14) AS uuid)"
)
"""Builds a UUIDv7 (RFC 9562).

It has 48 bits for the milliseconds since 1970, four bits for the version, then random bits.
"""

# what: the default of a column as the catalogue prints it · lock: none · index: the catalogue's indexes
DEFAULT = sa.text(
    """
    SELECT pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d
    JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
    WHERE a.attrelid = to_regclass(:relation) AND a.attname = :column AND a.attgenerated = ''
    """
)


def upgrade() -> None:
    """Change the default of the id in our own table. Do not change existing rows.

    Keep the default if somebody has changed it before.
    """
    purchases: TableNaming = context.config.attributes["naming"].of("purchases")
    bind = op.get_bind()
    asked = {"relation": purchases.relation, "column": purchases.column("id")}
    if not purchases.is_owned(bind) or bind.scalar(DEFAULT, asked) != RANDOM:
        return
    version = bind.scalar(sa.text("SELECT CAST(current_setting('server_version_num') AS integer)"))
    ordered = ORDERED if version >= HAS_FUNCTION else BEFORE_18
    column = bind.dialect.identifier_preparer.quote(purchases.column("id"))
    purchases.alter(bind, f"ALTER COLUMN {column} SET DEFAULT {ordered}")


def downgrade() -> None:
    """Keep the default. Earlier versions can use this default."""
