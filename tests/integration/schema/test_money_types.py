"""Purchases can hold every amount and currency of payments.

If purchases cannot, the problem is reported, and no column is altered unasked.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from alembic import command

from outbox_worker.database.engine import Database
from outbox_worker.errors import SchemaError
from outbox_worker.model import Outcome
from outbox_worker.schema.concerns import find_concerns
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.requirements import check_schema, find_problems
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import load_settings
from tests.support.installations import Installation

SHOPS_PAYMENTS = """
    CREATE TABLE payments (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(), student_id uuid NOT NULL, course_id uuid NOT NULL,
        amount {amount} NOT NULL, currency {currency} NOT NULL, status text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
"""
SHOPS_PURCHASES = """
    CREATE TABLE purchases (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(), student_id uuid NOT NULL, course_id uuid NOT NULL,
        payment_id uuid UNIQUE, amount {amount} NOT NULL, currency {currency} NOT NULL,
        is_active boolean NOT NULL DEFAULT true, created_at timestamptz NOT NULL DEFAULT now(),
        deactivated_at timestamptz
    )
"""
PAY = """
    WITH p AS (INSERT INTO payments (student_id, course_id, amount, currency, status)
               VALUES (gen_random_uuid(), gen_random_uuid(), %s, %s, 'succeeded') RETURNING id)
    INSERT INTO outbox (event_id, event_type, payload)
    SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', jsonb_build_object('payment_id', id) FROM p
"""
RECORDED = """
    SELECT p.amount::text, p.currency::text, b.amount::text, b.currency::text
    FROM payments p LEFT JOIN purchases b ON b.payment_id = p.id ORDER BY p.amount
"""
LIMITED = "ALTER TABLE purchases ALTER amount TYPE numeric(12,2), ALTER currency TYPE char(3)"


def types_of_purchases(site: Installation) -> dict[str, str]:
    rows = site.execute(
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = 'purchases'::regclass AND attname IN ('amount', 'currency')"
    )
    return dict(rows)


def problems(site: Installation) -> list[SchemaProblem]:
    found: list[SchemaProblem] = looked(site, find_problems)
    return found


def concerns(site: Installation) -> list[SchemaProblem]:
    found: list[SchemaProblem] = looked(site, find_concerns)
    return found


def looked(site: Installation, look: Any) -> Any:
    settings = load_settings(database_url=site.url, **site.settings)
    database = Database(settings, deadline_seconds=10)
    try:
        with database.transaction() as session:
            return look(session, build_tables(settings))
    finally:
        database.close()


def before_the_list(site: Installation) -> None:
    """Take the database back to what the previous version made."""
    site.alembic(command.downgrade, "core_0004")
    site.execute(LIMITED)


@pytest.mark.parametrize(
    ("currency", "taken"), [("varchar(10)", "character varying(10)"), ("kind_of_money", "text")], ids=["string", "enum"]
)
def test_a_purchases_table_of_ours_takes_what_the_payments_have(empty: Installation, currency: str, taken: str) -> None:
    empty.execute("CREATE TYPE kind_of_money AS ENUM ('KWD', 'BTC', 'IDR', 'USDT')")
    empty.execute(SHOPS_PAYMENTS.format(amount="numeric(20,8)", currency=currency))
    empty.migrate("unique_index")
    assert types_of_purchases(empty) == {"amount": "numeric", "currency": taken}
    assert (problems(empty), concerns(empty)) == ([], [])
    for paid in (("12.345", "KWD"), ("0.00412", "BTC"), ("12500000000", "IDR"), ("10", "USDT")):
        empty.execute(PAY, *paid)
    assert empty.drain() == {Outcome.CREATED: 4}
    assert all(row[:2] == row[2:] for row in empty.execute(RECORDED))


def test_an_older_table_of_ours_gets_unlimited_amounts_without_a_rewrite(migrated: Installation) -> None:
    before_the_list(migrated)
    migrated.execute(
        "INSERT INTO purchases (student_id, course_id, amount, currency)"
        " VALUES (gen_random_uuid(), gen_random_uuid(), 9.90, 'EUR')"
    )
    file = migrated.execute("SELECT pg_relation_filenode('purchases')")
    migrated.migrate()
    assert types_of_purchases(migrated) == {"amount": "numeric", "currency": "character(3)"}
    assert migrated.execute("SELECT pg_relation_filenode('purchases')") == file
    assert migrated.execute("SELECT amount::text FROM purchases") == [("9.90",)]


def test_before_the_migration_the_worker_names_it_instead_of_rounding(empty: Installation) -> None:
    empty.execute(SHOPS_PAYMENTS.format(amount="numeric(20,8)", currency="char(3)"))
    empty.migrate()
    before_the_list(empty)
    assert [(each.finding, each.remedy) for each in problems(empty)] == [
        (
            "column public.purchases.amount is numeric(12,2), narrower than public.payments.amount (numeric(20,8)), "
            "so PostgreSQL would round amounts without an error",
            "run `outbox-worker migrate`",
        )
    ]
    with pytest.raises(SchemaError, match=r"purchases\.amount"):
        looked(empty, check_schema)
    empty.migrate()
    assert problems(empty) == []


def test_a_view_on_the_amount_does_not_stop_the_migration(migrated: Installation) -> None:
    before_the_list(migrated)
    migrated.execute("CREATE VIEW revenue AS SELECT sum(amount) FROM purchases")
    migrated.migrate()
    assert types_of_purchases(migrated)["amount"] == "numeric(12,2)"
    assert migrated.revisions() >= {"core_0007"}


def test_the_migration_waits_for_a_transaction_only_in_short_turns(migrated: Installation) -> None:
    """Other transactions get to the table between two turns of the migration."""
    before_the_list(migrated)
    migrated.connection.execute("BEGIN")
    migrated.connection.execute("LOCK TABLE purchases IN ROW EXCLUSIVE MODE")
    thread = threading.Thread(target=migrated.migrate)
    thread.start()
    time.sleep(1.5)
    migrated.connection.execute("COMMIT")
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert types_of_purchases(migrated)["amount"] == "numeric"


NARROWER = {
    ("numeric(20,8)", "text"): (("numeric(20,2)", "text"), "rounds", "ALTER COLUMN amount TYPE numeric;"),
    ("numeric", "text"): (("numeric(12,4)", "text"), "rounds", "ALTER COLUMN amount TYPE numeric;"),
    ("numeric(9,3)", "text"): (("numeric(9,-1)", "text"), "rounds", "ALTER COLUMN amount TYPE numeric;"),
    ("numeric(20,2)", "char(3)"): (("numeric(10,2)", "char(3)"), "refuses", "ALTER COLUMN amount TYPE numeric;"),
    ("numeric(9,2)", "text"): (("numeric(9,2)", "varchar(3)"), "refuses", "ALTER COLUMN currency TYPE text;"),
    ("numeric(8,2)", "varchar(10)"): (
        *(("numeric", "char(3)"), "refuses", "ALTER COLUMN currency TYPE character varying(10);"),
    ),
}
WIDE_ENOUGH = (
    (("numeric(12,2)", "char(3)"), ("numeric(12,2)", "char(3)")),
    (("numeric(10,2)", "varchar(3)"), ("numeric(12,4)", "text")),
    (("numeric", "text"), ("numeric", "text")),
    (("numeric(10,2)", "int"), ("numeric", "char(3)")),
)


def set_types(site: Installation, table: str, types: tuple[str, str]) -> None:
    for column, wanted in zip(("amount", "currency"), types, strict=True):
        site.execute(f"ALTER TABLE {table} ALTER {column} TYPE {wanted} USING NULL::text::{wanted}")


def test_an_adopted_column_that_is_narrower_is_told_with_ddl_that_helps(empty: Installation) -> None:
    """All cases share one database. If purchases round an amount, worker and migration stop.

    A value that purchases refuse is only reported.
    """
    empty.execute(SHOPS_PAYMENTS.format(amount="numeric", currency="text"))
    empty.execute(SHOPS_PURCHASES.format(amount="numeric", currency="text"))
    empty.migrate()
    for paid, (bought, what, ddl) in NARROWER.items():
        set_types(empty, "payments", paid)
        set_types(empty, "purchases", bought)
        stopping, told = problems(empty), concerns(empty)
        (found,) = stopping + told
        assert bool(stopping) is (what == "rounds"), bought
        assert found.remedy.startswith(f"as the table's owner: ALTER TABLE public.purchases {ddl}")
        if stopping:
            with pytest.raises(SchemaError, match=r"Nothing was changed"):
                empty.migrate()
        empty.execute(found.remedy.removeprefix("as the table's owner: ").partition(";")[0])
        assert (problems(empty), concerns(empty)) == ([], []), bought
    for paid, bought in WIDE_ENOUGH:
        set_types(empty, "payments", paid)
        set_types(empty, "purchases", bought)
        assert (problems(empty), concerns(empty)) == ([], []), (paid, bought)


def test_a_longer_currency_beside_rows_of_ours_is_told_and_not_run(empty: Installation) -> None:
    empty.execute(SHOPS_PAYMENTS.format(amount="numeric(12,2)", currency="char(3)"))
    empty.migrate()
    empty.execute(
        "INSERT INTO purchases (student_id, course_id, amount, currency)"
        " VALUES (gen_random_uuid(), gen_random_uuid(), 9.90, 'EUR')"
    )
    empty.execute("ALTER TABLE payments ALTER currency TYPE text")
    empty.migrate()
    assert types_of_purchases(empty)["currency"] == "character(3)"
    (told,) = concerns(empty)
    assert "ALTER TABLE public.purchases ALTER COLUMN currency TYPE text; (it rewrites the table" in told.remedy
