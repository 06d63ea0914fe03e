"""Amounts as text, and exact sums."""

from __future__ import annotations

from decimal import Decimal

import pytest

from outbox_worker import money, terminal
from outbox_worker.model import PaymentTotals


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [
        ("49.9", "EUR", "49.90"),
        ("500", "JPY", "500.00"),
        ("12.3", "KWD", "12.300"),
        ("12.345", "kwd ", "12.345"),
        ("1", "CLF", "1.0000"),
        ("0.00412000", "BTC", "0.00412"),
        ("49.999", "EUR", "49.999"),
        ("-0.5", "EUR", "-0.50"),
        ("1E+3", "EUR", "1000.00"),
        ("1" + "0" * 40 + ".01", "EUR", "1" + "0" * 40 + ".01"),
        ("NaN", "EUR", "NaN"),
        ("-Infinity", "EUR", "-Infinity"),
        ("5", None, "5.00"),
    ],
)
def test_an_amount_has_the_decimals_of_its_currency_and_is_never_rounded(
    amount: str, currency: str | None, text: str
) -> None:
    assert money.amount_text(Decimal(amount), currency) == text


def test_thousands_are_grouped_only_before_the_point() -> None:
    assert money.amount_text(Decimal("1234567.12345"), "EUR", grouped=True) == "1,234,567.12345"


def test_a_sum_keeps_every_digit() -> None:
    large, small = Decimal(10) ** 40, Decimal("0.00000001")
    assert money.add(large, small) == Decimal("1" + "0" * 40 + ".00000001")
    assert money.add(Decimal("Infinity"), Decimal("-Infinity")).is_nan()


def test_totals_keep_every_digit_and_every_currency_apart() -> None:
    large, small = Decimal(10) ** 30, Decimal("0.001")
    total = PaymentTotals(1, {"EUR": large}) + PaymentTotals(1, {"EUR": small, "KWD": small})
    assert total.written()["money"] == {"EUR": f"1{'0' * 30}.001", "KWD": "0.001"}
    assert (PaymentTotals.read(total.written()) - PaymentTotals(1, {"EUR": large})).money["EUR"] == small


def test_json_takes_the_currency_from_the_key_or_from_the_field_beside_it() -> None:
    assert terminal.plain({"KWD": Decimal("1.5"), "EUR": Decimal("1.5")}) == {"KWD": "1.500", "EUR": "1.50"}
    assert terminal.plain({"amount": Decimal("1.5"), "currency": "KWD"}) == {"amount": "1.500", "currency": "KWD"}
