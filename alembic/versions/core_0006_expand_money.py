"""Let our own table ``purchases`` hold every amount and currency that ``payments`` can hold.

``core_0001`` gave the amount the type ``numeric(12,2)``, and the currency the type ``char(3)``. PostgreSQL rounds an
amount with more decimals and raises no error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import context, op

if TYPE_CHECKING:
    from naming import TableNaming

revision = "core_0006"
down_revision = "core_0005"
branch_labels = None
depends_on = None

# what: the type of a column, whether it is a string type, and whether a view, a rule, a trigger, a
# policy or a generated column uses the column. PostgreSQL then refuses to change the type
# lock: none · index: the catalogue's indexes
TYPE = sa.text(
    """
    SELECT format_type(a.atttypid, a.atttypmod) AS name, t.typcategory = 'S' AS is_string,
           EXISTS (SELECT FROM pg_depend d
                   LEFT JOIN pg_attrdef g ON d.classid = 'pg_attrdef'::regclass AND g.oid = d.objid
                   WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum
                     AND d.classid NOT IN ('pg_class'::regclass, 'pg_constraint'::regclass,
                                           'pg_statistic_ext'::regclass)
                     AND g.adnum IS DISTINCT FROM a.attnum) AS is_used
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = to_regclass(:relation) AND a.attname = :column AND NOT a.attisdropped
    """
)


def upgrade() -> None:
    """Alter only our own table. Make only changes that do not rewrite rows.

    The amount becomes ``numeric`` without limits. If the table is empty, the currency gets the same
    type as in payments. If the table has rows, PostgreSQL would rewrite the rows. The worker then
    only prints the statement. A person chooses the time for this statement. A column that a view or
    a trigger uses keeps its type. PostgreSQL refuses to change the type.
    """
    payments: TableNaming = context.config.attributes["naming"].of("payments")
    purchases: TableNaming = context.config.attributes["naming"].of("purchases")
    bind = op.get_bind()
    if not purchases.is_owned(bind):
        return
    amount, currency, paid = _type(purchases, "amount"), _type(purchases, "currency"), _type(payments, "currency")
    changes = {}
    if amount is not None and amount.name.startswith("numeric(") and not amount.is_used:
        changes["amount"] = "numeric"
    if currency is not None and paid is not None and not currency.is_used:
        wanted = paid.name if paid.is_string else "text"
        rows = sa.select(sa.literal(1)).select_from(sa.table(purchases.table, schema=purchases.schema))
        if wanted != currency.name and not bind.scalar(sa.select(rows.exists())):
            changes["currency"] = wanted
    if changes:
        quote = bind.dialect.identifier_preparer.quote
        columns = {quote(purchases.column(key)): type_name for key, type_name in changes.items()}
        purchases.alter(bind, ", ".join(f"ALTER COLUMN {name} TYPE {kind}" for name, kind in columns.items()))


def downgrade() -> None:
    """Keep the types. Earlier versions can use these types.

    In a narrower type, PostgreSQL would round amounts.
    """


def _type(naming: TableNaming, key: str) -> sa.Row[Any] | None:
    asked = {"relation": naming.relation, "column": naming.column(key)}
    return op.get_bind().execute(TYPE, asked).one_or_none()
