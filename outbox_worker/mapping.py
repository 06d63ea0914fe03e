"""Maps the names of this program to the names in the user's database.

The names of tables, columns, payment statuses and event types can differ. The settings ``tables``,
``columns``, ``payments`` and ``outbox`` have the types of this module. These types refuse keys that
the worker does not know. Two tables, two columns of a table or two statuses must not have the same
name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_settings import NoDecode

from outbox_worker.model import COLUMNS, IGNORED, PaymentStatus


def _split_pairs(value: object) -> object:
    """Parse ``a=b,c=d``, the form of a mapping in an environment variable. Return a TOML table unchanged."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
    if not all(equals and name.strip() for _, equals, name in pairs):
        raise ValueError("expected NAME=NAME, separated by commas")
    return {key.strip(): name.strip() for key, _, name in pairs}


def _flatten_columns(value: object) -> object:
    """Convert the TOML form ``[columns.payments] student_id = "user_id"`` to ``payments.student_id=user_id``."""
    value = _split_pairs(value)
    if not isinstance(value, dict):
        return value
    nested = {key: inner for key, inner in value.items() if isinstance(inner, dict)}
    flat = {f"{table}.{column}": name for table, names in nested.items() for column, name in names.items()}
    return {key: name for key, name in value.items() if key not in nested} | flat


def _usable_names(value: dict[str, str]) -> dict[str, str]:
    if odd := sorted(name for name in value.values() if set(name) & set("%:")):
        raise ValueError(f"names with % or : are not supported: {', '.join(odd)}")
    return value


def _known_tables(value: dict[str, str]) -> dict[str, str]:
    if unknown := set(value) - set(COLUMNS):
        raise ValueError(f"no such table: {', '.join(sorted(unknown))}; the tables are {', '.join(COLUMNS)}")
    _expect_distinct({table: value.get(table, table) for table in COLUMNS}, "table")
    return value


def _known_columns(value: dict[str, str]) -> dict[str, str]:
    known = {f"{table}.{column}" for table, columns in COLUMNS.items() for column in columns}
    if unknown := set(value) - known:
        raise ValueError(f"no such column: {', '.join(sorted(unknown))}; write TABLE.COLUMN=NAME")
    for table, columns in COLUMNS.items():
        _expect_distinct({f"{table}.{key}": value.get(f"{table}.{key}", key) for key in columns}, "column")
    return value


def _expect_distinct(names: Mapping[str, str], noun: str) -> None:
    by_name: dict[str, str] = {}
    for key, name in names.items():
        other = by_name.setdefault(name, key)
        if other != key:
            raise ValueError(f"{other} and {key} have the same {noun} name, but each needs its own")


TableMap = Annotated[
    dict[str, str],
    NoDecode,
    BeforeValidator(_split_pairs),
    AfterValidator(_known_tables),
    AfterValidator(_usable_names),
]
ColumnMap = Annotated[
    dict[str, str],
    NoDecode,
    BeforeValidator(_flatten_columns),
    AfterValidator(_known_columns),
    AfterValidator(_usable_names),
]


StatusValues = dict[str, tuple[str, ...]]
"""Maps each payment status of the worker, or ``ignored``, to its texts in the payments table."""


def _known_statuses(value: StatusValues) -> StatusValues:
    known = (*PaymentStatus, IGNORED)
    if unknown := sorted(value.keys() - set(known)):
        raise ValueError(f"status_values: no such status: {', '.join(unknown)}; they are {', '.join(known)}")
    given = [text for texts in all_status_values(value).values() for text in texts]
    if twice := sorted({text for text in given if given.count(text) > 1}):
        raise ValueError(f"status_values: {', '.join(twice)} would mean two statuses")
    return value


def all_status_values(given: StatusValues) -> StatusValues:
    """Return the texts of each payment status. The default text of a status is its name.

    ``ignored`` has no text by default.
    """
    return {status: given.get(status, (status,)) for status in PaymentStatus} | {IGNORED: given.get(IGNORED, ())}


def status_example(unknown: Iterable[str]) -> str:
    """Return a line of the section ``[payments]`` that gives unknown statuses a meaning."""
    return f"status_values.succeeded = [{', '.join(json.dumps(text, ensure_ascii=False) for text in unknown)}]"


TypeNames = dict[str, Literal["PURCHASE_CONFIRMED", "PURCHASE_REFUNDED"]]
"""Maps event types of the user's outbox to the worker's event types."""


_PATH = re.compile(r'\$(?:\.(?:[A-Za-z_][A-Za-z0-9_-]*|"[^"\\]+"))+')
_STEP = re.compile(r'\.(?:([A-Za-z_][A-Za-z0-9_-]*)|"([^"\\]+)")')


def _parse_path(value: object) -> object:
    """Parse a path such as ``$.data.paymentId`` into its keys, the outermost key first."""
    if not isinstance(value, str):
        return value
    if not _PATH.fullmatch(value):
        raise ValueError(f'{value} is not a path: write $.key, $.outer.inner, or $."key with blanks"')
    return tuple(plain or quoted for plain, quoted in _STEP.findall(value))


PayloadPath = Annotated[tuple[str, ...], BeforeValidator(_parse_path)]


class PayloadPaths(BaseModel):
    """The path of each value in an event's payload. A path is a list of keys, outermost first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    payment_id: PayloadPath = ("payment_id",)
    student_id: PayloadPath = ("student_id",)
    course_id: PayloadPath = ("course_id",)
    amount: PayloadPath = ("amount",)
    currency: PayloadPath = ("currency",)

    def of(self, field: str) -> tuple[str, ...]:
        """Return the path of a field, for example of ``payment_id``."""
        path: tuple[str, ...] = getattr(self, field)
        return path


PAYLOAD_PATHS = PayloadPaths()
"""The default paths: each value is a field at the top level of the payload."""


class OutboxMapping(BaseModel):
    """Other names of event types in the user's outbox, and other paths of values in the payload."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    types: TypeNames = {}
    payload: PayloadPaths = PAYLOAD_PATHS


class PaymentsMapping(BaseModel):
    """Other names of payment statuses in the user's payments table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status_values: Annotated[StatusValues, AfterValidator(_known_statuses)] = {}
