"""Reads five fields of each payload as text of limited length.

``Tables.paths`` contains the path of each field. If the payload column is jsonb, SQL expressions
read the fields. The worker does not decode jsonb in Python. PostgreSQL accepts payloads that Python
cannot decode (deep nesting, huge integers).

A json or text payload is called a *document* in this module. A document can contain what jsonb
refuses: NUL, lone surrogates, NaN, or no JSON at all. If SQL read a field of such a document, the
statement would fail for all rows. Therefore the worker reads documents as text and parses them one
by one in Python. If a document is too long or cannot be parsed, only its own event becomes a dead
letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Numeric,
    Text,
    and_,
    case,
    cast,
    false,
    func,
    literal_column,
    or_,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID, array

from outbox_worker.database.arrays import ArrayText
from outbox_worker.keys import INTEGER_PATTERN, LARGEST_INTEGER, LONGEST_TEXT_KEY, SMALLEST_INTEGER, KeyKind
from outbox_worker.model import Repeated
from outbox_worker.schema.tables import Tables
from outbox_worker.store import identity
from outbox_worker.store.queries import currency_code

_UUID_SHAPE = "________-____-____-____-____________"
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_ARE_UUIDS = re.compile(rf"\{{{_UUID}(?:,{_UUID})*\}}", re.ASCII).fullmatch
_LONGEST = 100
"""SQL cuts a payload's ``payment_id`` to this many characters if ids are UUIDs or integers."""
_LONGEST_CURRENCY = 1_000
"""The longest currency in a payload, in bytes.

A longer currency counts as different from all currencies.
"""

LONGEST_DOCUMENT = 262_144
"""The largest document (a json or text payload), in bytes, that the worker reads.

There is a limit because the worker receives up to 1,000 payloads at once.
"""
_LONGEST_KEPT = 100_000_000
"""A dead letter stores at most this many characters of a json or text payload.

There is a limit because a jsonb string must be shorter than 256 MB.
"""
_NEVER_EQUAL = "\N{REPLACEMENT CHARACTER}"
_IN_DOCUMENT = {
    KeyKind.UUID: rf'\s*:\s*"({_UUID.replace("a-f", "a-fA-F")})"',
    KeyKind.INTEGER: r'\s*:\s*"?(-?[0-9]{1,19})"?\s*[,}]',
    KeyKind.TEXT: r'\s*:\s*"([^"\\]*)"',
}
"""The pattern of the text after the key ``payment_id`` in a document, by the kind of payment ids.
"""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
"""The pattern of a string or a bracket in JSON."""


def is_document(outbox: FromClause) -> bool:
    """Return whether the payload column has the type json or text."""
    return not isinstance(outbox.c.payload.type, JSONB)


def document(outbox: FromClause) -> ColumnElement[Any]:
    """Build a document (a json or text payload) as text. The result is NULL if the text is too long."""
    written = cast(outbox.c.payload, Text)
    return case((func.octet_length(written) <= LONGEST_DOCUMENT, written))


def to_dead_letter(outbox: FromClause) -> ColumnElement[Any]:
    """Convert a payload to the jsonb value of its dead letter. A json or text payload becomes one JSON string.

    A missing payload becomes a JSON null, because a dead letter must have a payload.
    """
    null: ColumnElement[Any] = literal_column("CAST('null' AS jsonb)")
    if not is_document(outbox):
        return func.coalesce(outbox.c.payload, null)
    return func.coalesce(func.to_jsonb(func.left(cast(outbox.c.payload, Text), _LONGEST_KEPT)), null)


def from_dead_letter(kept: ColumnElement[Any], outbox: FromClause) -> ColumnElement[Any]:
    """Convert the payload of a dead letter back to the type of the outbox's payload column."""
    if not is_document(outbox):
        return kept
    is_string = func.jsonb_typeof(kept) == "string"
    text = case((is_string, kept.op("#>>", return_type=Text())(cast(array([]), ARRAY(Text)))), else_=cast(kept, Text))
    return cast(text, outbox.c.payload.type)


def claim_columns(tables: Tables, outbox: FromClause) -> ColumnElement[Any]:
    """Build the column that a claim reads from the payload.

    If the payload is jsonb, this is ``candidate``: a text that is possibly the payment's id. If the
    payload is json or text, this is ``document``: the whole payload.
    """
    return (
        document(outbox).label("document")
        if is_document(outbox)
        else payment_id_candidate(tables, outbox).label("candidate")
    )


def read_claim_columns(tables: Tables, outbox: FromClause, found: str | None) -> tuple[str | None, Repeated]:
    """Parse a value of ``claim_columns``. Return the payment's id and the other fields.

    The id is None if no payment can have this id. If the column is jsonb, the other fields are
    empty. Later statements read these fields in SQL.
    """
    if is_document(outbox):
        return read_document(tables, found)
    return tables.payment_key.usual(found or ""), Repeated()


def read_document(tables: Tables, text: str | None) -> tuple[str | None, Repeated]:
    """Parse a document (a json or text payload). Return the ``payment_id`` and the other fields.

    The ``payment_id`` is in its usual form, or None if no payment can have this id.
    """
    try:
        found = _parse(text or "")
    except (ValueError, RecursionError):
        found = None
    given = _at(found, tables.paths.payment_id)
    usual = tables.payment_key.usual(given) if isinstance(given, str) else None
    return usual, Repeated(*(_text_of(_at(found, tables.paths.of(field))) for field in Repeated._fields))


def _at(document: Any, path: Sequence[str]) -> Any:
    """Return the value at this path of a parsed document, or None if no value is there."""
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _parse(text: str) -> Any:
    """Parse JSON, and keep each number as its original text.

    Raises ValueError if the text is no JSON.
    """
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant)
    except RecursionError:
        return json.loads(_first_level(text), parse_int=str, parse_float=str, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _first_level(text: str) -> str:
    """Replace every nested object and array of a JSON text by ``{}``.

    Python cannot parse deep nesting.
    """
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
    """Convert a parsed value to the text that the SQL operator ``->>`` returns.

    The text is not cut, because the worker compares whole ids. ``LONGEST_DOCUMENT`` limits the
    length of the text. An object or array becomes ``_NEVER_EQUAL``, because no payment column
    contains this text. PostgreSQL cannot store NUL and lone surrogates. NUL becomes
    ``_NEVER_EQUAL``, and a lone surrogate becomes a question mark.
    """
    match value:
        case None:
            return None
        case bool():
            return str(value).lower()
        case str():
            return value.encode(errors="replace").decode().replace("\0", _NEVER_EQUAL)
        case _:
            return _NEVER_EQUAL


def _written(tables: Tables, source: FromClause, key: str) -> ColumnElement[Any]:
    """Build the text of a payload field, from an event's row or from a relation with the parsed fields."""
    if "payload" not in source.c:
        return source.c[key]
    path = tables.paths.of(key)
    if len(path) == 1:
        return source.c.payload.op("->>", return_type=Text())(path[0])
    return source.c.payload.op("#>>", return_type=Text())(array(path))


def key_text(tables: Tables, source: FromClause, key: str) -> ColumnElement[Any]:
    """Build the text of a payload field, cut to ``_LONGEST`` characters.

    The text is NULL if the payload has no such field.
    """
    return func.left(_written(tables, source, key), _LONGEST)


def payment_id_candidate(tables: Tables, outbox: FromClause) -> ColumnElement[Any]:
    """Build the payload's ``payment_id``.

    The result is NULL if no id has this length or shape. If ids are texts, the result is also NULL
    for JSON values that are neither strings nor numbers.
    """
    written, kind = _written(tables, outbox, "payment_id"), tables.payment_key
    if kind is KeyKind.UUID:
        return case((written.like(_UUID_SHAPE), written))
    if kind is KeyKind.INTEGER:
        return case((func.octet_length(written) <= _LONGEST, written))
    json_type = func.jsonb_typeof(outbox.c.payload.op("#>", return_type=JSONB())(array(tables.paths.payment_id)))
    is_scalar = or_(*(json_type == literal_column(f"'{each}'") for each in ("string", "number")))
    is_short = func.octet_length(written).between(literal_column("1"), literal_column(str(LONGEST_TEXT_KEY)))
    return case((and_(is_scalar, is_short), written))


def fast_candidate(tables: Tables, outbox: FromClause) -> ColumnElement[Any]:
    """Build the payload's ``payment_id`` for the fast statement.

    The fast statement checks this text with ``as_key``.
    """
    if tables.payment_key is KeyKind.TEXT:
        return payment_id_candidate(tables, outbox)
    return key_text(tables, outbox, "payment_id")


def as_key(text: ColumnElement[str], kind: KeyKind) -> ColumnElement[Any]:
    """Convert the text of a payment's id to the type of payment ids.

    A text that cannot be an id becomes NULL. The expression raises an error if the text has the
    length of a UUID, but is not a UUID.
    """
    if kind is KeyKind.UUID:
        return case((func.octet_length(text) == len(_UUID_SHAPE), cast(text, UUID(as_uuid=False))))
    if kind is KeyKind.TEXT:
        return text
    smallest, largest = (literal_column(str(end), Numeric) for end in (SMALLEST_INTEGER, LARGEST_INTEGER))
    fits = cast(text, Numeric).between(smallest, largest)
    return case((text.op("~")(literal_column(f"'{INTEGER_PATTERN}'")), case((fits, cast(text, BigInteger)))))


def is_written_as(text: ColumnElement[str], uuid: ColumnElement[Any]) -> ColumnElement[bool]:
    """Build the condition that a text is the usual form of a UUID. PostgreSQL also accepts other forms."""
    usual = cast(uuid, Text)
    return case((usual == text, true()), else_=usual == func.lower(text))


def usable_payment_ids(candidates: str, kind: KeyKind) -> Sequence[str | None]:
    """Parse an array of candidates.

    Return the usual form of each candidate, or None if the candidate cannot be an id. A candidate
    is a text that is possibly the id of a payment. The worker checks candidates in Python. A
    regular expression on the server would take a tenth of the server's time per event. If all
    candidates are UUIDs in lower case, the text of the array is not split.
    """
    found = ArrayText(candidates)
    if kind is KeyKind.UUID and _ARE_UUIDS(candidates):
        return found
    return [None if each is None else kind.usual(each) for each in found]


def payment_id_text(tables: Tables, outbox: FromClause) -> ColumnElement[Any]:
    """Build the payload's ``payment_id`` as text, even if it cannot be an id.

    The expression never raises an error. A UUID is written in lower case, and an integer without
    leading zeros. In a json or text payload, a regular expression finds the ``payment_id``, even in
    a nested object. In jsonb, the expression does not check that the text is a UUID. The check
    would take longer than reading the table. The check is not needed, because the text is only
    compared with UUIDs.
    """
    kind = tables.payment_key
    if is_document(outbox):
        pattern = f'"{re.escape(tables.paths.payment_id[-1])}"{_IN_DOCUMENT[kind]}'
        written: ColumnElement[Any] = func.substring(cast(outbox.c.payload, Text), pattern)
    else:
        written = fast_candidate(tables, outbox)
    if kind is KeyKind.INTEGER:
        return cast(as_key(written, kind), Text)
    return func.lower(written) if kind is KeyKind.UUID else written


def mismatches(tables: Tables, source: FromClause, payments: FromClause) -> dict[str, ColumnElement[bool]]:
    """Build one condition per optional field: the payload has the field, and its value differs.

    The condition compares the payload with the payment row. ``source`` is the event's row, or a
    relation with the fields that the worker parsed in Python. The condition first compares both
    values as texts. In most payloads, the texts are equal, and PostgreSQL computes nothing else. If
    the texts differ, PostgreSQL compares ids by the types of the payment's columns, amounts as
    numbers, and currencies in upper case without blanks.
    """
    written = {key: _written(tables, source, key) for key in Repeated._fields}
    rules = {
        **{key: identity.differs(same.paid, written[key], payments.c[key]) for key, same in tables.ids},
        "amount": identity.number_differs(written["amount"], payments.c.amount),
        "currency": _currency_differs(written["currency"], payments.c.currency),
    }
    is_repeated = {key: cast(payments.c[key], Text) == text for key, text in written.items()}
    return {key: case((is_repeated[key], false()), else_=rule) for key, rule in rules.items()}


def mismatched_keys(tables: Tables, source: FromClause, payments: FromClause) -> ColumnElement[Any]:
    """Build a text[] with the names of the fields that differ from the payment row.

    If no payment row exists, all optional fields in the payload count as different.
    """
    names = [case((differs, key)) for key, differs in mismatches(tables, source, payments).items()]
    return func.array_remove(array[Any](names, type_=Text), None)


def _currency_differs(given: ColumnElement[Any], actual: ColumnElement[Any]) -> ColumnElement[bool]:
    equal = case((func.octet_length(given) <= _LONGEST_CURRENCY, currency_code(given) == currency_code(actual)))
    return and_(given.is_not(None), equal.is_not(true()))
