"""What the worker reads of a payload: five keys, as bounded text.

In a jsonb column, SQL expressions read the keys, and the payload stays in the database: PostgreSQL accepts payloads
that a client cannot decode (deep nesting, huge integers).

A json or text column may hold what jsonb refuses: NUL, lone surrogates, NaN, or no JSON at all. A statement that reads
a key of one such row fails for all rows. So the values of these columns (*documents*) are sent to the client up to a
bound and read here, one by one; a document that cannot be read makes only its own event unusable.
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
"""One element of an array's text: in quotes, or without."""
_NUMBER_TEXT = r"^[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$"
_LONGEST = 100

LONGEST_DOCUMENT = 262_144
"""Bytes. A longer document is not usable: the client reads a thousand documents at a time."""
_LONGEST_KEPT = 100_000_000
"""Characters of a document that its dead letter keeps; a jsonb string must be shorter than 256 MB."""
_NEVER_EQUAL = "\N{REPLACEMENT CHARACTER}"
_PAYMENT_ID_IN_DOCUMENT = rf'"payment_id"\s*:\s*"({_UUID.replace("a-f", "a-fA-F")})"'
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
"""A token of JSON: a string, or a bracket."""


def is_document(outbox: FromClause) -> bool:
    """Whether the payload column is of type json or text."""
    return not isinstance(outbox.c.payload.type, JSONB)


def document(outbox: FromClause) -> ColumnElement[Any]:
    """The payload as text; NULL if it is too long to be read."""
    written = cast(outbox.c.payload, Text)
    return case((func.octet_length(written) <= LONGEST_DOCUMENT, written))


def to_dead_letter(outbox: FromClause) -> ColumnElement[Any]:
    """The payload as its dead letter keeps it, in jsonb: a jsonb payload as it is, a document as one string."""
    if not is_document(outbox):
        return outbox.c.payload
    return func.to_jsonb(func.left(cast(outbox.c.payload, Text), _LONGEST_KEPT))


def from_dead_letter(kept: ColumnElement[Any], outbox: FromClause) -> ColumnElement[Any]:
    """The payload that a dead letter keeps, in the type of the outbox's column."""
    if not is_document(outbox):
        return kept
    is_string = func.jsonb_typeof(kept) == "string"
    text = case((is_string, kept.op("#>>", return_type=Text())(cast(array([]), ARRAY(Text)))), else_=cast(kept, Text))
    return cast(text, outbox.c.payload.type)


def claim_columns(outbox: FromClause) -> ColumnElement[Any]:
    """What a claim reads of a payload: the ``candidate`` for the payment's id, or the whole ``document``."""
    return (
        document(outbox).label("document") if is_document(outbox) else payment_id_candidate(outbox).label("candidate")
    )


def read_claim_columns(outbox: FromClause, found: str | None) -> tuple[str | None, Repeated]:
    """Read a value of ``claim_columns``: the payment's id, None if it is not usable, and the keys of a document."""
    if is_document(outbox):
        return read_document(found)
    given = (found or "").lower()
    return given if _IS_UUID(given) else None, Repeated()


def read_document(text: str | None) -> tuple[str | None, Repeated]:
    """The ``payment_id`` of a document in lower case, None if it is not usable; and what it repeats of the payment."""
    try:
        found = _parse(text or "")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return None, Repeated()
    given = str(found.get("payment_id")).lower()
    return given if _IS_UUID(given) else None, Repeated(*(_text_of(found.get(key)) for key in Repeated._fields))


def _parse(text: str) -> Any:
    """Parse JSON and keep numbers as they are written. Raises ValueError if the text is no JSON."""
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant)
    except RecursionError:
        return json.loads(_first_level(text), parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _first_level(text: str) -> str:
    """The document with ``{}`` for everything below its first level, for one that is nested too deeply to be parsed."""
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
    """The value as ``->>`` writes it, bounded; a text that equals none if it is no scalar or cannot be stored."""
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
    """The text of a key: from the row of an event, or from a relation with what the client read of documents."""
    if "payload" not in source.c:
        return source.c[key]
    return source.c.payload.op("->>", return_type=Text())(key)


def key_text(source: FromClause, key: str) -> ColumnElement[Any]:
    """The text of one payload key, cut to a bound; NULL if it is absent or null, or the payload is no object."""
    return func.left(_written(source, key), _LONGEST)


def payment_id_candidate(outbox: FromClause) -> ColumnElement[Any]:
    """The payload's ``payment_id`` if it has the length and the hyphens of a UUID string; otherwise NULL."""
    written = _written(outbox, "payment_id")
    return case((written.like(_UUID_SHAPE), written))


def usable_payment_ids(candidates: str) -> Sequence[str | None]:
    """Check an array of candidates in PostgreSQL's text form: UUID strings in lower case; None for any other text.

    The client checks them because a regular expression on the server would cost a tenth of its whole work on an event.
    If all candidates are usable as they are, the text of the array is not split.
    """
    if _ARE_UUIDS(candidates):
        return ArrayText(candidates)
    found = ((quoted or plain).lower() for quoted, plain in _ELEMENTS.findall(candidates[1:-1]))
    return [each if _IS_UUID(each) else None for each in found]


def payment_id_text(outbox: FromClause) -> ColumnElement[Any]:
    """The payload's ``payment_id`` in lower case, UUID or not. Never fails.

    In a document it is found by its text, so one below the first level is found, too. In jsonb no regular expression is
    used: the value is compared with the text of a UUID, and the expression would cost more than reading the table.
    """
    if is_document(outbox):
        return func.lower(func.substring(cast(outbox.c.payload, Text), _PAYMENT_ID_IN_DOCUMENT))
    return func.lower(key_text(outbox, "payment_id"))


def mismatches(source: FromClause, payments: FromClause) -> dict[str, ColumnElement[bool]]:
    """For each optional key: whether the payload repeats it and the value differs from the payment row.

    ``source``: the event's row, or a relation with the keys of its document. One comparison suffices if the value is
    written as the row's text, as most producers write it.
    """
    rules = {
        "student_id": _id_differs(key_text(source, "student_id"), payments.c.student_id),
        "course_id": _id_differs(key_text(source, "course_id"), payments.c.course_id),
        "amount": _amount_differs(key_text(source, "amount"), payments.c.amount),
        "currency": _differs(key_text(source, "currency"), cast(payments.c.currency, Text)),
    }
    return {key: case((_is_repeated(source, payments, key), false()), else_=rule) for key, rule in rules.items()}


def mismatched_keys(source: FromClause, payments: FromClause) -> ColumnElement[Any]:
    """The names of the keys that differ, as text[]; {} if there is no payment row."""
    names = [case((differs, key)) for key, differs in mismatches(source, payments).items()]
    return func.array_remove(array[Any](names, type_=Text), None)


def _is_repeated(source: FromClause, payments: FromClause, key: str) -> ColumnElement[bool]:
    return cast(payments.c[key], Text) == _written(source, key)


def _differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    return and_(given.is_not(None), given.is_distinct_from(actual))


def _id_differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    """Compare UUIDs regardless of case, and other ids as they are written."""
    return _differs(case((given.like(_UUID_SHAPE), func.lower(given)), else_=given), cast(actual, Text))


def _amount_differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    equal = case((given.op("~")(_NUMBER_TEXT), cast(given, Numeric) == actual), else_=~true())
    return and_(given.is_not(None), equal.is_not(true()))
