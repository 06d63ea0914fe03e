"""Outputs print ids as strings, whatever their type, and counts as numbers.

A CSV file runs no formula.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

import pytest

from outbox_worker.terminal import csv_cell
from tests.support.factories import Shop
from tests.support.processes import finish

IDS = ("id", "held_by", "subject", "purchase_id", "payment_id", "event_id", "student_id", "course_id")


def ids_in(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from ids_in(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from ids_in(each, key)
    elif key in IDS and value is not None:
        yield key, value


@pytest.fixture
def numbered(shop: Shop) -> Shop:
    """Use integers as ids of students, courses and purchases."""
    shop.rows("DROP TABLE purchases")
    shop.rows(
        "CREATE TABLE purchases (id serial PRIMARY KEY, student_id int, course_id int, payment_id uuid UNIQUE,"
        " amount numeric(12, 2), currency char(3), is_active bool DEFAULT true, created_at timestamptz DEFAULT now(),"
        " deactivated_at timestamptz)"
    )
    shop.rows("ALTER TABLE payments ALTER student_id TYPE int USING 7, ALTER course_id TYPE int USING 8")
    for _ in range(2):
        shop.rows(
            "INSERT INTO payments (student_id, course_id, amount, currency, status)"
            " VALUES (7, 8, 9.90, 'EUR', 'succeeded')"
        )
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT 7, 8, id, 9.90, 'EUR' FROM payments LIMIT 1"
    )
    shop.rows("INSERT INTO purchases (student_id, course_id, amount, currency) VALUES (7, 9, 9.90, 'EUR')")
    shop.rows(
        "INSERT INTO payments (student_id, course_id, amount, currency, status) VALUES (9, 9, 9.90, 'EUR', 'succeeded')"
    )
    return shop


@pytest.mark.usefixtures("numbered")
def test_every_object_has_strings_for_ids_and_numbers_for_counts(database_url: str) -> None:
    seen: set[str] = set()
    given = [
        ["audit"],
        ["why", "7"],
        ["why", "1"],
        ["duplicates", "list"],
        ["backfill", "--dry-run", "--older-than", "0s"],
    ]
    for command in given:
        found = finish(*command, "--json", url=database_url).object
        for key, value in ids_in(found):
            assert isinstance(value, str), (command, key, value)
            seen.add(key)
    assert seen == set(IDS) - {"event_id"}
    assert finish("audit", "--json", url=database_url).object["counts"]["duplicate"] == 1
    (paid,) = finish("duplicates", "list", "--json", url=database_url).object["duplicates"]
    assert (paid["payment"]["student_id"], paid["payment"]["course_id"], paid["purchase_id"]) == ("7", "8", "1")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_of_a_file_that_begins_like_a_formula_is_text(start: str) -> None:
    assert csv_cell(f"{start}HYPERLINK(1)") == f"'{start}HYPERLINK(1)"


@pytest.mark.parametrize("value", ["-9.90", "+1", 5, -5, "49.90", "a=b", "", None])
def test_numbers_and_other_texts_stay_as_they_are(value: Any) -> None:
    assert csv_cell(value) == value


def test_duplicates_as_a_file_run_no_formula(database_url: str, shop: Shop) -> None:
    shop.rows("DROP TABLE purchases")
    shop.rows(
        "CREATE TABLE purchases (id serial PRIMARY KEY, student_id text, course_id text, payment_id uuid UNIQUE,"
        " amount numeric(12, 2), currency char(3), is_active bool DEFAULT true, created_at timestamptz DEFAULT now(),"
        " deactivated_at timestamptz)"
    )
    shop.rows("ALTER TABLE payments ALTER student_id TYPE text, ALTER course_id TYPE text")
    for _ in range(2):
        shop.rows(
            "INSERT INTO payments (student_id, course_id, amount, currency, status)"
            " VALUES ('=1+1', '@x', 9.90, 'EUR', 'succeeded')"
        )
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT student_id, course_id, id, 9.90, 'EUR' FROM payments LIMIT 1"
    )
    done = finish("duplicates", "list", "--csv", url=database_url)
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert (row["student"], row["course"], row["amount"]) == ("'=1+1", "'@x", "9.90")
