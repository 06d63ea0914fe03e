"""Payload values that repeat the payment are compared by the types of its columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from outbox_worker.model import Outcome, Reason
from tests.support import payloads
from tests.support.factories import Shop, drain_all
from tests.support.makers import MakeProcessor
from tests.support.same_ids import CITEXT, LOOSE, Kind, pay, retype

LONG = "x" * 150


class Case(NamedTuple):
    """An id of the payment, and payload values that are the same id or another id."""

    of_students: str
    student: str
    same: Sequence[Any]
    other: Sequence[Any]
    before: str = ""


CASES = (
    Case("uuid", "0000000a" * 4, ["0000000A-0000-000A-0000-000A0000000A"], ["0000000b" * 4, "", "{}", 10]),
    Case("int4", "7", [7, "7", "007", "+7"], [8, "7.0", "x", "", "-7", "1e999", "9" * 41, "9" * 200, True, [7], " "]),
    Case("numeric", "1.50", [1.5, "1.5", "1.500", "15e-1"], [1.51, "x", "NaN", "1e999", "1.5 ", "9" * 200]),
    Case("text", "Ann", ["Ann"], ["ann", "Ann ", "", "Änn", "An"]),
    Case("text", "0000000a-0000-000a-0000-000a0000000a", [], ["0000000A-0000-000A-0000-000A0000000A"]),
    Case("text", LONG, [LONG], [LONG[:100], LONG + "x", LONG[:-1] + "y"]),
    Case("text", "x" * 20_000, ["x" * 20_000], ["x" * 20_001]),
    Case("varchar(100)", LONG[:100], [LONG[:100]], [LONG]),
    Case("char(12)", "S-1", ["S-1", "S-1         ", "S-1" + " " * 200], [" S-1", "S-1\t", "s-1", "S-1 x"]),
    Case("citext", "Ann@x", ["ann@X", "Ann@x"], ["Ann@x ", "bob", "a" * 50_000], CITEXT),
    Case("citext", "a" * 150, ["A" * 150], ["A" * 151], CITEXT),
    Case("text COLLATE loose", "Ann", ["ann", "ANN"], ["Anne", "Ann "], LOOSE),
)


@pytest.mark.parametrize("column", ["jsonb", "text"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.of_students} {case.student[:6]} {len(case.student)}")
def test_a_repeated_id_is_compared_by_its_type(
    case: Case, column: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    retype(shop, Kind("", case.of_students, case.of_students, "", "", "", before=case.before))
    payloads.retype(shop, column)
    values = [*case.same, *case.other]
    events = []
    for number, value in enumerate(values):
        payment, _ = pay(shop, case.student, f"course {number}", confirmed=False)
        events.append(payloads.put(shop, column, json.dumps({"payment_id": str(payment), "student_id": value})))
    expected = {Outcome.CREATED: len(case.same), Outcome.DEAD: len(case.other)}
    assert drain_all(make_processor()) == {outcome: count for outcome, count in expected.items() if count}
    for event, value in zip(events, values, strict=True):
        assert event is not None
        letter = shop.letter_of(event)
        assert (letter is None) == (value in case.same), value
        assert letter is None or (letter.reason, letter.detail) == (
            Reason.PAYMENT_MISMATCH,
            "differs from the payment row: student_id",
        )


@pytest.mark.parametrize("of_currency", ["char(5)", "text", "varchar", "currency"])
def test_currencies_are_compared_in_upper_case_without_blanks(
    of_currency: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    shop.rows("CREATE TYPE currency AS ENUM ('eur', 'EUR')")
    shop.rows(f"ALTER TABLE payments ALTER currency TYPE {of_currency} USING 'eur'::{of_currency}")
    shop.rows("ALTER TABLE purchases ALTER currency TYPE text")
    for given in ("EUR", "eur", " Eur ", "EUR" + " " * 500):
        shop.paid(currency="eur", payload={"currency": given})
    for given in ("EURO", "", "E UR", "EUR" + " " * 200 + "x", "978", "x" * 5_000):
        shop.paid(currency="eur", payload={"currency": given})
    assert drain_all(make_processor()) == {Outcome.CREATED: 4, Outcome.DEAD: 6}
    details = {row.detail for row in shop.rows("SELECT detail FROM dead_letters")}
    assert details == {"differs from the payment row: currency"}
