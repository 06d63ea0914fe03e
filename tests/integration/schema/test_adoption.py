"""Tables of another application: a migration adopts them unchanged or refuses before it starts."""

from __future__ import annotations

import pytest

from outbox_worker.errors import Refused, SchemaError
from outbox_worker.model import Guard, Outcome
from outbox_worker.schema.migrate import VERSION_TABLE
from outbox_worker.schema.tables import PAIR_INDEX, PAIR_LOOKUP_INDEX
from tests.support.factories import Shop
from tests.support.installations import OWN, SHOPS_PAYMENTS, Installation

# --- adoption


def test_an_adopted_table_stays_as_it_was(adopting: Installation) -> None:
    before = adopting.snapshot()["public.purchases"]
    done = adopting.migrate()
    assert done.adopted == ("public.purchases",)
    assert set(done.created) == OWN - {"public.purchases"}
    assert adopting.snapshot()["public.purchases"] == before


def test_an_adopted_table_is_never_dropped_even_when_empty(adopting: Installation) -> None:
    adopting.execute("TRUNCATE purchases")
    before = adopting.snapshot()
    adopting.migrate()
    adopting.downgrade("core")
    after = adopting.snapshot()
    after.pop(f"public.{VERSION_TABLE}")
    assert after == before


def test_an_adopted_table_takes_the_index_only_when_asked(adopting: Installation) -> None:
    adopting.migrate()
    before = adopting.snapshot()["public.purchases"]
    adopting.migrate("unique_index")
    added = set(adopting.indexes()) - {row[0] for row in before["indexes"]}
    assert added == {PAIR_INDEX}
    assert adopting.guard() is Guard.INDEX


def test_up_and_down_leave_an_adopted_table_as_it_was(adopting: Installation) -> None:
    adopting.migrate()
    before = adopting.snapshot()["public.purchases"]
    adopting.migrate("unique_index")
    adopting.downgrade("unique_index")
    assert adopting.snapshot()["public.purchases"] == before


def test_the_worker_can_settle_into_an_adopted_table(adopting: Installation) -> None:
    adopting.migrate("unique_index")
    shop = Shop(adopting.connection)
    payment = shop.payment()
    shop.purchase(payment)
    assert shop.scalar("SELECT sales_channel FROM purchases WHERE payment_id = %s", payment.id) == "web"


@pytest.mark.parametrize("options", [(), ("unique_index",)], ids=["lock", "index"])
def test_students_and_courses_may_be_numbers_and_texts(empty: Installation, options: tuple[str, ...]) -> None:
    """The new purchases fit the existing payments.

    Columns that the worker never reads are not required.
    """
    empty.execute(SHOPS_PAYMENTS)
    empty.settings = {"columns": "payments.student_id=user_id"}
    assert empty.migrate(*options).adopted == ("public.payments",)
    empty.execute(
        "INSERT INTO payments (id, user_id, course_id, amount, currency, status)"
        " SELECT gen_random_uuid(), n / 2, 'SQL', 9.90, 'EUR', 'succeeded' FROM generate_series(0, 9) AS n"
    )
    empty.execute(
        "INSERT INTO outbox (event_id, event_type, payload) SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED',"
        " jsonb_build_object('payment_id', id, 'student_id', user_id, 'course_id', course_id) FROM payments"
    )
    assert empty.drain() == {Outcome.CREATED: 5, Outcome.DUPLICATE_PAYMENT: 5}
    assert empty.execute("SELECT student_id, course_id FROM purchases ORDER BY 1") == [(n, "SQL") for n in range(5)]
    empty.execute(
        "INSERT INTO outbox (event_id, event_type, payload) SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED',"
        " jsonb_build_object('payment_id', gen_random_uuid(), 'course_id', 'sql') FROM payments LIMIT 1"
    )
    empty.execute(
        "INSERT INTO payments (id, user_id, course_id, amount, currency, status)"
        " SELECT CAST(payload ->> 'payment_id' AS uuid), 9, 'SQL', 9.90, 'EUR', 'succeeded' FROM outbox"
    )
    assert empty.drain() == {Outcome.DEAD: 1}, "another text is another course"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ALTER TABLE payments ALTER amount TYPE int", r"payments\.amount is int4, not numeric.*not cents"),
        ("ALTER TABLE payments RENAME user_id TO buyer_id", r"payments\.user_id is missing\n.*did you mean buyer_id"),
        ("ALTER TABLE payments ALTER created_at TYPE text", r"created_at is text, not timestamp"),
        ("CREATE TABLE purchases (LIKE payments)", r"purchases\.student_id is missing"),
        (
            "CREATE TABLE purchases (id uuid DEFAULT gen_random_uuid(), student_id uuid, course_id uuid,"
            " payment_id uuid, amount numeric, currency text, is_active bool, created_at timestamptz,"
            " deactivated_at timestamptz)",
            r"payments\.user_id is int8 and public\.purchases\.student_id is uuid(.|\n)*course_id is text",
        ),
    ],
    ids=["cents", "another name", "another type", "purchases of another form", "pairs of another kind"],
)
def test_tables_that_do_not_fit_stop_it_before_anything_is_made(empty: Installation, change: str, said: str) -> None:
    empty.execute(SHOPS_PAYMENTS)
    empty.execute(change)
    empty.settings = {"columns": "payments.student_id=user_id"}
    before = empty.tables()
    with pytest.raises(SchemaError, match=said):
        empty.migrate()
    assert empty.tables() == before


# --- unique_index


@pytest.mark.parametrize("name", [PAIR_INDEX, PAIR_LOOKUP_INDEX])
def test_an_index_of_our_name_on_another_table_is_left_alone(adopting: Installation, name: str) -> None:
    adopting.execute(f"CREATE TABLE notes (id int); CREATE INDEX {name} ON notes (id)")
    before = adopting.snapshot()["public.notes"]
    if name == PAIR_INDEX:
        with pytest.raises(Refused, match=f"{PAIR_INDEX} already exists, but it is another index, on notes"):
            adopting.migrate("unique_index")
    else:
        adopting.migrate("unique_index")
    assert adopting.snapshot()["public.notes"] == before


@pytest.mark.parametrize("name", [PAIR_INDEX, PAIR_LOOKUP_INDEX])
def test_a_shops_own_index_of_our_name_is_left_alone(adopting: Installation, name: str) -> None:
    adopting.execute(f"CREATE INDEX {name} ON purchases (course_id)")
    before = adopting.indexes()
    if name == PAIR_INDEX:
        with pytest.raises(Refused, match=f"{PAIR_INDEX} already exists, but it is another index, on purchases"):
            adopting.migrate("unique_index")
        assert adopting.indexes() == before
    else:
        adopting.migrate("unique_index")
        assert adopting.indexes() == before | {PAIR_INDEX: True}
