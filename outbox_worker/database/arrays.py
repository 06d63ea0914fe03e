"""Array parameters: keys written as PostgreSQL array literals, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, overload
from uuid import UUID

from sqlalchemy import ColumnElement, Text, cast
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import TypeEngine, UserDefinedType


class Keys(UserDefinedType[Sequence[Any]]):
    """An array parameter of keys (integers, UUID strings, names; None for NULL), sent as one literal.

    Keys hold no comma, brace or quote; use ARRAY for texts that may.
    """

    render_bind_cast = True
    cache_ok = True

    def __init__(self, item: str) -> None:
        self.item = item

    def get_col_spec(self, **_: object) -> str:
        return f"{self.item}[]"


class ArrayText(Sequence[Any]):
    """An array of keys as PostgreSQL sent it: one text, split when an element is first read.

    A batch on the fast path never splits it, and sends the same text back.
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
        return [None if each == "NULL" else each for each in inner.split(",")] if inner else []


def array_literal(keys: Sequence[Any] | None) -> str:
    """The keys as a PostgreSQL array literal; ``{}`` if there are none."""
    if isinstance(keys, ArrayText):
        return str(keys)
    keys = keys or ()
    if None in keys:
        keys = ["NULL" if key is None else key for key in keys]
    return "{" + ",".join(map(str, keys)) + "}"


def ids_as(kind: TypeEngine[Any], ids: Iterable[UUID | str]) -> ColumnElement[Any]:
    """Ids as an array of this type, UUID or text, for ``= ANY``."""
    return cast([str(each) for each in ids], ARRAY(Text)).cast(ARRAY(kind))
