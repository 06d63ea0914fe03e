"""Converts sequences of keys to PostgreSQL array literals and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, overload
from uuid import UUID

from sqlalchemy import ColumnElement, Text, cast
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import TypeEngine, UserDefinedType


class Keys(UserDefinedType[Sequence[Any]]):
    """The type of an array parameter that the client sends as one array literal.

    The client sends None as NULL. ``item`` is the type of the elements in SQL. If ``item`` is not
    text, the elements must not contain a comma, brace or quote. Integers and UUIDs do not contain
    these characters.
    """

    render_bind_cast = True
    cache_ok = True

    def __init__(self, item: str) -> None:
        self.item = item

    def get_col_spec(self, **_: object) -> str:
        return f"{self.item}[]"


class ArrayText(Sequence[Any]):
    """An array of keys in the text form that PostgreSQL sent.

    The first read of an element splits the text. The fast path (one statement for a whole batch)
    reads no element. The fast path sends the unsplit text back to PostgreSQL.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __len__(self) -> int:
        return len(self._elements)

    @overload
    def __getitem__(self, at: int) -> Any: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Any]: ...

    def __getitem__(self, at: int | slice) -> Any:
        return self._elements[at]

    @cached_property
    def _elements(self) -> list[str | None]:
        inner = self._text[1:-1]
        if '"' in inner:
            return [_unquoted(each) for each in _ELEMENTS.findall(inner)]
        return [None if each == "NULL" else each for each in inner.split(",")] if inner else []


_ELEMENTS = re.compile(r'"(?:[^"\\]|\\.)*"|[^,]+', re.DOTALL)
"""The pattern of one element in the text form of an array, with or without quotes."""
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


def _unquoted(element: str) -> str | None:
    if element.startswith('"'):
        return _ESCAPED.sub(r"\1", element[1:-1])
    return None if element == "NULL" else element


def array_literal(keys: Sequence[Any] | None, item: str) -> str:
    """Return the keys as a PostgreSQL array literal. Return ``{}`` if there are no keys.

    The class ``Keys`` explains ``item``.
    """
    if isinstance(keys, ArrayText):
        return str(keys)
    keys = keys or ()
    if item == "text":
        return "{" + ",".join("NULL" if key is None else _quoted(str(key)) for key in keys) + "}"
    if None in keys:
        keys = ["NULL" if key is None else key for key in keys]
    return "{" + ",".join(map(str, keys)) + "}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def ids_as(kind: TypeEngine[Any], ids: Iterable[UUID | str]) -> ColumnElement[Any]:
    """Return an SQL array of these ids for ``= ANY``. ``kind`` is the type of the elements: UUID or text."""
    return cast([str(each) for each in ids], ARRAY(Text)).cast(ARRAY(kind))
