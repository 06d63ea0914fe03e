"""Durations, moments and counts as people write and read them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from outbox_worker.durations import count_of, parse_duration, parse_moment
from outbox_worker.errors import WrongUsage


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as changed:
        changed.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5m", 300), (" 2H ", 7200), ("1.5d", 129_600), ("0", 0), ("0s", 0), ("15 m", 900)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "--older-than") == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "5", "5x", "-5m", "m", "1h30m", "\N{ARABIC-INDIC DIGIT FIVE}m", "1e3s", "inf", "9999999d"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(WrongUsage, match=r"^--older-than: a duration is expected"):
        parse_duration(text, "--older-than")


@pytest.mark.usefixtures("far_from_utc")
@pytest.mark.parametrize(
    "text",
    ["2026-01-31T11:30:00", "2026-01-31 11:30", "2026-01-31T11:30:00Z", "2026-01-31T12:30:00+01:00", "20260131T113000"],
)
def test_moments_without_a_zone_are_utc(text: str) -> None:
    assert parse_moment(text, "--since") == datetime(2026, 1, 31, 11, 30, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "31.01.2026", "0001-01-01T00:00:00+14:00"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(WrongUsage, match=r"^--since: a date or time is expected"):
        parse_moment(text, "--since")


@pytest.mark.parametrize(("number", "said"), [(0, "0 payments"), (1, "1 payment"), (1200, "1,200 payments")])
def test_counts_with_their_nouns(number: int, said: str) -> None:
    assert count_of(number, "payment") == said
