"""Builds SQL expressions for timestamps.

The expressions also handle ``-infinity`` and ``infinity``. Python cannot represent these values.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Float,
    case,
    cast,
    func,
    literal_column,
)

_LONGEST_SECONDS = 10**9

_FIRST_MOMENT: ColumnElement[Any] = literal_column("CAST('0001-01-02' AS timestamptz)")

_LAST_MOMENT: ColumnElement[Any] = literal_column("CAST('9999-12-30' AS timestamptz)")


def seconds_since(moment: ColumnElement[Any]) -> ColumnElement[float]:
    """Return the seconds that have passed since ``moment`` by the clock of the database.

    The result is NULL if ``moment`` is NULL. The result is negative if ``moment`` is in the future.
    The result lies between ``-_LONGEST_SECONDS`` and ``_LONGEST_SECONDS``.
    """
    elapsed = func.date_part("epoch", func.clock_timestamp()) - func.date_part("epoch", moment)
    bounded = func.greatest(func.least(elapsed, _LONGEST_SECONDS), -_LONGEST_SECONDS)
    return cast(case((moment.is_not(None), bounded)), Float)


def is_readable(moment: ColumnElement[Any]) -> ColumnElement[bool]:
    """Build the condition that Python can represent the time.

    The condition fails for NULL, infinity and -infinity.
    """
    return moment.between(_FIRST_MOMENT, _LAST_MOMENT)


def readable(moment: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the time. Return NULL if Python cannot represent it, for example ``-infinity``."""
    return case((is_readable(moment), moment)).label(moment.key)
