"""Students who paid twice are listed until the second payment is refunded."""

from __future__ import annotations

import csv
import io
from decimal import Decimal
from uuid import UUID

import pytest

from tests.support.factories import Payment, Shop
from tests.support.payloads import TYPES, retype
from tests.support.processes import finish, finish_on_terminal


def pay_twice(shop: Shop) -> tuple[Payment, Payment]:
    """Write two payments of one pair. The second one gets no purchase."""
    first, _ = shop.paid(due_in="-2 hours")
    second, _ = shop.paid(student=first.student_id, course=first.course_id, amount="39.90", due_in="-1 hour")
    return first, second


def listed(url: str) -> dict[UUID, dict[str, object]]:
    found = finish("duplicates", "list", "--json", url=url)
    assert found.code == 0, found.stderr
    return {UUID(each["payment"]["payment_id"]): each for each in found.object["duplicates"]}


@pytest.mark.usefixtures("both_guards")
def test_a_duplicate_is_listed_until_it_is_refunded(database_url: str, shop: Shop) -> None:
    first, second = pay_twice(shop)
    shop.pay_many(5)
    assert finish("run", "--drain", url=database_url).code == 0
    found = finish("duplicates", "list", "--json", url=database_url).object
    assert (found["count"], found["owed_back"]) == (1, {"EUR": "39.90"})
    entry = listed(database_url)[second.id]
    assert entry["held_by"] == str(first.id)
    assert str(entry["held_since"]).endswith("Z")
    shown = finish("duplicates", "list", url=database_url).stdout
    assert "1 payment to refund: 39.90 EUR." in shown
    shop.set_status(second, "refunded")
    assert listed(database_url) == {}
    assert "Nobody has paid twice" in finish("duplicates", "list", url=database_url).stdout


def test_who_is_to_get_the_pair_is_not_paid_back(database_url: str, shop: Shop) -> None:
    """The first payment was refunded, and its event is missing.

    The second payment is owed the purchase.
    """
    first, second = pay_twice(shop)
    assert finish("run", "--drain", url=database_url).code == 0
    shop.set_status(first, "refunded")
    found = finish("duplicates", "list", "--json", url=database_url).object
    assert (found["count"], found["owed_back"], found["duplicates"]) == (0, {}, [])
    assert [each["payment"]["payment_id"] for each in found["not_owed_back"]] == [str(second.id)]
    shown = finish("duplicates", "list", url=database_url).stdout
    assert "Do not refund 1 other payment" in shown
    assert "Nobody has paid twice" in shown
    assert finish("duplicates", "list", "--csv", url=database_url).stdout.count("\n") == 1
    shop.refund(first)
    assert finish("run", "--drain", url=database_url).code == 0
    assert [row.is_active for row in shop.purchases(second)] == [True]
    assert finish("duplicates", "list", "--json", url=database_url).object["not_owed_back"] == []


def test_a_gift_holds_a_pair_too(database_url: str, shop: Shop) -> None:
    payment = shop.payment()
    shop.purchase(None, *payment.pair)
    assert listed(database_url)[payment.id]["held_by"] is None
    assert "a gift" in finish("duplicates", "list", url=database_url).stdout


@pytest.mark.parametrize("column", TYPES)
def test_what_is_no_duplicate_is_not_listed(column: str, database_url: str, shop: Shop) -> None:
    retype(shop, column)
    first, second = pay_twice(shop)
    assert finish("run", "--drain", url=database_url).code == 0
    active, revoked, _, waiting = (shop.payment() for _ in range(4))
    shop.purchase(active)
    shop.purchase(revoked, active=False)
    shop.rows(
        "INSERT INTO outbox (event_id, event_type, payload) SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED',"
        f" CAST(CAST(jsonb_build_object('payment_id', '{waiting.id}') AS text) AS {column})"
    )
    assert set(listed(database_url)) == {second.id}
    shop.rows("UPDATE purchases SET is_active = false WHERE payment_id = %s", first.id)
    assert listed(database_url) == {}, "the pair is free: the payment is owed a purchase, not given back"


def test_as_csv_for_the_accounts(database_url: str, shop: Shop) -> None:
    first, second = pay_twice(shop)
    assert finish("run", "--drain", url=database_url).code == 0
    (row,) = csv.DictReader(io.StringIO(finish("duplicates", "list", "--csv", url=database_url).stdout))
    assert (row["payment"], row["student"], row["course"]) == tuple(
        map(str, (second.id, second.student_id, second.course_id))
    )
    assert (Decimal(row["amount"]), row["currency"], row["held_by"]) == (Decimal("39.90"), "EUR", str(first.id))
    assert row["paid_at"].endswith("Z")
    assert finish("duplicates", "list", "--csv", "--json", url=database_url).code == 2


@pytest.mark.slow
def test_none_and_a_hundred_thousand(database_url: str, shop: Shop) -> None:
    assert finish("duplicates", "list", "--csv", url=database_url).stdout.count("\n") == 1
    shop.rows(
        "WITH paid AS (INSERT INTO payments (student_id, course_id, amount, currency, status)"
        " SELECT gen_random_uuid(), gen_random_uuid(), 10, 'EUR', 'succeeded' FROM generate_series(1, 100000)"
        " RETURNING *) INSERT INTO purchases (student_id, course_id, amount, currency)"
        " SELECT student_id, course_id, amount, currency FROM paid"
    )
    shop.rows("ANALYZE")
    shown = finish_on_terminal("duplicates", "list", "--limit", "2", url=database_url)
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "100,000 payments to refund: 1,000,000.00 EUR." in shown
    assert finish("duplicates", "list", "--csv", url=database_url).stdout.count("\n") == 100_001
