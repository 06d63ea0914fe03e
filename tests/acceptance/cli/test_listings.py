"""Every listing with no row, one row and a hundred thousand, on a narrow terminal and for scripts.

Those of audit and backfill are in ``test_backfill_runs``.
"""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from tests.support.factories import Shop
from tests.support.processes import finish, finish_on_terminal

MANY = 100_000
STUDENT = UUID(int=7)
LISTINGS = {
    "status": "workers",
    "dead-letters list": "dead_letters",
    "duplicates list": "duplicates",
}
"""The commands, each with the name of the list in its JSON object."""


def fill(shop: Shop, rows: int) -> None:
    """Write ``rows`` owed payments, payments to refund and dead letters.

    Write at most a hundred workers.
    """
    shop.rows(
        "INSERT INTO payments (student_id, course_id, amount, currency, status, created_at)"
        " SELECT gen_random_uuid(), gen_random_uuid(), 49.90, 'EUR', 'succeeded', now() - interval '1 day'"
        " FROM generate_series(1, %s)",
        rows,
    )
    shop.rows(
        "WITH paid AS (INSERT INTO payments (student_id, course_id, amount, currency, status, created_at)"
        " SELECT gen_random_uuid(), gen_random_uuid(), 49.90, 'EUR', 'succeeded', now() - interval '1 day'"
        " FROM generate_series(1, %s) RETURNING *) INSERT INTO purchases (student_id, course_id, amount, currency)"
        " SELECT student_id, course_id, 0, 'EUR' FROM paid",
        rows,
    )
    shop.rows(
        "INSERT INTO dead_letters (event_id, event_type, payload, created_at, attempts, reason, detail)"
        " SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', '{}', now(), 1, 'invalid_payload', 'payment_id is missing'"
        " FROM generate_series(1, %s)",
        rows,
    )
    shop.rows(
        "INSERT INTO workers (id, host, pid, version, guard) SELECT gen_random_uuid(), 'a', i, '1', 'index'"
        " FROM generate_series(1, %s) AS i",
        min(rows, 100),
    )
    shop.rows("ANALYZE")


def listed(command: str, rows: int) -> int:
    """Return how many entries the listing's object has."""
    return rows if command == "duplicates list" else min(rows, 100)


@pytest.mark.parametrize("rows", [0, 1, pytest.param(MANY, marks=pytest.mark.slow)])
def test_every_listing(rows: int, database_url: str, shop: Shop) -> None:
    fill(shop, rows)
    for command, key in LISTINGS.items():
        found = finish(*command.split(), "--json", url=database_url)
        assert found.code == 0, found.stderr
        assert len(found.object[key]) == listed(command, rows), command
        shown = finish_on_terminal(*command.split(), url=database_url)
        assert "Traceback" not in shown
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80, command
        assert shown.count("\n") < 1000, "not all of it, unless asked for"


@pytest.mark.parametrize("rows", [1, pytest.param(MANY, marks=pytest.mark.slow)])
def test_the_story_of_a_student_among_so_many(rows: int, database_url: str, shop: Shop) -> None:
    fill(shop, rows)
    course = uuid4()
    for _ in range(2):
        shop.paid(student=STUDENT, course=course)
    found = finish("why", str(STUDENT), "--json", url=database_url)
    assert len(found.object["payments"]) == 2
    shown = finish_on_terminal("why", str(STUDENT), url=database_url)
    assert "Traceback" not in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
