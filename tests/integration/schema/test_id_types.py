"""Ids of other types than UUID: purchases get the types of payments.

Types that cannot be compared are refused.
"""

from __future__ import annotations

import pytest

from outbox_worker.errors import SchemaError
from outbox_worker.model import Guard, Outcome
from tests.support.installations import Installation
from tests.support.same_ids import CITEXT, ELSEWHERE, LOOSE, prepare

PAYMENTS = """
    CREATE TABLE payments (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), student_id {} NOT NULL,
    course_id text NOT NULL, amount numeric(12,2) NOT NULL, currency char(3) NOT NULL, status text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now())
"""
PURCHASES = """
    CREATE TABLE purchases (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), student_id {} NOT NULL,
    course_id text NOT NULL, payment_id uuid UNIQUE, amount numeric NOT NULL, currency char(3) NOT NULL,
    is_active boolean NOT NULL DEFAULT true, created_at timestamptz NOT NULL DEFAULT now(), deactivated_at timestamptz)
"""
DOMAIN = f"{ELSEWHERE}; CREATE SCHEMA shop; CREATE DOMAIN shop.mail AS ext.citext"


@pytest.mark.parametrize(
    ("before", "of_students"),
    [(ELSEWHERE, "ext.citext"), (DOMAIN, "shop.mail"), (LOOSE, "text COLLATE loose"), ("", "numeric(20,3)")],
    ids=["citext elsewhere", "domain", "loose", "numeric"],
)
def test_purchases_get_the_types_of_payments(empty: Installation, before: str, of_students: str) -> None:
    prepare(empty.execute, before)
    empty.execute(PAYMENTS.format(of_students))
    empty.migrate("unique_index")
    types = empty.execute(
        "SELECT array_agg(DISTINCT (format_type(atttypid, atttypmod), attcollation)::text) FROM pg_attribute"
        " WHERE attname = 'student_id' AND attrelid IN ('payments'::regclass, 'purchases'::regclass)"
    )
    assert len(types[0][0]) == 1
    first, second = ("1.0", "1") if "numeric" in of_students else ("Ann", "ann")
    empty.execute(
        "WITH paid AS (INSERT INTO payments (student_id, course_id, amount, currency, status)"
        f" VALUES ('{first}', 'SQL', 9.9, 'EUR', 'succeeded'), ('{second}', 'SQL', 9.9, 'EUR', 'succeeded')"
        " RETURNING id) INSERT INTO outbox (event_id, event_type, payload)"
        " SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', jsonb_build_object('payment_id', id) FROM paid"
    )
    assert empty.guard() is Guard.INDEX
    assert empty.drain() == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}


@pytest.mark.parametrize(
    ("before", "paid", "bought", "said"),
    [
        ("", "numeric", "int8", "student_id is numeric and public.purchases.student_id is int8\n.*convert one of the"),
        ("", "text", "uuid", "student_id is text and public.purchases.student_id is uuid\n.*convert one of the"),
        ("", "numeric(9,2)", "numeric(9,1)", "with 2 decimals and .* with 1 decimals\n.*the same scale"),
        (f"{LOOSE}; {CITEXT}", "citext", "text COLLATE loose", "citext and .*COLLATE public.loose\n.*the same type"),
        ("", "bytea", "bytea", "student_id is bytea, not uuid"),
    ],
    ids=["numeric", "text", "scale", "two rules", "bytes"],
)
def test_ids_that_cannot_be_compared_are_refused(
    empty: Installation, before: str, paid: str, bought: str, said: str
) -> None:
    prepare(empty.execute, before)
    empty.execute(PAYMENTS.format(paid))
    empty.execute(PURCHASES.format(bought))
    with pytest.raises(SchemaError, match=said):
        empty.migrate()
