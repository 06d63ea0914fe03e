"""Builds the SQL expressions that compare, order and lock ids of students and courses.

``schema.ids`` defines the rules. Two ids are the same if the column of ``purchases`` compares them
as equal. To compare two ids, SQL converts both into one form. If possible, SQL uses the form of the
column of ``purchases``. PostgreSQL can then use the indexes on the column. Otherwise SQL uses
*folded* texts. All ways to write an id have the same folded text.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    FromClause,
    Numeric,
    Text,
    and_,
    case,
    cast,
    func,
    literal,
    literal_column,
    true,
    type_coerce,
)
from sqlalchemy.types import NullType, UserDefinedType

from outbox_worker.schema.ids import DEFAULT_COLLATION, Fold, IdColumn, PairIds, SameId

LONGEST_FOLDED = 40_000
"""The longest id in a payload, in bytes, that SQL compares in lower case or by a collation.

A longer id counts as different from every id. There is a limit because PostgreSQL needs many times
the memory of the text. Also, no index can hold a longer id.
"""
_UUID_SHAPE = "________-____-____-____-____________"
_INTEGER_TEXT = r"^[+-]?[0-9]{1,40}$"
_NUMBER_TEXT = r"^[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$"
_LONGEST_NUMBER = 100
"""SQL cuts a number in a payload to this many characters.

A longer number does not match the patterns, even after the cut.
"""


class _Named(UserDefinedType[Any]):
    """A column type that SQLAlchemy does not know. ``name`` is the name of the type in SQL."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: object) -> str:
        return self.name


def same_pair(ids: PairIds, purchases: FromClause, payments: FromClause) -> ColumnElement[bool]:
    """Build the condition that a purchase and a payment have the same student and the same course."""
    forms = ((same, _of_purchase(same, purchases.c[key]), _of_payment(same, payments.c[key])) for key, same in ids)
    return and_(*(_equal(*each) for each in forms))


def has_pair(ids: PairIds, payments: FromClause, pairs: FromClause) -> ColumnElement[bool]:
    """Build the condition that a payment has the pair in a row of ``pairs``.

    ``pairs`` has the columns of ``comparable_pair``.
    """
    return and_(*(_equal(same, _of_payment(same, payments.c[key]), pairs.c[key]) for key, same in ids))


def comparable_pair(ids: PairIds, payments: FromClause, purchases: FromClause) -> list[ColumnElement[Any]]:
    """Build a payment's pair in the form in which ids are compared. If there is no payment, use the purchase."""
    return [
        func.coalesce(_of_payment(same, payments.c[key]), _of_purchase(same, purchases.c[key])).label(key)
        for key, same in ids
    ]


def written_order(ids: PairIds, payments: FromClause) -> list[ColumnElement[Any]]:
    """Build the order in which all workers write purchases: by student, then by course.

    Payments of one pair are next to each other, even if they write the ids in different ways.
    """
    return [_of_payment(same, payments.c[key]) for key, same in ids]


def grouped_purchases(ids: PairIds, purchases: FromClause) -> list[ColumnElement[Any]]:
    """Build the columns by which purchases of one pair are grouped."""
    return [_of_purchase(same, purchases.c[key]).label(key) for key, same in ids]


def has_grouped_pair(ids: PairIds, purchases: FromClause, grouped: FromClause) -> ColumnElement[bool]:
    """Build the condition that a purchase has the pair in a row of ``grouped``.

    ``grouped`` has the columns of ``grouped_purchases``.
    """
    return and_(*(_equal(same, _of_purchase(same, purchases.c[key]), grouped.c[key]) for key, same in ids))


def folded_pair(ids: PairIds, payments: FromClause, purchases: FromClause | None = None) -> list[ColumnElement[str]]:
    """Build the folded texts of a pair. Two pairs are the same exactly if both texts are equal.

    If the payment's row is missing, SQL reads the ids from ``purchases``. ``purchases`` is
    optional.
    """
    sources = [payments] if purchases is None else [payments, purchases]
    texts = [[_folded(same, source.c[key]) for source in sources] for key, same in ids]
    return [found[0] if len(found) == 1 else func.coalesce(*found) for found in texts]


def pair_key(ids: PairIds, payments: FromClause, purchases: FromClause | None = None) -> ColumnElement[int]:
    """Build the key (bigint) of a pair's advisory lock.

    Do not change this formula: other programs can compute the same key. docs/contract.md publishes
    the formula for ids that are compared as texts.
    """
    student, course = folded_pair(ids, payments, purchases)
    both = student + literal_column("':'") + course
    return func.hashtextextended(_collated(both, '"C"') if ids.mixes_collations else both, 0, type_=BigInteger)


def is_id(column: IdColumn, actual: ColumnElement[Any], given: str) -> ColumnElement[bool]:
    """Build the condition that an id equals this text. The database casts the text to the id's type."""
    return _equal_by_type(column, type_coerce(actual, NullType()), literal(given, NullType()))


def is_bought_id(same: SameId, actual: ColumnElement[Any], given: str) -> ColumnElement[bool]:
    """Build the condition that an id of a purchase is the same as this text."""
    if same.is_indexable:
        return is_id(same.bought, actual, given)
    return _folded(same, actual) == _folded(same, literal(given, Text()))


def differs(column: IdColumn, given: ColumnElement[str], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    """Build the condition that a text is not equal to this id.

    The type of the column decides which texts are equal: for an integer, 007 equals 7. The
    expression never raises an error, even if the type cannot hold the text.
    """
    written = cast(actual, Text)
    match column.kind:
        case "uuid":
            equal = case((given.like(_UUID_SHAPE), func.lower(given))) == written
        case "integer":
            equal = _equal_as_number(given, actual, _INTEGER_TEXT)
        case "numeric":
            equal = _equal_as_number(given, actual, _NUMBER_TEXT)
        case _:
            equal = _equal_as_text(column, given, written)
    return and_(given.is_not(None), equal.is_not(true()))


def number_differs(given: ColumnElement[str], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    """Build the condition that a text is not equal to this number."""
    return and_(given.is_not(None), _equal_as_number(given, actual, _NUMBER_TEXT).is_not(true()))


def _equal_as_number(given: ColumnElement[str], actual: ColumnElement[Any], shape: str) -> ColumnElement[bool]:
    short = func.left(given, _LONGEST_NUMBER)
    return case((short.op("~")(shape), cast(short, Numeric) == cast(actual, Numeric)), else_=~true())


def _equal_as_text(column: IdColumn, given: ColumnElement[str], written: ColumnElement[str]) -> ColumnElement[bool]:
    if column.type_name == "bpchar":
        given = _stripped(given)
    if column.type_name == "citext":
        equal = _lower(given) == _lower(written)
    elif column.loose_collation:
        equal = _collated(given, column.loose_collation) == written
    else:
        return given == written
    are_short = and_(*(func.octet_length(each) <= LONGEST_FOLDED for each in (given, written)))
    return case((are_short, equal), else_=~true())


def _of_payment(same: SameId, column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Convert a payment's id into the form in which ids are compared."""
    if not same.is_indexable:
        return _folded(same, column)
    paid, bought = same.paid, same.bought
    if bought.type_name == "citext" and paid.type_name != "citext":
        column = cast(column, _Named(f"{bought.type_schema}.citext"))
    elif same.pads:
        column = cast(column, _Named("bpchar"))
    elif paid.type_name == "bpchar" and bought.type_name != "bpchar":
        column = cast(column, Text)
    differ = bought.collation is not None and bought.collation != paid.collation
    return _collated(column, str(bought.collation)) if differ else column


def _of_purchase(same: SameId, column: ColumnElement[Any]) -> ColumnElement[Any]:
    return column if same.is_indexable else _folded(same, column)


def _equal(same: SameId, one: ColumnElement[Any], other: ColumnElement[Any]) -> ColumnElement[bool]:
    """Compare two ids in the form of the column of ``purchases``, or as folded texts.

    The SQL names the schema of the citext operator. The search path does not always contain this
    schema.
    """
    return _equal_by_type(same.bought, one, other) if same.is_indexable else one == other


def _equal_by_type(column: IdColumn, one: ColumnElement[Any], other: ColumnElement[Any]) -> ColumnElement[bool]:
    if column.type_name != "citext":
        return one == other
    return one.op(f"OPERATOR({column.type_schema}.=)", is_comparison=True, return_type=Boolean())(other)


def _folded(same: SameId, column: ColumnElement[Any]) -> ColumnElement[str]:
    if same.fold is Fold.TRIMMED:
        return cast(func.trim_scale(column), Text)
    written = _stripped(column) if same.pads else cast(column, Text)
    match same.fold:
        case Fold.LOWER:
            return _lower(written)
        case Fold.HASHED:
            return _hashed(_collated(written, str(same.loose_collation)))
        case _:
            return written


def _stripped(text: ColumnElement[Any]) -> ColumnElement[str]:
    return cast(cast(text, _Named("bpchar")), Text)


def _lower(text: ColumnElement[str]) -> ColumnElement[str]:
    """Convert a text to lower case as citext does: by the default collation of the database."""
    return func.lower(_collated(text, DEFAULT_COLLATION), type_=Text)


def _hashed(text: ColumnElement[str]) -> ColumnElement[str]:
    """Compute a hash of 128 bits.

    If the collation treats two texts as equal, they have the same hash.
    """
    halves = [cast(func.hashtextextended(text, literal_column(seed)), Text) for seed in ("0", "1")]
    return halves[0] + literal_column("' '") + halves[1]


def _collated(text: ColumnElement[Any], collation: str) -> ColumnElement[Any]:
    return text.op("COLLATE", precedence=15, return_type=text.type)(literal_column(collation))
