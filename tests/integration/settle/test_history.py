"""The history finds every moment at which a pair had two active purchases, and no other moment."""

from __future__ import annotations

import pytest

from tests.support.factories import Payment, Shop
from tests.support.guarding import without_index
from tests.support.history import assert_never_twice_active, find_twice_active, keep_history
from tests.support.makers import Connect

pytestmark = without_index

TAKE_BACK = "UPDATE purchases SET is_active = false, deactivated_at = clock_timestamp() WHERE id = %s"


@pytest.fixture
def pair(shop: Shop) -> Payment:
    keep_history(shop)
    return shop.payment()


def buy(shop: Shop, pair: Payment) -> object:
    return shop.purchase(shop.payment(student=pair.student_id, course=pair.course_id))


def test_a_double_is_found_though_it_is_gone(shop: Shop, pair: Payment, database_url: str) -> None:
    """The history also tells who wrote the two purchases, by which guard and with which locks."""
    first, second = buy(shop, pair), buy(shop, pair)
    shop.rows(TAKE_BACK, first)
    assert shop.doubled() == 0
    (found,) = find_twice_active(shop)
    assert {found.purchase_id, found.other_purchase_id} == {str(first), str(second)}
    assert (found.guard, found.is_locked, found.other_guard, found.other_is_locked) == ("none", False, "none", False)
    with pytest.raises(AssertionError, match="1 times active twice"):
        assert_never_twice_active(database_url)


def test_a_double_that_only_commits_show(shop: Shop, pair: Payment, connect: Connect) -> None:
    """By statements, the first purchase was deactivated before the second was written.

    By commits, both were active.
    """
    first, refund = buy(shop, pair), connect()
    refund.execute(TAKE_BACK, [first])
    buy(shop, pair)
    refund.commit()
    assert len(find_twice_active(shop)) == 1


def test_a_double_that_was_deleted(shop: Shop, pair: Payment) -> None:
    first = buy(shop, pair)
    buy(shop, pair)
    shop.rows("DELETE FROM purchases WHERE id = %s", first)
    assert len(find_twice_active(shop)) == 1


def test_one_after_the_other_is_no_double(shop: Shop, pair: Payment, connect: Connect, database_url: str) -> None:
    """By statements, the second purchase came before the first was deactivated, but not by commits.

    A refund that passes the pair on does both in one transaction.
    """
    first, late = buy(shop, pair), connect()
    other = shop.payment(student=pair.student_id, course=pair.course_id)
    late.execute(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency, is_active)"
        " VALUES (%s, %s, %s, 1, 'EUR', true)",
        [*other.pair, other.id],
    )
    shop.rows(TAKE_BACK, first)
    late.commit()
    with shop.connection.transaction():
        shop.rows("UPDATE purchases SET is_active = false WHERE payment_id = %s", other.id)
        buy(shop, pair)
    assert assert_never_twice_active(database_url) == 3


def test_what_was_rolled_back_to_a_savepoint_is_not_told(shop: Shop, pair: Payment, database_url: str) -> None:
    with shop.connection.transaction():
        shop.rows("SAVEPOINT attempt")
        buy(shop, pair)
        shop.rows("ROLLBACK TO SAVEPOINT attempt")
        buy(shop, pair)
    assert assert_never_twice_active(database_url) == 1


def test_the_writers_lock_is_told(shop: Shop, pair: Payment) -> None:
    with shop.connection.transaction():
        key = f"{pair.student_id}:{pair.course_id}"
        shop.rows("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", key)
        buy(shop, pair)
    buy(shop, pair)
    (found,) = find_twice_active(shop)
    assert (found.is_locked, found.other_is_locked) == (True, False)
