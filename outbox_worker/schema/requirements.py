"""Checks whether the database has the tables, columns and privileges that the worker needs.

Each problem has a finding (what is wrong) and a remedy.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Boolean, Column, Integer, Numeric, String, Table, Text, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSON, JSONB, UUID
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateColumn
from sqlalchemy.types import DateTime, TypeEngine

from outbox_worker.errors import SchemaError
from outbox_worker.keys import KeyKind
from outbox_worker.schema.catalogue import (
    ActualColumn,
    actual_columns,
    exists,
    is_owned,
    is_unique,
    read_ahead,
    role_name,
)
from outbox_worker.schema.ids import INTEGERS, KEY_KINDS, TEXTS, id_columns, read_ids
from outbox_worker.schema.partitions import can_be_unique
from outbox_worker.schema.privileges import (
    CLOSED_SCHEMAS,
    PRIVILEGES,
    Privileges,
    RoleKind,
    in_grant,
    kind_for,
    kind_of_role,
    lacking,
    may,
)
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.shapes import (
    find_generated,
    find_keys_to_outbox,
    find_rules,
    find_unwritable_view,
    name_the_table,
    noun_of_view,
)
from outbox_worker.schema.tables import EVENT_KEYS, PAYMENT_KEYS, Tables, quoted, relation_name

_INSERTED_INTO = ("purchases", "processed_events", "dead_letters", "workers", "backfill_runs")

_LEFT_TO_DEFAULTS = (("purchases", "id"),)
"""Columns that the worker's INSERT statements omit. PostgreSQL writes the default values."""

_ADDED_LATER = {
    ("workers", key) for key in ("succeeded_at", "isolated_event", "isolated_at", "isolated_timeline", "set_aside")
}
"""Columns that a later migration added to our own tables.

Tables that an older version created lack these columns.
"""

NEVER_READ = (("payments", "updated_at"),)
"""Columns that the worker neither reads nor writes."""

_UPSERTED_BY = {"processed_events": "event_id", "dead_letters": "event_id", "purchases": "payment_id"}
"""Maps each table to the column that the worker's ON CONFLICT names. This column must be unique.

If the column can be NULL, its unique index is allowed to omit rows with NULL.
"""

_KEYS = {"uuid", *INTEGERS, *TEXTS}

_IDS = {*_KEYS, "numeric"}
"""The allowed types for ids of students and courses. A domain on these types is also allowed."""

_DOCUMENTS: Mapping[str, TypeEngine[Any]] = {"json": JSON(), "text": Text(), "varchar": Text()}
"""The types that are allowed for ``outbox.payload`` in addition to jsonb."""

_FITTING: dict[type[TypeEngine[Any]], set[str]] = {
    UUID: {"uuid"},
    JSONB: {"jsonb"},
    Boolean: {"bool"},
    DateTime: {"timestamptz"},
    Numeric: {"numeric"},
    Integer: {*INTEGERS},
    String: {*TEXTS},
}


def check_schema(session: Session, tables: Tables, privileges: Privileges = PRIVILEGES) -> Tables:
    """Check the database. Return the tables with the column types that the database has.

    Raises SchemaError if anything is missing or does not fit. The message lists every problem.
    """
    problems = find_problems(session, tables, privileges)
    if problems:
        raise SchemaError(f"The database lacks something that the worker needs.\n{list_problems(problems)}")
    return with_types_as_found(session, tables, privileges)


def with_types_as_found(session: Session, tables: Tables, roles: Collection[str]) -> Tables:
    """Return the tables with the types of ids and of ``outbox.payload`` in this database.

    The function reads only the tables whose role is in ``roles``.
    """
    if {"payments", "purchases"} <= {*roles}:
        tables = tables.with_ids(read_ids(session, tables.payments, tables.purchases))
    payments, events = (_key_kinds(session, tables, keys, roles) for keys in (PAYMENT_KEYS, EVENT_KEYS))
    tables = tables.with_keys(next(iter(payments), KeyKind.UUID), next(iter(events), KeyKind.UUID))
    if "outbox" not in roles:
        return tables
    found = actual_columns(session, relation_name(tables.outbox)).get(tables.outbox.c.payload.name)
    kind = _DOCUMENTS.get(found.type_name) if found else None
    return tables.with_documents(kind) if kind else tables


def _key_kinds(
    session: Session, tables: Tables, keys: Sequence[tuple[str, str]], roles: Collection[str]
) -> list[KeyKind]:
    """Return the kinds of the ids in these columns, in the same order.

    Omit missing columns and columns of an unsuitable type.
    """
    found = (KEY_KINDS.get(actual.base_type) for _, _, actual in _key_columns(session, tables, keys, roles))
    return [kind for kind in found if kind]


def _key_columns(
    session: Session, tables: Tables, keys: Sequence[tuple[str, str]], roles: Collection[str]
) -> Iterator[tuple[str, str, ActualColumn]]:
    """Yield the role, the key and the type of each existing column in tables of these roles."""
    for role, key in keys:
        if role in roles:
            table: Table = getattr(tables, role)
            actual = actual_columns(session, relation_name(table)).get(table.c[key].name)
            if actual is not None:
                yield role, key, actual


def find_problems(session: Session, tables: Tables, privileges: Privileges = PRIVILEGES) -> list[SchemaProblem]:
    """Check the tables in ``privileges``. Return a problem for everything that is missing or does not fit.

    Rounding of amounts counts as a problem only if ``privileges`` contain the right to write purchases.
    """
    by_role = {role: table for role, table in tables.by_role().items() if role in privileges}
    closed = set(session.scalars(CLOSED_SCHEMAS, {"schemas": [table.schema for table in by_role.values()]}))
    seen = {role: table for role, table in by_role.items() if table.schema not in closed}
    read_ahead(session, seen.values())
    present = {role: table for role, table in seen.items() if exists(session, table)}
    tables = with_types_as_found(session, tables, present)
    present = {role: getattr(tables, role) for role in present}
    return [
        *_closed_problems(session, closed),
        *_absent_problems([relation_name(table) for role, table in seen.items() if role not in present]),
        *_privilege_problems(session, tables, present, privileges),
        *_misfits(session, tables, present),
        *(find_rounding(session, tables) if _may_write_purchases(privileges, present) else ()),
    ]


def _may_write_purchases(privileges: Privileges, present: Collection[str]) -> bool:
    return {"payments", "purchases"} <= {*present} and [*privileges["purchases"]] != ["SELECT"]


def find_misfits(session: Session, tables: Tables, *, of_others: bool = False) -> list[SchemaProblem]:
    """Return the problems with columns, types, defaults and unique keys of existing tables.

    This function does not check privileges. If ``of_others`` is true, it checks only tables of other applications.
    """
    present = {role: table for role, table in tables.by_role().items() if exists(session, table)}
    tables = with_types_as_found(session, tables, present)
    looked_at = {
        role: getattr(tables, role) for role in present if not (of_others and is_owned(session, present[role]))
    }
    rounding = find_rounding(session, tables) if "purchases" in looked_at else []
    return [*_misfits(session, tables, looked_at), *rounding]


def find_rounding(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a problem if PostgreSQL would round amounts of payments when the worker copies them into purchases.

    PostgreSQL rounds without an error. The worker therefore refuses to start.
    """
    pair = _pair_of_columns(session, tables, "amount")
    if pair is None:
        return []
    if not _rounds(*pair):
        return []
    return [_narrower(session, tables, "amount", pair, "so PostgreSQL would round amounts without an error")]


def find_narrower(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a problem for each column of purchases that is too narrow for some values of payments.

    PostgreSQL rejects a value that is too long or too large. Only the event with this value fails.
    The worker can therefore start.
    """
    return [
        _narrower(session, tables, key, pair, f"so PostgreSQL refuses purchases with {consequence}")
        for key, consequence in (("amount", "larger amounts"), ("currency", "longer currencies"))
        if (pair := _pair_of_columns(session, tables, key)) is not None and _is_narrower(*pair)
    ]


def _rounds(paid: ActualColumn, bought: ActualColumn) -> bool:
    return bought.decimals is not None and (paid.decimals is None or paid.decimals > bought.decimals)


def _is_narrower(paid: ActualColumn, bought: ActualColumn) -> bool:
    if bought.limit is None or _rounds(paid, bought) or (bought.is_string and not (paid.is_string or paid.is_enum)):
        return False
    return paid.limit is None or paid.limit > bought.limit


def _pair_of_columns(session: Session, tables: Tables, key: str) -> tuple[ActualColumn, ActualColumn] | None:
    """Return a column of payments, and the column of purchases into which the worker copies it.

    Return None if one of the two columns is missing. Return None if purchases is a view:
    ``find_unwritable_view`` reports the view.
    """
    if find_unwritable_view(session, "purchases", tables.purchases):
        return None
    found = [
        actual_columns(session, relation_name(table)).get(table.c[key].name)
        for table in (tables.payments, tables.purchases)
    ]
    paid, bought = found
    return None if paid is None or bought is None else (paid, bought)


def _narrower(
    session: Session, tables: Tables, key: str, pair: tuple[ActualColumn, ActualColumn], consequence: str
) -> SchemaProblem:
    paid, bought = pair
    purchases, wanted = relation_name(tables.purchases), paid.written_type if paid.is_string else "text"
    if key == "amount":
        wanted = "numeric"
    finding = (
        f"column {purchases}.{tables.purchases.c[key].name} is {bought.written_type}, narrower than "
        f"{relation_name(tables.payments)}.{tables.payments.c[key].name} ({paid.written_type}), {consequence}"
    )
    if key == "amount" and not bought.is_used and is_owned(session, tables.purchases):
        return SchemaProblem(finding, "run `outbox-worker migrate`")
    ddl = f"ALTER TABLE {purchases} ALTER COLUMN {quoted(tables.purchases.c[key].name)} TYPE {wanted};"
    locks = " (it rewrites the table; nobody can read or write the table meanwhile)" if key == "currency" else ""
    first = "drop the views, triggers and policies that use the column, and create them again after this statement: "
    return SchemaProblem(finding, f"as the table's owner: {first if bought.is_used else ''}{ddl}{locks}")


def list_problems(problems: Sequence[SchemaProblem]) -> str:
    """Format the problems with their remedies as lines for people."""
    return "\n".join(f"  {problem.finding}\n    → {problem.remedy}" for problem in problems)


def _closed_problems(session: Session, schemas: Collection[str]) -> Iterator[SchemaProblem]:
    for schema in sorted(schemas):
        yield SchemaProblem(
            f"no USAGE on the schema {schema}",
            f"as its owner: GRANT USAGE ON SCHEMA {quoted(schema)} TO {role_name(session)};",
        )


def _absent_problems(names: Collection[str]) -> Iterator[SchemaProblem]:
    if names:
        missing = "this table is missing" if len(names) == 1 else "these tables are missing"
        yield SchemaProblem(
            f"{missing}: {', '.join(names)}", "run `outbox-worker migrate`, or name your tables in OUTBOX_TABLES"
        )


def _privilege_problems(
    session: Session, tables: Tables, present: Mapping[str, Table], privileges: Privileges
) -> Iterator[SchemaProblem]:
    """Report missing privileges.

    The remedy is usually a GRANT. If the role is for another task, the remedy is to run the command
    as the right role. For example, a role that only reads must not get the right to write.
    """
    missing = lacking(session, present, privileges)
    if not missing:
        return
    actual, needed = kind_of_role(session, _visible(session, tables)), kind_for(privileges)
    if actual is not None and actual is not needed:
        missing = yield from _for_another_role(session, present, missing, actual, needed)
    for role, names in missing.items():
        table, name = present[role], relation_name(present[role])
        granted = ", ".join(in_grant(table, each, privileges[role][each]) for each in names)
        grant = f"as its owner: GRANT {granted} ON {name} TO {role_name(session)};"
        is_new = _is_newer_than_grants(session, present, privileges, role, missing)
        yield SchemaProblem(
            f"no {', '.join(names)} on {name}", f"{_run_again(session)}, or {grant}" if is_new else grant
        )


_TASKS = {
    RoleKind.WORKER: "a worker",
    RoleKind.OPERATOR: "an operator, who decides on dead letters and runs backfills",
    RoleKind.READER: "reading, and may write nothing",
}


def _for_another_role(
    session: Session, present: Mapping[str, Table], missing: dict[str, list[str]], actual: RoleKind, needed: RoleKind
) -> Generator[SchemaProblem, None, dict[str, list[str]]]:
    """Report all missing write privileges as a single problem. Return missing SELECT privileges."""
    writes = {role: [each for each in names if each != "SELECT"] for role, names in missing.items()}
    if listed := [f"{', '.join(names)} on {relation_name(present[role])}" for role, names in writes.items() if names]:
        yield SchemaProblem(
            f"the role {role_name(session)} is for {_TASKS[actual]}; this command needs {'; '.join(listed)}",
            f"run this command as the role for {_TASKS[needed].partition(',')[0]} (in grants.sql: {needed}); "
            "`outbox-worker files grants.sql` prints the file that creates a role for each task",
        )
    reads = {role: [each for each in names if each == "SELECT"] for role, names in missing.items()}
    return {role: names for role, names in reads.items() if names}


def _visible(session: Session, tables: Tables) -> dict[str, Table]:
    """Return the existing tables in schemas that the role is allowed to use."""
    by_role = tables.by_role()
    closed = set(session.scalars(CLOSED_SCHEMAS, {"schemas": [table.schema for table in by_role.values()]}))
    return {role: table for role, table in by_role.items() if table.schema not in closed and exists(session, table)}


def _is_newer_than_grants(
    session: Session,
    present: Mapping[str, Table],
    privileges: Privileges,
    role: str,
    missing: Mapping[str, Sequence[str]],
) -> bool:
    """Return whether grants.sql probably ran before a migration created the table or its columns.

    The function returns True only if our migrations created the table, and the role has all needed
    privileges on another table. In addition, the role must have no privilege on this table, or lack
    only UPDATE on some columns.
    """
    table, needed = present[role], privileges[role]
    is_granted_elsewhere = any(privileges[other] for other in present if other not in missing)
    if not is_granted_elsewhere or not is_owned(session, table):
        return False
    has_nothing = not any(may(session, table, each, ()) for each in needed)
    lacks_columns = [*missing[role]] == ["UPDATE"] and may(session, table, "UPDATE", ())
    return has_nothing or lacks_columns


def _run_again(session: Session) -> str:
    """Return the remedy if nobody ran grants.sql again after a migration.

    The remedy contains the command that runs grants.sql.
    """
    database: str = session.scalars(text("SELECT current_database()")).one()
    pipe = f"outbox-worker files grants.sql | psql -d {shlex.quote(database)}"
    return (
        "grants.sql was not run again after `outbox-worker migrate`. Run it with the same variables (-v) as the last "
        f"time: {pipe}"
    )


def _misfits(session: Session, tables: Tables, present: Mapping[str, Table]) -> Iterator[SchemaProblem]:
    for role, table in present.items():
        if unwritable := find_unwritable_view(session, role, table):
            yield unwritable
        else:
            yield from _table_misfits(session, role, table)
            yield from find_generated(session, role, table)
            yield from find_rules(session, role, table)
            if "outbox" in present:
                yield from find_keys_to_outbox(session, role, table, tables.outbox)
    if {"payments", "purchases"} <= present.keys():
        yield from _pair_misfits(session, tables)
    for keys, noun in ((PAYMENT_KEYS, "payments"), (EVENT_KEYS, "events")):
        yield from _key_misfits(session, tables, keys, noun, present)


def _key_misfits(
    session: Session, tables: Tables, keys: Sequence[tuple[str, str]], noun: str, present: Collection[str]
) -> Iterator[SchemaProblem]:
    """Report columns of payment ids or event ids that do not fit.

    All columns must have the same kind of ids as the first column.
    """
    first: tuple[str, ActualColumn] | None = None
    for role, key, found in _key_columns(session, tables, keys, present):
        table: Table = getattr(tables, role)
        name, kind = f"{relation_name(table)}.{table.c[key].name}", KEY_KINDS.get(found.base_type)
        if kind is KeyKind.TEXT and not id_columns(session, table, [key])[key].is_deterministic:
            yield SchemaProblem(
                f"{name} has a collation that treats different texts as equal, but the worker compares the ids of "
                f"{noun} as texts, too",
                "give the column a deterministic collation",
            )
        elif first is None:
            first = name, found
        elif kind and (wanted := KEY_KINDS.get(first[1].base_type)) and kind is not wanted:
            yield SchemaProblem(
                f"{first[0]} is {first[1].written_type} and {name} is {found.written_type}",
                f"convert one of the two columns, because both contain the ids of {noun}",
            )
        elif (role, key) == ("processed_events", "event_id") and found.base_type in ("int2", "int4"):
            yield SchemaProblem(
                f"{name} is {found.written_type}, but a backfill writes event ids that only bigint can hold",
                f"as the table's owner: ALTER TABLE {relation_name(tables.processed_events)} "
                f"ALTER COLUMN {quoted(tables.processed_events.c.event_id.name)} TYPE bigint; "
                "(it rewrites the table; nobody can read or write the table meanwhile)",
            )


def _table_misfits(session: Session, role: str, table: Table) -> Iterator[SchemaProblem]:
    name = relation_name(table)
    actual = actual_columns(session, name)
    added = [column for column in table.columns if column.name not in actual and (role, column.key) in _ADDED_LATER]
    if added and is_owned(session, table):
        yield _not_migrated(name, added)
    else:
        added = []
    noun = noun_of_view(session, table)
    for column in table.columns:
        if (role, column.key) not in NEVER_READ and column not in added:
            yield from _column_problems(name, role, column, actual, noun)
    yield from _unwritten_problems(name, role, table, actual)
    if role in _UPSERTED_BY and not is_unique(session, name, table.c[_UPSERTED_BY[role]]):
        yield _not_unique(session, role, table)


def _not_unique(session: Session, role: str, table: Table) -> SchemaProblem:
    name, column = relation_name(table), table.c[_UPSERTED_BY[role]]
    finding = f"{name}.{column.name} is not unique"
    if can_be_unique(session, table, [column.key]):
        return SchemaProblem(finding, f"ALTER TABLE {name} ADD UNIQUE ({quoted(column.name)});")
    return SchemaProblem(
        f"{finding}, and the table is partitioned by other columns: a unique key must contain the partition key",
        f"name a table in OUTBOX_TABLES ({role}=…) that is not partitioned, or partition it by {quoted(column.name)}",
    )


def _not_migrated(name: str, columns: Sequence[Column[object]]) -> SchemaProblem:
    added = ", ".join(f"ADD COLUMN {_written(column)}" for column in columns)
    return SchemaProblem(
        f"{name} lacks {', '.join(column.name for column in columns)}, because an older version migrated this database",
        f"run `outbox-worker migrate`; only if it has run already: ALTER TABLE {name} {added};",
    )


def _written(column: Column[object]) -> str:
    """Return the definition of a column in the form that CREATE TABLE takes."""
    return str(CreateColumn(column).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]


def _addable(column: Column[object]) -> str:
    """Return the definition of a column that can be added to a table with rows.

    If a table has rows, PostgreSQL refuses a new NOT NULL column without a default. This definition
    therefore permits NULL for columns without a default. The worker still starts, and ``doctor``
    prints the statement that forbids NULL.
    """
    written = _written(column)
    return written if column.server_default is not None else written.removesuffix(" NOT NULL")


def _pair_misfits(session: Session, tables: Tables) -> Iterator[SchemaProblem]:
    """Report id columns that the worker cannot compare between payments and purchases.

    The checked columns are ``student_id`` and ``course_id``.
    """
    for key, same in read_ids(session, tables.payments, tables.purchases).items():
        if same.flaw:
            paid, bought = (f"{relation_name(each)}.{each.c[key].name}" for each in (tables.payments, tables.purchases))
            yield SchemaProblem(f"{paid} is {same.paid} and {bought} is {same.bought}", same.flaw)


def _column_problems(
    name: str, role: str, column: Column[object], columns: Mapping[str, ActualColumn], noun: str | None
) -> Iterator[SchemaProblem]:
    actual = columns.get(column.name)
    if actual is None and role == "payments":
        near = difflib.get_close_matches(column.name, columns, 1)
        hint = f"did you mean {near[0]}?" if near else f"its columns are {', '.join(columns)}"
        yield SchemaProblem(
            f"column {name}.{column.name} is missing", f"set its name in OUTBOX_COLUMNS ({role}.{column.key}=…): {hint}"
        )
    elif actual is None:
        ddl = f"ALTER TABLE {name} ADD COLUMN {_addable(column)};"
        yield SchemaProblem(
            f"column {name}.{column.name} is missing",
            f"set the name of your column in OUTBOX_COLUMNS ({role}.{column.key}=…), or: "
            f"{name_the_table(role, noun) if noun else ddl}",
        )
    elif not _fits(role, column, actual):
        wanted = column.type.compile(dialect=postgresql.dialect()).lower()  # type: ignore[no-untyped-call]
        if isinstance(column.type, Numeric) and actual.type_name in INTEGERS:
            wanted += "; amounts are whole units of the currency, not cents"
        if (role, column.key) in (*PAYMENT_KEYS, *EVENT_KEYS):
            wanted = "uuid, integer, bigint, text or varchar"
        yield SchemaProblem(
            f"column {name}.{column.name} is {actual.type_name}, not {wanted}",
            f"convert the column, or set another column in OUTBOX_COLUMNS ({role}.{column.key}=…)",
        )


def _fits(role: str, column: Column[object], actual: ActualColumn) -> bool:
    if (role, column.key) in (*PAYMENT_KEYS, *EVENT_KEYS):
        return actual.base_type in KEY_KINDS
    if column.key in ("student_id", "course_id"):
        return actual.base_type in _IDS
    if (role, column.key) in (("payments", "status"), ("payments", "currency"), ("purchases", "id")):
        return actual.is_enum or actual.type_name in _KEYS
    if (role, column.key) == ("outbox", "payload"):
        return actual.type_name in ("jsonb", *_DOCUMENTS)
    return any(isinstance(column.type, kind) and actual.type_name in names for kind, names in _FITTING.items())


def _unwritten_problems(name: str, role: str, table: Table, actual: dict[str, ActualColumn]) -> Iterator[SchemaProblem]:
    """Report columns that are NOT NULL and have no default, if the worker does not write them."""
    if role not in _INSERTED_INTO:
        return
    written = {column.name for column in table.columns if (role, column.key) not in _LEFT_TO_DEFAULTS}
    for column_name, column in actual.items():
        if column.must_be_written and column_name not in written:
            yield SchemaProblem(
                f"column {name}.{column_name} must have a value, has no default, and the worker does not write it",
                f"set a default, or: ALTER TABLE {name} ALTER COLUMN {quoted(column_name)} DROP NOT NULL;",
            )
