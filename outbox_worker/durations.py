"""Pure functions that parse durations and times from the command line, and format durations and counts for people."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from outbox_worker.errors import WrongUsage

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)\s*([smhd])", re.ASCII)


def parse_duration(text: str, option: str) -> timedelta:
    """Parse a duration such as ``90s``, ``5m``, ``2h`` or ``1d``. Only ``0`` needs no unit.

    Raises WrongUsage.
    """
    written = text.strip().lower()
    if written == "0":
        return timedelta(0)
    found = _DURATION.fullmatch(written)
    if found is None:
        raise WrongUsage(f"{option}: a duration is expected, such as 90s, 5m, 2h or 1d.")
    return timedelta(**{_UNITS[found[2]]: float(found[1])})


def parse_moment(text: str, option: str) -> datetime:
    """Parse an RFC 3339 date, or date and time. A time without a zone is in UTC. Raises WrongUsage."""
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise WrongUsage(f"{option}: a date or time is expected, such as 2026-01-31 or 2026-01-31T12:00:00Z.") from None


def ago(seconds: float) -> str:
    """Format a duration with its two largest units: 42s, 3m 05s, 2h 10m, 4d 03h."""
    whole = int(max(0.0, seconds))
    for unit, size, smaller, smaller_size in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller_size:02d}{smaller}"
    return f"{whole}s"


def count_of(number: int, noun: str) -> str:
    """Format a number with its noun: ``0 payments``, ``1 payment``, ``1,200 payments``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
