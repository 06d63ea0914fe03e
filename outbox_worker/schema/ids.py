"""Reads the types of student and course ids in payments and purchases, and finds out which ids are the same.

The shop may use other types in payments than in purchases, for example citext beside text. ``store.identity`` builds
the SQL expressions that follow from this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Connection, Table, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

DEFAULT_COLLATION = 'pg_catalog."default"'

INTEGERS = frozenset({"int2", "int4", "int8"})

TEXTS = frozenset({"text", "varchar", "bpchar", "citext"})

# what: the base types, scales and collations of two columns of a table · lock: none · index: the catalogue's own
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
    """The type of a column with ids. If the type is a domain, this is the type below the domain."""

    type_name: str = "uuid"
    type_schema: str = "pg_catalog"
    scale: int | None = None
    """The scale of a numeric column; None if it is unlimited."""
    collation: str | None = None
    """The qualified name of the collation; None if the type has no collation."""
    is_deterministic: bool = True

    def __str__(self) -> str:
        """Return the type for people, with its scale or with its collation if the collation is not the default."""
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
        """The kind of the type. Only two types of the same kind can be compared."""
        return "text" if self.type_name in TEXTS else "integer" if self.type_name in INTEGERS else self.type_name

    @property
    def loose_collation(self) -> str | None:
        """The collation, if it makes different texts equal. citext compares by its own rule and ignores it."""
        return None if self.is_deterministic or self.type_name == "citext" else self.collation


class Fold(StrEnum):
    """The way in which an id is converted to a text that is equal exactly if the ids are the same."""

    TEXT = "text"
    LOWER = "lower"
    """The text in lower case, as citext compares it."""
    TRIMMED = "trimmed"
    """A numeric without trailing zeros."""
    HASHED = "hashed"
    """A hash that respects the collation. SQL has no other text that is equal for equal ids of such a collation."""


@dataclass(frozen=True, slots=True)
class SameId:
    """The rule by which two ids are the same, for one column of payments and the same column of purchases.

    The type of the purchases' column decides, because the unique index compares by it. If the payments' type makes
    more ids equal (citext beside text), the payments' type decides. Then no plain index of purchases helps.
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
        """Whether trailing blanks in the payments' ids do not count, because purchases have char(n)."""
        return self.bought.type_name == "bpchar" and self.paid.type_name != "bpchar"

    @property
    def is_indexable(self) -> bool:
        """Whether the purchases' column itself compares ids by this rule, so that its indexes serve the comparison."""
        is_citext_only_paid = self.paid.type_name == "citext" and self.bought.type_name != "citext"
        return not is_citext_only_paid and self.paid.loose_collation in (None, self.bought.loose_collation)

    @property
    def flaw(self) -> str | None:
        """The reason why the two columns cannot be compared, as the end of a sentence; None if they can."""
        paid, bought = self.paid, self.bought
        if paid.kind != bought.kind:
            return "convert one of them, because the worker compares them with each other"
        loose = {each for each in (paid.loose_collation, bought.loose_collation) if each}
        if len(loose) > 1 or (loose and "citext" in (paid.type_name, bought.type_name)):
            return "give both columns the same type and collation, because each makes other ids equal"
        if bought.scale is not None and (paid.scale is None or paid.scale > bought.scale):
            return "give both columns the same scale, because purchases would round the ids of payments"
        return None


@dataclass(frozen=True, slots=True)
class PairIds:
    """The rules for student and course. Without a database, both ids are UUIDs."""

    student_id: SameId = SameId()
    course_id: SameId = SameId()

    def __iter__(self) -> Iterator[tuple[str, SameId]]:
        yield "student_id", self.student_id
        yield "course_id", self.course_id

    @property
    def is_indexable(self) -> bool:
        """Whether the purchases' columns themselves compare pairs by these rules."""
        return self.student_id.is_indexable and self.course_id.is_indexable

    @property
    def mixes_collations(self) -> bool:
        """Whether PostgreSQL cannot tell which collation a text made of both ids has."""
        columns = (column for _, same in self for column in (same.paid, same.bought))
        return len({each.collation for each in columns} - {None, DEFAULT_COLLATION}) > 1

    @property
    def has_public_key(self) -> bool:
        """Whether the key of a pair's lock is the public formula of docs/contract.md."""
        are_plain = all(same.fold is Fold.TEXT and not same.pads for _, same in self)
        return are_plain and not self.mixes_collations


UUIDS = PairIds()
"""The rules if both ids are UUIDs, as in the tables that the migrations create."""


def read_ids(session: Session | Connection, payments: Table, purchases: Table) -> dict[str, SameId]:
    """Read the rule for each id. A column that is missing has no rule."""
    paid, bought = _id_columns(session, payments), _id_columns(session, purchases)
    return {key: SameId(paid[key], bought[key]) for key in ("student_id", "course_id") if key in paid and key in bought}


def _id_columns(session: Session | Connection, table: Table) -> dict[str, IdColumn]:
    keys = {table.c[key].name: key for key in ("student_id", "course_id")}
    relation = postgresql.dialect().identifier_preparer.format_table(table)  # type: ignore[no-untyped-call]
    rows = session.execute(_ID_COLUMNS, {"relation": relation, "names": list(keys)})
    return {keys[name]: IdColumn(*facts) for name, *facts in rows}
