"""Reads the types of ids from the database, and finds out when two ids are the same.

The ids of students and courses can have one type in payments and another type in purchases, for
example citext and text. ``store.identity`` builds the SQL expressions that compare these ids. The
ids of payments and events are called *keys*. All tables have the same kind of payment ids: uuid,
integer or text. All tables also have the same kind of event ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, Connection, Dialect, Table, Text, TypeDecorator, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from outbox_worker.keys import KeyKind

DEFAULT_COLLATION = 'pg_catalog."default"'

INTEGERS = frozenset({"int2", "int4", "int8"})

TEXTS = frozenset({"text", "varchar", "bpchar", "citext"})

# what: the base types, scales and collations of id columns of a table · lock: none
# index: the catalogue's indexes
_ID_COLUMNS = text(
    """
    WITH RECURSIVE up (attname, attcollation, typmod, oid) AS (
        SELECT a.attname, a.attcollation, a.atttypmod, a.atttypid FROM pg_attribute a
        WHERE a.attrelid = to_regclass(:relation) AND a.attname = ANY(:names) AND NOT a.attisdropped
        UNION ALL
        SELECT up.attname, up.attcollation, t.typtypmod, t.typbasetype
        FROM up JOIN pg_type t ON t.oid = up.oid WHERE t.typtype = 'd')
    SELECT up.attname, CAST(t.typname AS text), CAST(quote_ident(n.nspname) AS text),
           CASE WHEN up.typmod > 3 AND t.typname = 'numeric' THEN ((up.typmod - 4) & 2047 # 1024) - 1024 END,
           quote_ident(cn.nspname) || '.' || quote_ident(c.collname), coalesce(c.collisdeterministic, true)
    FROM up JOIN pg_type t ON t.oid = up.oid JOIN pg_namespace n ON n.oid = t.typnamespace
    LEFT JOIN pg_collation c ON c.oid = up.attcollation LEFT JOIN pg_namespace cn ON cn.oid = c.collnamespace
    WHERE t.typtype <> 'd'
    """
)


@dataclass(frozen=True, slots=True)
class IdColumn:
    """The type of a column with ids. For a domain, ``type_name`` is the base type of the domain."""

    type_name: str = "uuid"
    type_schema: str = "pg_catalog"
    scale: int | None = None
    """The scale of a numeric column. The value is None if the scale has no limit."""
    collation: str | None = None
    """The qualified name of the collation. The value is None if the type has no collation."""
    is_deterministic: bool = True

    def __str__(self) -> str:
        """Return the type as a text for messages.

        Add the scale of a numeric type. Add a collation that is not the default.
        """
        if self.type_name == "numeric" and self.scale is not None:
            return f"numeric with {self.scale} decimals"
        is_plain = self.collation in (None, DEFAULT_COLLATION) or self.type_name == "citext"
        return self.type_name if is_plain else f"{self.type_name} COLLATE {self.collation}"

    @property
    def sql_type(self) -> str:
        """The type in SQL, with its schema and collation."""
        collate = "" if self.collation in (None, DEFAULT_COLLATION) else f" COLLATE {self.collation}"
        return f"{self.type_schema}.{self.type_name}{collate}"

    @property
    def kind(self) -> str:
        """The kind of the type, for example integer.

        The worker can compare two columns only if both have the same kind.
        """
        return "text" if self.type_name in TEXTS else "integer" if self.type_name in INTEGERS else self.type_name

    @property
    def loose_collation(self) -> str | None:
        """The collation if it treats different texts as equal.

        Otherwise, the value is None. For citext, the value is always None.
        """
        return None if self.is_deterministic or self.type_name == "citext" else self.collation


class Fold(StrEnum):
    """The conversion of an id to a text. Two texts are equal exactly if the ids are the same."""

    TEXT = "text"
    LOWER = "lower"
    """The text in lower case. citext ignores upper and lower case."""
    TRIMMED = "trimmed"
    """The text of a numeric id without trailing zeros."""
    HASHED = "hashed"
    """A hash that PostgreSQL computes by the collation.

    No other function returns equal texts for equal ids.
    """


@dataclass(frozen=True, slots=True)
class SameId:
    """The rule that says when an id in payments and an id in purchases are the same.

    The unique index compares ids by the column type in purchases. Normally, the type in purchases
    decides. The type in payments decides if it treats more ids as equal (citext instead of text).
    PostgreSQL then cannot use a plain index on purchases.
    """

    paid: IdColumn = IdColumn()
    bought: IdColumn = IdColumn()

    @property
    def fold(self) -> Fold:
        if self.bought.type_name == "numeric":
            return Fold.TRIMMED
        if "citext" in (self.paid.type_name, self.bought.type_name):
            return Fold.LOWER
        return Fold.HASHED if self.loose_collation else Fold.TEXT

    @property
    def loose_collation(self) -> str | None:
        return self.paid.loose_collation or self.bought.loose_collation

    @property
    def pads(self) -> bool:
        """True if the comparison ignores trailing blanks in ids of payments.

        Only the column in purchases then has the type char(n).
        """
        return self.bought.type_name == "bpchar" and self.paid.type_name != "bpchar"

    @property
    def is_indexable(self) -> bool:
        """True if PostgreSQL compares ids in the column of purchases by this rule.

        PostgreSQL can then use the indexes on the column of purchases.
        """
        is_citext_only_paid = self.paid.type_name == "citext" and self.bought.type_name != "citext"
        return not is_citext_only_paid and self.paid.loose_collation in (None, self.bought.loose_collation)

    @property
    def flaw(self) -> str | None:
        """The remedy and its reason if the worker cannot compare the two columns.

        The value is None if the worker can compare the columns.
        """
        paid, bought = self.paid, self.bought
        if paid.kind != bought.kind:
            return "convert one of the two columns, because the worker compares the ids in both"
        loose = {each for each in (paid.loose_collation, bought.loose_collation) if each}
        if len(loose) > 1 or (loose and "citext" in (paid.type_name, bought.type_name)):
            return "give both columns the same type and collation, because each has its own rule for equal ids"
        if bought.scale is not None and (paid.scale is None or paid.scale > bought.scale):
            return "give both columns the same scale, because purchases would round the ids of payments"
        return None


@dataclass(frozen=True, slots=True)
class PairIds:
    """The rules for comparing student ids and course ids. The defaults are the rules for UUIDs."""

    student_id: SameId = SameId()
    course_id: SameId = SameId()

    def __iter__(self) -> Iterator[tuple[str, SameId]]:
        yield "student_id", self.student_id
        yield "course_id", self.course_id

    @property
    def is_indexable(self) -> bool:
        """True if PostgreSQL compares student and course ids in purchases by these rules."""
        return self.student_id.is_indexable and self.course_id.is_indexable

    @property
    def mixes_collations(self) -> bool:
        """True if the id columns have two or more collations. The default collation does not count.

        PostgreSQL then cannot choose a collation for a text that contains both ids.
        """
        columns = (column for _, same in self for column in (same.paid, same.bought))
        return len({each.collation for each in columns} - {None, DEFAULT_COLLATION}) > 1

    @property
    def has_public_key(self) -> bool:
        """True if the formula in docs/contract.md gives the lock key of a student and a course."""
        are_plain = all(same.fold is Fold.TEXT and not same.pads for _, same in self)
        return are_plain and not self.mixes_collations


UUIDS = PairIds()
"""The rules if both ids are UUIDs. The tables that the migrations create contain UUIDs."""


class _IntegerKey(TypeDecorator[str]):
    """The type of a column with integer ids. In Python, an integer id is a text."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> int | None:  # noqa: ARG002 - the library's
        return None if value is None else int(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002 - the library's
        return None if value is None else str(value)


KEY_TYPES: Mapping[KeyKind, TypeEngine[Any]] = {
    KeyKind.UUID: UUID(as_uuid=True),
    KeyKind.INTEGER: _IntegerKey(),
    KeyKind.TEXT: Text(),
}
"""The SQLAlchemy types of columns with keys."""

KEY_KINDS = {
    "uuid": KeyKind.UUID,
    **dict.fromkeys(INTEGERS, KeyKind.INTEGER),
    **dict.fromkeys(("text", "varchar"), KeyKind.TEXT),
}
"""Maps the base type of a column to the kind of the ids in the column.

Types that ignore differences are missing, for example citext and char(n). The worker also compares
keys as texts.
"""


def read_ids(session: Session | Connection, payments: Table, purchases: Table) -> dict[str, SameId]:
    """Return the comparison rule for each id column. Omit columns that one of the tables lacks."""
    both = ("student_id", "course_id")
    paid, bought = id_columns(session, payments, both), id_columns(session, purchases, both)
    return {key: SameId(paid[key], bought[key]) for key in both if key in paid and key in bought}


def id_columns(session: Session | Connection, table: Table, of: Collection[str]) -> dict[str, IdColumn]:
    """Return the types of these columns, by column key. Omit columns that the database lacks."""
    keys = {table.c[key].name: key for key in of}
    relation = postgresql.dialect().identifier_preparer.format_table(table)  # type: ignore[no-untyped-call]
    rows = session.execute(_ID_COLUMNS, {"relation": relation, "names": list(keys)})
    return {keys[name]: IdColumn(*facts) for name, *facts in rows}
