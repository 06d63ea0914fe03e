"""Shops whose ids of payments and events are not UUIDs. Lists the types, and ids that are hard to
process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from outbox_worker.keys import KeyKind
from outbox_worker.schema.tables import EVENT_KEYS, PAYMENT_KEYS
from tests.support.factories import Shop

PECULIAR = ("NULL", "a,b", 'say "x"', "back\\slash", "{}", "o'clock %s :x", " blank ", "Ümläut", "x" * 900, "7", "Null")


def integers(first: int) -> Callable[[], Iterator[Any]]:
    return lambda: itertools.count(first)


def texts() -> Iterator[Any]:
    yield from PECULIAR
    for number in itertools.count():
        yield f"{PECULIAR[number % len(PECULIAR)]}-{number}"


def uuids() -> Iterator[Any]:
    while True:
        yield uuid4()


@dataclass(frozen=True)
class KeyTypes:
    """The SQL types and kinds of the ids of payments and events, and generators of new ids."""

    payments: str
    events: str
    payment_key: KeyKind
    event_key: KeyKind
    payment_ids: Callable[[], Iterator[Any]]
    event_ids: Callable[[], Iterator[Any]]

    def __str__(self) -> str:
        return f"{self.payments} and {self.events}"


KEY_TYPES = (
    KeyTypes("bigint", "bigint", KeyKind.INTEGER, KeyKind.INTEGER, integers(9_007_199_254_740_993), integers(1)),
    KeyTypes("integer", "text", KeyKind.INTEGER, KeyKind.TEXT, integers(1), texts),
    KeyTypes("text", "uuid", KeyKind.TEXT, KeyKind.UUID, texts, uuids),
    KeyTypes('varchar COLLATE "C"', "varchar", KeyKind.TEXT, KeyKind.TEXT, texts, texts),
)
every_key_type = pytest.mark.parametrize(
    "key_types",
    [
        pytest.param(each, marks=pytest.mark.slow if each.event_key is KeyKind.UUID else (), id=str(each))
        for each in KEY_TYPES
    ],
)
"""Runs a test with each pair of types. If the ids of events are UUIDs, the test is slow."""


def retype_keys(shop: Shop, types: KeyTypes) -> None:
    """Change the types of the ids of payments and events in an empty, migrated shop. Let the shop
    make new ids of these types."""
    for keys, of_type in ((PAYMENT_KEYS, types.payments), (EVENT_KEYS, types.events)):
        plain = of_type.split(" COLLATE ")[0]
        for table, column in keys:
            shop.rows(f"ALTER TABLE {table} ALTER {column} DROP DEFAULT")
            shop.rows(f"ALTER TABLE {table} ALTER {column} TYPE {of_type} USING CAST(NULL AS {plain})")
    shop.payment_ids, shop.event_ids = types.payment_ids(), types.event_ids()
