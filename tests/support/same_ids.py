"""Shops whose ids have types other than UUID. Lists pairs of column types, with spellings of one
id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.support.factories import Shop

LOOSE = "CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
"""A collation for which upper and lower case are equal. The embedded PostgreSQL has no ICU."""


@dataclass(frozen=True)
class Kind:
    """The types of student ids in payments and purchases, two spellings of one id, and a different
    id."""

    name: str
    paid: str
    bought: str
    one: str
    same: str
    other: str
    is_indexed: bool = True
    """Whether the unique index treats the same ids as equal."""
    before: str = ""
    """SQL statements that create what the types need."""

    def __str__(self) -> str:
        return self.name


CITEXT = "CREATE EXTENSION citext"
ELSEWHERE = "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext"
"""Creates citext in a schema outside the search path, so its operators are not in the search
path."""

KINDS = (
    Kind("uuid", "uuid", "uuid", "a" * 32, "A" * 32, "b" * 32),
    Kind("int4 beside int8", "int4", "int8", "7", "007", "8"),
    Kind("text beside varchar", "text", "varchar(40)", "Ann", "Ann", "ann"),
    Kind("two collations", 'text COLLATE "C"', 'text COLLATE "POSIX"', "Ann", "Ann", "ann"),
    Kind("numeric", "numeric", "numeric", "1.0", "1.00", "1.01"),
    Kind("numeric of two scales", "numeric(9,1)", "numeric(12,3)", "1.0", "1", "1.1"),
    Kind("char", "char(12)", "char(12)", "S-1", "S-1  ", "S-2"),
    Kind("char beside text", "char(12)", "text", "S-1", "S-1  ", "S-2"),
    Kind("text beside char", "text", "char(12)", "S-1", "S-1  ", "S-2"),
    Kind("citext", "citext", "citext", "Ann@x", "ann@X", "bob@x", before=CITEXT),
    Kind("citext elsewhere", "ext.citext", "ext.citext", "Ann@x", "ann@X", "bob@x", before=ELSEWHERE),
    Kind("text beside citext", "text", "ext.citext", "Ann@x", "ann@X", "bob@x", before=ELSEWHERE),
    Kind("citext beside text", "citext", "text", "Ann@x", "ann@X", "bob@x", is_indexed=False, before=CITEXT),
    Kind("citext beside char", "citext", "char(9)", "Ann@x", "ann@X ", "bob@x", is_indexed=False, before=CITEXT),
    Kind(
        "domain",
        "mail",
        "mail",
        "Ann@x",
        "ann@X",
        "b@x",
        before=f"{CITEXT}; CREATE DOMAIN mail AS citext CHECK (VALUE <> '')",
    ),
    Kind("loose", "text COLLATE loose", "text COLLATE loose", "Ann", "ann", "bob", before=LOOSE),
    Kind("exact beside loose", "text", "varchar COLLATE loose", "Ann", "ann", "bob", before=LOOSE),
    Kind("loose beside exact", "text COLLATE loose", "text", "Ann", "ann", "bob", is_indexed=False, before=LOOSE),
)

_USUAL = {"uuid", "two collations", "numeric", "char", "text beside char", "citext", "citext elsewhere"}
_USUAL |= {"citext beside text", "loose", "loose beside exact"}
every_kind = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind.name in _USUAL else pytest.mark.slow, id=kind.name) for kind in KINDS],
)
"""Runs a test with each kind. The kinds in ``_USUAL`` need different code. The other kinds are slow
tests."""


def prepare(execute: Callable[[str], list[Any]], before: str) -> None:
    """Create collations and extensions. Skip the test if the server cannot create them."""
    if "icu" in before and not execute("SELECT 1 FROM pg_collation WHERE collname LIKE '%-x-icu' LIMIT 1"):
        pytest.skip("this PostgreSQL was built without ICU")
    if "citext" in before and not execute("SELECT 1 FROM pg_available_extensions WHERE name = 'citext'"):
        pytest.skip("this PostgreSQL has no extension citext")
    for statement in filter(None, before.split("; ")):
        execute(statement)


def retype(shop: Shop, kind: Kind) -> None:
    """Change the types of the student ids of a migrated shop, and give the course ids the type
    text."""
    prepare(shop.rows, kind.before)
    for table, of_kind in (("payments", kind.paid), ("purchases", kind.bought)):
        plain = of_kind.split(" COLLATE ")[0]
        shop.rows(f"ALTER TABLE {table} ALTER student_id TYPE {of_kind} USING CAST(NULL AS {plain})")
        shop.rows(f"ALTER TABLE {table} ALTER course_id TYPE text")


def pay(
    shop: Shop, student: str, course: str = "SQL", *, due_in: str = "0 seconds", confirmed: bool = True
) -> tuple[UUID, UUID]:
    """Write a succeeded payment and its event, and return their ids. The payload repeats no values
    of the payment."""
    payment, event = uuid4(), uuid4()
    shop.rows(
        "INSERT INTO payments (id, student_id, course_id, amount, currency, status)"
        " VALUES (%s, %s, %s, 9.9, 'EUR', 'succeeded')",
        *(payment, student, course),
    )
    if confirmed:
        shop.confirm(None, event, payload={"payment_id": str(payment)}, due_in=due_in)
    return payment, event
