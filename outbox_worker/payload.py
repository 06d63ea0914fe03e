"""What the worker reads of a payload: five keys, as bounded text, inside the database.

Everything here is an SQL expression. The payload itself never travels: a document that PostgreSQL accepts can be one
that a client cannot decode (nesting, huge integers), and one such row would stop every batch behind it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Numeric, Table, Text, and_, case, cast, func, true
from sqlalchemy.dialects.postgresql import array

UUID_TEXT = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
"""8-4-4-4-12 in any case; PostgreSQL itself would take braces and missing hyphens too."""

_UUID_SHAPE = "________-____-____-____-____________"
_NUMBER_TEXT = r"^[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$"
_LONGEST = 100


def key_text(outbox: Table, key: str) -> ColumnElement[Any]:
    """The text of one payload key, cut to a bound; NULL where it is absent, null, or the payload is no object."""
    return func.left(outbox.c.payload.op("->>")(key), _LONGEST)


def payment_id_text(outbox: Table) -> ColumnElement[Any]:
    """The payload's ``payment_id`` in lower case where it is a UUID string; otherwise NULL."""
    lowered = func.lower(key_text(outbox, "payment_id"))
    return case((lowered.op("~")(UUID_TEXT), lowered))


def mismatches(outbox: Table, payments: Table) -> dict[str, ColumnElement[bool]]:
    """For each optional key: whether the payload repeats it and it differs from the payment row."""
    return {
        "student_id": _id_differs(key_text(outbox, "student_id"), payments.c.student_id),
        "course_id": _id_differs(key_text(outbox, "course_id"), payments.c.course_id),
        "amount": _amount_differs(key_text(outbox, "amount"), payments.c.amount),
        "currency": _differs(key_text(outbox, "currency"), cast(payments.c.currency, Text)),
    }


def mismatched_keys(outbox: Table, payments: Table) -> ColumnElement[Any]:
    """The names of the keys that differ, as text[]; {} where there is no payment row to differ from."""
    names = [case((differs, key)) for key, differs in mismatches(outbox, payments).items()]
    return func.array_remove(array[Any](names, type_=Text), None)


def _differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    return and_(given.is_not(None), given.is_distinct_from(actual))


def _id_differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    """A UUID may be written in any case; a course that is known by a text is that text."""
    lowered = case((given.like(_UUID_SHAPE), func.lower(given)), else_=given)
    return and_(_differs(given, cast(actual, Text)), _differs(lowered, cast(actual, Text)))


def _amount_differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    equal = case((given.op("~")(_NUMBER_TEXT), cast(given, Numeric) == actual), else_=~true())
    return and_(given.is_not(None), equal.is_not(true()))
