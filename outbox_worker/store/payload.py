"""What the worker reads of a payload: five keys, as bounded text.

Of a jsonb column they are read inside the database, by SQL expressions, and the payload never travels: a document that
PostgreSQL accepts can be one that a client cannot decode (nesting, huge integers).

A json or text column (its values are *documents*) holds what jsonb would refuse: NUL, lone surrogates, NaN, no JSON at
all. One such row fails the statement that asks for a key, with all other rows. So documents travel, bounded, and are
read here one by one; what cannot be read is an unusable payload, and nobody else's trouble.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from sqlalchemy import ColumnElement, FromClause, Numeric, Text, and_, case, cast, false, func, true
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, array

from outbox_worker.database.arrays import ArrayText
from outbox_worker.model import Repeated

_UUID_SHAPE = "________-____-____-____-____________"
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_IS_UUID = re.compile(_UUID, re.ASCII).fullmatch
_ARE_UUIDS = re.compile(rf"\{{{_UUID}(?:,{_UUID})*\}}", re.ASCII).fullmatch
_ELEMENTS = re.compile(r'"((?:[^"\\]|\\.)*)"|([^,]+)', re.DOTALL)
"""Of an array's text: an element in quotes, or one without."""
_NUMBER_TEXT = r"^[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$"
_LONGEST = 100

LONGEST_DOCUMENT = 262_144
"""Bytes. A document is read by the client, a thousand of them at a time: a longer one is not usable."""
_LONGEST_KEPT = 100_000_000
"""Characters of a document in its dead letter; jsonb takes no string of 256 MB."""
_NEVER_EQUAL = "\N{REPLACEMENT CHARACTER}"
_PAYMENT_ID_IN_DOCUMENT = rf'"payment_id"\s*:\s*"({_UUID.replace("a-f", "a-fA-F")})"'
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
"""Of JSON: a string, or a bracket."""


def is_document(outbox: FromClause) -> bool:
    """Whether payloads are text to the database: the column's type is json or text."""
    return not isinstance(outbox.c.payload.type, JSONB)


def document(outbox: FromClause) -> ColumnElement[Any]:
    """The payload as text; NULL where it is too long to be read."""
    written = cast(outbox.c.payload, Text)
    return case((func.octet_length(written) <= LONGEST_DOCUMENT, written))


def to_dead_letter(outbox: FromClause) -> ColumnElement[Any]:
    """The payload as its dead letter keeps it, a jsonb: itself, or a document as one string, as it was written."""
    if not is_document(outbox):
        return outbox.c.payload
    return func.to_jsonb(func.left(cast(outbox.c.payload, Text), _LONGEST_KEPT))


def from_dead_letter(kept: ColumnElement[Any], outbox: FromClause) -> ColumnElement[Any]:
    """What a dead letter keeps, as a payload of the outbox again."""
    if not is_document(outbox):
        return kept
    is_string = func.jsonb_typeof(kept) == "string"
    text = case((is_string, kept.op("#>>", return_type=Text())(cast(array([]), ARRAY(Text)))), else_=cast(kept, Text))
    return cast(text, outbox.c.payload.type)


def claim_columns(outbox: FromClause) -> ColumnElement[Any]:
    """What a client reads of an event's payload: the ``candidate`` for the payment's id, or the whole ``document``."""
    return (
        document(outbox).label("document") if is_document(outbox) else payment_id_candidate(outbox).label("candidate")
    )


def read_claim_columns(outbox: FromClause, found: str | None) -> tuple[str | None, Repeated]:
    """Read a value of ``claim_columns``: the payment's usable id, or None, and the optional keys of a document."""
    if is_document(outbox):
        return read_document(found)
    given = (found or "").lower()
    return given if _IS_UUID(given) else None, Repeated()


def read_document(text: str | None) -> tuple[str | None, Repeated]:
    """The usable ``payment_id`` of a document, in lower case, or None; and what else it repeats of the payment."""
    try:
        found = _parse(text or "")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return None, Repeated()
    given = str(found.get("payment_id")).lower()
    return given if _IS_UUID(given) else None, Repeated(*(_text_of(found.get(key)) for key in Repeated._fields))


def _parse(text: str) -> Any:
    """Numbers stay as they are written. Raises ValueError for what is no JSON."""
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant)
    except RecursionError:
        return json.loads(_first_level(text), parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _first_level(text: str) -> str:
    """A document nested more deeply than can be parsed, with an empty object for all that is below its first level."""
    depth, start, parts = 0, 0, []
    for token in _TOKEN.finditer(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth == 2 and token[0] in "{[":
            parts.append(text[start : token.start()])
        elif depth == 1 and token[0] in "}]":
            start = token.end()
            parts.append("{}")
    return "".join([*parts, text[start:]])


def _text_of(value: Any) -> str | None:
    """As ``->>`` would write it, bounded; what no column can hold, or is no scalar, becomes a text that equals none."""
    match value:
        case None:
            return None
        case bool():
            return str(value).lower()
        case str():
            return value[:_LONGEST].encode(errors="replace").decode().replace("\0", _NEVER_EQUAL)
        case _:
            return _NEVER_EQUAL


def _written(source: FromClause, key: str) -> ColumnElement[Any]:
    """The text of a key, by the row of an event, or by a relation that holds what was read of documents."""
    if "payload" not in source.c:
        return source.c[key]
    return source.c.payload.op("->>", return_type=Text())(key)


def key_text(source: FromClause, key: str) -> ColumnElement[Any]:
    """The text of one payload key, cut to a bound; NULL where it is absent, null, or the payload is no object."""
    return func.left(_written(source, key), _LONGEST)


def payment_id_candidate(outbox: FromClause) -> ColumnElement[Any]:
    """The payload's ``payment_id`` where it has the length and the hyphens of a UUID string; otherwise NULL."""
    written = _written(outbox, "payment_id")
    return case((written.like(_UUID_SHAPE), written))


def usable_payment_ids(candidates: str) -> Sequence[str | None]:
    """An array of candidates in PostgreSQL's text form: each in lower case where it is a UUID string, otherwise None.

    The claim leaves this to us: a regular expression on the server costs a tenth of all that it does for an event.
    Where all are usable as they stand, and only there, the text itself is returned.
    """
    if _ARE_UUIDS(candidates):
        return ArrayText(candidates)
    found = ((quoted or plain).lower() for quoted, plain in _ELEMENTS.findall(candidates[1:-1]))
    return [each if _IS_UUID(each) else None for each in found]


def payment_id_text(outbox: FromClause) -> ColumnElement[Any]:
    """The payload's ``payment_id`` in lower case, whatever it is. Never fails.

    In a document it is searched for, so that one below the first level is found, too. What is compared with the text of
    a UUID needs no regular expression, which costs more than reading the table.
    """
    if is_document(outbox):
        return func.lower(func.substring(cast(outbox.c.payload, Text), _PAYMENT_ID_IN_DOCUMENT))
    return func.lower(key_text(outbox, "payment_id"))


def mismatches(source: FromClause, payments: FromClause) -> dict[str, ColumnElement[bool]]:
    """For each optional key: whether the payload repeats it and it differs from the payment row.

    ``source``: the event's row, or a relation with the keys of its document. Written in the row's own form, as most
    producers do, it is settled by one comparison.
    """
    rules = {
        "student_id": _id_differs(key_text(source, "student_id"), payments.c.student_id),
        "course_id": _id_differs(key_text(source, "course_id"), payments.c.course_id),
        "amount": _amount_differs(key_text(source, "amount"), payments.c.amount),
        "currency": _differs(key_text(source, "currency"), cast(payments.c.currency, Text)),
    }
    return {key: case((_is_repeated(source, payments, key), false()), else_=rule) for key, rule in rules.items()}


def mismatched_keys(source: FromClause, payments: FromClause) -> ColumnElement[Any]:
    """The names of the keys that differ, as text[]; {} where there is no payment row to differ from."""
    names = [case((differs, key)) for key, differs in mismatches(source, payments).items()]
    return func.array_remove(array[Any](names, type_=Text), None)


def _is_repeated(source: FromClause, payments: FromClause, key: str) -> ColumnElement[bool]:
    return cast(payments.c[key], Text) == _written(source, key)


def _differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    return and_(given.is_not(None), given.is_distinct_from(actual))


def _id_differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    """A UUID may be written in any case; a course that is known by a text is that text."""
    return _differs(case((given.like(_UUID_SHAPE), func.lower(given)), else_=given), cast(actual, Text))


def _amount_differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    equal = case((given.op("~")(_NUMBER_TEXT), cast(given, Numeric) == actual), else_=~true())
    return and_(given.is_not(None), equal.is_not(true()))
