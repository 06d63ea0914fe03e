"""Formats and adds amounts of money. An amount is never rounded, and amounts of two currencies are never added."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Context, Decimal

DECIMALS_MIN = 2
"""The smallest number of decimals to show, also for currencies with fewer decimals (JPY)."""

_DECIMALS = {"BHD": 3, "CLF": 4, "IQD": 3, "JOD": 3, "KWD": 3, "LYD": 3, "OMR": 3, "TND": 3, "UYW": 4}
"""The number of decimals of each currency of ISO 4217 that has more than two."""

_EXACT = Context(prec=200_000, traps=[])
"""The decimal context that adds two ``numeric`` values exactly. A value has up to 131,072 digits and 16,383 decimals.

The default context rounds a sum to 28 digits, and raises an error for the sum of infinity and minus infinity.
"""


def amount_text(amount: Decimal, currency: str | None, *, grouped: bool = False) -> str:
    """Return an amount with the decimals of its currency.

    If the amount has more decimals, keep them. ``grouped`` separates thousands by commas. For NaN
    and infinity, return the name.
    """
    if not amount.is_finite():
        return str(amount)
    whole, _, decimals = (f"{amount:,f}" if grouped else f"{amount:f}").partition(".")
    wanted = _DECIMALS.get((currency or "").strip().upper(), DECIMALS_MIN)
    return f"{whole}.{decimals.rstrip('0').ljust(wanted, '0')}"


def amount_of(amount: Decimal | None, currency: str | None) -> str:
    """Return an amount with its currency. A missing value is ``NULL``, as in SQL."""
    return f"{'NULL' if amount is None else amount_text(amount, currency)} {currency or 'NULL'}"


def amount_texts(money: Mapping[str, Decimal]) -> dict[str, str]:
    """Return the sum of each currency as text."""
    return {currency: amount_text(amount, currency) for currency, amount in money.items()}


def add(one: Decimal, other: Decimal) -> Decimal:
    """Return the exact sum of two amounts of the same currency."""
    return _EXACT.add(one, other)
