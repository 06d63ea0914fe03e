"""Reads from PostgreSQL's system catalogue which tables, columns, indexes and triggers exist.

This module also finds out which tables the worker's migrations created.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Column, Connection, Row, Table, and_, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.failures import Failure, classify
from outbox_worker.schema.tables import NOTIFY_TRIGGER, OWNED, Tables, ownership_list, quoted, relation_name

_Found = TypeVar("_Found")

# what: the unique, valid indexes on exactly student and course that compare ids by the same rules
# as the columns. For each index: the predicate, whether the index is immediate (not deferrable),
# and whether is_active can be NULL · lock: none · index: the catalogue's indexes
_PAIR_INDEXES = text(
    """
    SELECT c.relname AS name, pg_get_expr(i.indpred, i.indrelid) AS predicate, i.indimmediate AS is_immediate,
           NOT coalesce((SELECT attnotnull FROM pg_attribute
                         WHERE attrelid = i.indrelid AND attname = :active), false) AS may_be_null
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE i.indrelid = to_regclass(:relation)
      AND i.indisunique AND i.indisvalid AND i.indisready AND i.indexprs IS NULL AND i.indnkeyatts = 2
      AND NOT EXISTS (SELECT FROM generate_series(0, 1) AS k (position)
                      JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.position]
                      JOIN pg_collation l ON l.oid IN (a.attcollation, i.indcollation[k.position])
                      WHERE a.attcollation <> i.indcollation[k.position] AND NOT l.collisdeterministic)
      AND (SELECT array_agg(CAST(a.attname AS text) ORDER BY CAST(a.attname AS text)) FROM pg_attribute a
           WHERE a.attrelid = i.indrelid AND a.attnum IN (i.indkey[0], i.indkey[1]))
        = (SELECT array_agg(n ORDER BY n) FROM unnest(CAST(:columns AS text[])) AS n)
    ORDER BY c.relname
    """
)

# what: the first two columns of every valid index of a table · lock: none · index: the catalogue's indexes
_LEADING_COLUMNS = text(
    """
    SELECT ARRAY(SELECT CAST(a.attname AS text) FROM generate_series(0, 1) AS k(position)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.position]
                 ORDER BY k.position) AS names
    FROM pg_index i WHERE i.indrelid = to_regclass(:relation) AND i.indisvalid AND i.indkey[0] <> 0
    """
)

# what: whether a table has an enabled trigger of this name · lock: none · index: the catalogue's indexes
_HAS_TRIGGER = text(
    "SELECT EXISTS (SELECT FROM pg_trigger"
    " WHERE tgrelid = to_regclass(:relation) AND tgname = :name AND tgenabled IN ('O', 'A'))"
)

# what: the labels of a column's enum, in its order · lock: none · index: the catalogue's indexes
_ENUM_LABELS = text(
    """
    SELECT CAST(e.enumlabel AS text) FROM pg_attribute a JOIN pg_enum e ON e.enumtypid = a.atttypid
    WHERE a.attrelid = to_regclass(:relation) AND a.attname = :column ORDER BY e.enumsortorder
    """
)


def pair_indexes(session: Session | Connection, purchases: Table) -> dict[str, str]:
    """Return the name and the predicate of each unique index that can be the guard ``index``.

    The guard prevents a second active purchase of a student for the same course.
    """
    return {row.name: row.predicate for row in _on_pair(session, purchases) if _can_guard(session, purchases, row)}


def unfit_pair_indexes(session: Session | Connection, purchases: Table) -> dict[str, str | None]:
    """Return the name and the predicate of each unique index that cannot be the guard ``index``.

    These indexes are on student and course. The predicate is None if the index covers all rows.
    """
    rows = _on_pair(session, purchases)
    return {row.name: row.predicate for row in rows if not _can_guard(session, purchases, row)}


def _on_pair(session: Session | Connection, purchases: Table) -> Sequence[Row[Any]]:
    columns = [purchases.c.student_id.name, purchases.c.course_id.name]
    asked = {"relation": relation_name(purchases), "columns": columns, "active": purchases.c.is_active.name}
    return session.execute(_PAIR_INDEXES, asked).all()


def _can_guard(session: Session | Connection, purchases: Table, index: Row[Any]) -> bool:
    """Return whether the index is immediate (not deferrable) and covers exactly the active purchases."""
    if index.predicate is None or not index.is_immediate:
        return False
    return _means_active(session, index.predicate, purchases.c.is_active.name, may_be_null=index.may_be_null)


def _means_active(session: Session | Connection, predicate: str, column: str, *, may_be_null: bool) -> bool:
    """Return whether an index predicate is true exactly if ``is_active`` is true.

    PostgreSQL evaluates the predicate for each value of ``is_active``. The predicate can therefore
    have any form. If the predicate reads another column, PostgreSQL raises an error. This function
    then returns False.
    """
    active = quoted(column)
    if predicate in (active, f"({active} = true)"):
        return True
    values = f"(true), (false){', (NULL)' if may_be_null else ''}"
    asked = f"SELECT ({active} IS TRUE) = (({predicate}) IS TRUE) FROM (VALUES {values}) AS each_value ({active})"  # noqa: S608
    connection = session.connection() if isinstance(session, Session) else session
    try:
        with connection.begin_nested():
            return all(connection.exec_driver_sql(asked.replace("%", "%%"), ()).scalars())
    except DBAPIError as error:
        if classify(error) in (Failure.EVENT, Failure.UNCLEAR):
            return False
        raise


def has_index_paths(session: Session, purchases: Table) -> bool:
    """Return whether purchases has both needed indexes.

    One index begins with ``payment_id``, another with ``student_id`` and ``course_id``.
    """
    found = session.scalars(_LEADING_COLUMNS, {"relation": relation_name(purchases)}).all()
    payment, *pair = (purchases.c[key].name for key in ("payment_id", "student_id", "course_id"))
    return any(names[0] == payment for names in found) and any(set(names[:2]) == set(pair) for names in found)


@dataclass(frozen=True, slots=True)
class ActualColumn:
    """The properties of a column in the system catalogue."""

    type_name: str
    is_enum: bool
    must_be_written: bool
    """True if the column is NOT NULL and has no default."""
    written_type: str
    """The type in the form of DDL, for example ``numeric(12,2)``."""
    is_string: bool
    limit: int | None
    """The largest number of characters, or of digits before the decimal point.

    The value is None if the type has no limit.
    """
    decimals: int | None
    """The number of decimals to which PostgreSQL rounds a value.

    The value is None if PostgreSQL does not round.
    """
    is_used: bool
    """True if a view, a trigger, a policy or a generated column uses the column.

    PostgreSQL then refuses to change the type of the column.
    """
    base_type: str
    """The base type of the domain. If the column has no domain, the value is ``type_name``."""
    may_be_null: bool
    computed: str | None
    """How PostgreSQL computes the column: ``stored``, ``virtual`` or ``identity``.

    The value is None if PostgreSQL stores the value that a statement writes.
    """


def exists(session: Session | Connection, table: Table) -> bool:
    return kind_of_relation(session, table) is not None


def _read_once(session: Session | Connection, fact: str, name: str, read: Callable[[], _Found]) -> _Found:
    """Return the result of ``read``. Call ``read`` only once for each session, fact and name.

    Many checks in one session need the same facts. For a ``Connection``, call ``read`` each time.
    A migration must see its own changes.
    """
    if not isinstance(session, Session):
        return read()
    if (fact, name) not in session.info:
        session.info[fact, name] = read()
    found: _Found = session.info[fact, name]
    return found


_KIND_OF, _COLUMNS_OF = "kind", "columns"
"""The facts about a table that ``_read_once`` stores in a session."""


def read_ahead(session: Session, tables: Iterable[Table]) -> None:
    """Read the kinds of all these tables with one statement, and their columns with another.

    The checks then need no more statements for these facts.
    """
    names = [relation_name(table) for table in tables]
    for fact, found in ((_KIND_OF, _kinds(session, names)), (_COLUMNS_OF, _columns(session, names))):
        session.info.update({(fact, name): value for name, value in found.items()})


def _kinds(session: Session | Connection, names: Sequence[str]) -> dict[str, str | None]:
    return {row.name: row.kind for row in session.execute(_KINDS, {"names": names})}


# what: whether a table has the comment of our migrations, and whether this role can read the list
# of tables that our migrations created
# lock: none
# index: the catalogue's indexes
_OWNED = text(
    """
    SELECT to_regclass(:name) IS NOT NULL AS is_there,
           coalesce(obj_description(to_regclass(:name), 'pg_class') = :owned, false) AS by_comment,
           l.oid IS NOT NULL AS has_list,
           coalesce(has_schema_privilege(l.relnamespace, 'USAGE') AND has_table_privilege(l.oid, 'SELECT'), false)
               AS may_read_list
    FROM (VALUES (1)) AS one LEFT JOIN (
        pg_class l JOIN pg_namespace n ON n.oid = l.relnamespace AND n.nspname = :list_schema
    ) ON l.relname = :list_name AND l.relkind = 'r'
    """
)


def is_owned(session: Session | Connection, table: Table) -> bool:
    """Return whether the worker's migrations created the table.

    All other tables are adopted: the worker uses them, but the migrations never alter them. The
    migrations put a comment on each table that they create, and write its name into a list. A
    restore can lose the comments. Either the comment or the list entry is therefore enough. If this
    role is not allowed to read the list, only the comment counts.
    """
    listed = ownership_list(table)
    seen = _ownership_seen(session, table, listed)
    if seen.by_comment or not (seen.is_there and seen.may_read_list):
        return bool(seen.by_comment)
    is_this = and_(listed.c.table_schema == table.schema, listed.c.table_name == table.name)
    return bool(session.scalar(select(func.count()).select_from(listed).where(is_this)))


def adopted_tables(session: Session | Connection, tables: Tables) -> list[str]:
    """Return the names of the existing tables that our migrations did not create."""
    found = tables.by_role().values()
    return [relation_name(table) for table in found if exists(session, table) and not is_owned(session, table)]


def is_list_closed(session: Session, table: Table) -> bool:
    """Return whether this role is not allowed to read the list of tables of our migrations.

    Return False if the list does not exist.
    """
    seen = _ownership_seen(session, table, ownership_list(table))
    return bool(seen.has_list and not seen.may_read_list)


def _ownership_seen(session: Session | Connection, table: Table, listed: Table) -> Row[Any]:
    where = {"list_schema": listed.schema, "list_name": listed.name}
    asked = {"name": relation_name(table), "owned": OWNED, **where}
    return session.execute(_OWNED, asked).one()


# what: the kind of each relation: a table, a partitioned table, a view, … · lock: none
# index: the catalogue's indexes
_KINDS = text(
    """
    SELECT given.name, CAST(c.relkind AS text) AS kind
    FROM unnest(CAST(:names AS text[])) AS given (name) LEFT JOIN pg_class c ON c.oid = to_regclass(given.name)
    """
)

# what: the owner of a table, and whether this role has the owner's rights · lock: none
# index: the catalogue's indexes
_OWNER = text(
    "SELECT quote_ident(pg_get_userbyid(relowner)) AS name, pg_has_role(relowner, 'USAGE') AS is_us"
    " FROM pg_class WHERE oid = to_regclass(:relation)"
)


def kind_of_relation(session: Session | Connection, table: Table) -> str | None:
    """Return the letter in ``pg_class.relkind``. Return None if the table does not exist."""
    name = relation_name(table)
    return _read_once(session, _KIND_OF, name, lambda: _kinds(session, [name])[name])


def is_partitioned(session: Session | Connection, table: Table) -> bool:
    return kind_of_relation(session, table) == "p"


def as_owner(session: Session, relation: str) -> str:
    """Return the first words of a remedy that only the owner of the table can run.

    Return "" if this role has the owner's rights.
    """
    owner = session.execute(_OWNER, {"relation": relation}).one()
    return "" if owner.is_us else f"as {owner.name}: "


def role_name(session: Session) -> str:
    """Return the name of the current role, quoted if needed."""
    role: str = session.scalars(text("SELECT quote_ident(current_user)")).one()
    return role


# what: the columns of each table. The limit of an enum is the length of its longest label. The type modifier of numeric
# contains precision and scale.
# lock: none · index: the catalogue's indexes
_COLUMNS = text(
    """
    SELECT given.name, a.attname, t.typname AS type_name, t.typtype = 'e' AS is_enum,
           a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AS must_be_written,
           format_type(a.atttypid, a.atttypmod) AS written_type, t.typcategory = 'S' AS is_string,
           CASE WHEN t.typtype = 'e' THEN (SELECT max(length(enumlabel)) FROM pg_enum WHERE enumtypid = t.oid)
                WHEN a.atttypmod < 4 THEN NULL
                WHEN t.typname = 'numeric' THEN ((a.atttypmod - 4) >> 16 & 65535) - (((a.atttypmod - 4) & 2047) # 1024)
                                                + 1024
                WHEN t.typname IN ('varchar', 'bpchar') THEN a.atttypmod - 4 END AS "limit",
           CASE WHEN t.typname = 'numeric' AND a.atttypmod >= 4
                THEN (((a.atttypmod - 4) & 2047) # 1024) - 1024 END AS decimals,
           EXISTS (SELECT FROM pg_depend d
                   LEFT JOIN pg_attrdef g ON d.classid = CAST('pg_attrdef' AS regclass) AND g.oid = d.objid
                   WHERE d.refclassid = CAST('pg_class' AS regclass) AND d.refobjid = a.attrelid
                     AND d.refobjsubid = a.attnum
                     AND d.classid NOT IN (CAST('pg_class' AS regclass), CAST('pg_constraint' AS regclass),
                                           CAST('pg_statistic_ext' AS regclass))
                     AND g.adnum IS DISTINCT FROM a.attnum) AS is_used,
           (WITH RECURSIVE up AS (SELECT t.typname, t.typtype, t.typbasetype UNION ALL
                                  SELECT b.typname, b.typtype, b.typbasetype
                                  FROM up JOIN pg_type b ON b.oid = up.typbasetype)
            SELECT CAST(typname AS text) FROM up WHERE typtype <> 'd') AS base_type,
           NOT (a.attnotnull OR t.typnotnull) AS may_be_null,
           CASE WHEN a.attgenerated = 's' THEN 'stored' WHEN a.attgenerated <> '' THEN 'virtual'
                WHEN a.attidentity = 'a' THEN 'identity' END AS computed
    FROM unnest(CAST(:names AS text[])) AS given (name)
    JOIN pg_attribute a ON a.attrelid = to_regclass(given.name) JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum
    """
)


def actual_columns(session: Session | Connection, name: str) -> dict[str, ActualColumn]:
    return _read_once(session, _COLUMNS_OF, name, lambda: _columns(session, [name])[name])


def _columns(session: Session | Connection, names: Sequence[str]) -> dict[str, dict[str, ActualColumn]]:
    found: dict[str, dict[str, ActualColumn]] = {name: {} for name in names}
    for name, column, *properties in session.execute(_COLUMNS, {"names": names}):
        found[name][column] = ActualColumn(*properties)
    return found


def has_limited_amounts(session: Session | Connection, purchases: Table) -> bool:
    """Return whether ``purchases.amount`` has a limit of digits that the migrations can remove."""
    amount = actual_columns(session, relation_name(purchases)).get(purchases.c.amount.name)
    return amount is not None and amount.decimals is not None and not amount.is_used


# what: the unlogged and temporary tables among these tables and their partitions. PostgreSQL does
# not write the rows of these tables to the write-ahead log
# lock: none · index: the catalogue's indexes
_UNLOGGED = text(
    """
    WITH RECURSIVE part (oid, position) AS (
        SELECT CAST(to_regclass(given.name) AS oid), given.position
        FROM unnest(CAST(:names AS text[])) WITH ORDINALITY AS given (name, position)
        UNION SELECT i.inhrelid, part.position FROM pg_inherits i JOIN part ON i.inhparent = part.oid
    )
    SELECT format('%I.%I', n.nspname, c.relname) AS name, c.relpersistence = 't' AS is_temporary
    FROM part JOIN pg_class c ON c.oid = part.oid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relpersistence <> 'p' AND c.relkind = 'r' ORDER BY part.position, name
    """
)


def enum_labels(session: Session | Connection, table: Table, key: str) -> Sequence[str]:
    """Return the labels of the enum type of the column. Without an enum, return an empty list."""
    names = {"relation": relation_name(table), "column": table.c[key].name}
    return session.execute(_ENUM_LABELS, names).scalars().all()


def unlogged_tables(session: Session, names: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the tables and partitions that a crash of the server empties.

    Each item is the name of a table, and whether the table is temporary.
    """
    return [(row.name, row.is_temporary) for row in session.execute(_UNLOGGED, {"names": [*names]})]


def is_unique(session: Session, name: str, column: Column[object]) -> bool:
    asked = text(
        "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a"
        " ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]"
        " WHERE i.indrelid = to_regclass(:name) AND i.indisunique AND i.indisvalid AND i.indimmediate"
        " AND (i.indpred IS NULL OR pg_get_expr(i.indpred, i.indrelid) = :partial)"
        " AND i.indexprs IS NULL AND i.indnkeyatts = 1 AND a.attname = :column)"
    )
    partial = f"({quoted(column.name)} IS NOT NULL)" if column.nullable else None
    return bool(session.scalar(asked, {"name": name, "column": column.name, "partial": partial}))


# what: whether a unique index (deferrable or not) exists on exactly this column · lock: none
# index: the catalogue's indexes
_HAS_UNIQUE_INDEX = text(
    """
    SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                   WHERE i.indrelid = to_regclass(:relation) AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1
                     AND a.attname = :column
                     AND coalesce(pg_get_expr(i.indpred, i.indrelid) = format('(%I IS NOT NULL)', a.attname), true))
    """
)


def has_unique_index(session: Session, table: Table, key: str) -> bool:
    """Return whether a unique index prevents equal values in this column.

    Several rows can have NULL in this column.
    """
    return bool(session.scalar(_HAS_UNIQUE_INDEX, {"relation": relation_name(table), "column": table.c[key].name}))


def notifies(session: Session | Connection, outbox: Table) -> bool:
    """Return whether the outbox has the enabled trigger of the optional migration ``notify``."""
    asked = {"relation": relation_name(outbox), "name": NOTIFY_TRIGGER}
    return bool(session.scalar(_HAS_TRIGGER, asked))
