"""A refusal that meets every purchase alike is the database's: no event is charged, and the cause is named."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.failures import Failure, classify
from outbox_worker.errors import DefaultTaken, NothingRecorded
from outbox_worker.model import Guard, Outcome
from tests.support.factories import ProbedProcessor, Shop
from tests.support.settling import bought, settle

SERIAL = (
    "CREATE SEQUENCE purchase_ids; ALTER TABLE purchases ALTER id DROP DEFAULT,"
    " ALTER id TYPE bigint USING 1, ALTER id SET DEFAULT nextval('purchase_ids');"
    "INSERT INTO purchases (id, student_id, course_id, amount, currency)"
    " SELECT n, gen_random_uuid(), gen_random_uuid(), 1, 'EUR' FROM generate_series(1, 300) AS n"
)


def assert_uncharged(shop: Shop, events: int) -> None:
    assert shop.rows("SELECT attempts, last_error, count(*) FROM outbox GROUP BY 1, 2") == [(0, None, events)]


def test_a_sequence_that_is_behind_is_told_with_its_remedy(
    shop: Shop, processor: ProbedProcessor, both_guards: str
) -> None:
    shop.connection.execute(SERIAL, prepare=False)
    shop.pay_many(5)
    with pytest.raises(DefaultTaken) as caught:
        processor.process_batch()
    assert classify(caught.value) is Failure.PAUSE
    assert "constraint purchases_pkey" in str(caught.value)
    assert processor.watch.state.guard == both_guards
    assert_uncharged(shop, 5)
    shop.rows(str(caught.value).partition("so run this: ")[2])
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 5}


def test_another_key_that_refuses_every_purchase_is_the_databases(shop: Shop, processor: ProbedProcessor) -> None:
    shop.rows("CREATE UNIQUE INDEX odd ON purchases ((true))")
    bought(shop)
    shop.pay_many(5)
    with pytest.raises(NothingRecorded, match="constraint odd"):
        processor.process_batch()
    assert_uncharged(shop, 5)


def test_another_key_that_refuses_one_purchase_is_that_events(shop: Shop, processor: ProbedProcessor) -> None:
    shop.rows("CREATE UNIQUE INDEX odd ON purchases (amount)")
    bought(shop, amount="7.00")
    _, bad = shop.paid(amount="7.00")
    good = [shop.paid(amount=f"{amount}.00")[1] for amount in (8, 9)]
    assert settle(processor) == dict.fromkeys(good, Outcome.CREATED) | {bad: Outcome.RETRIED}
    assert "constraint odd" in shop.event(bad).last_error


@pytest.mark.parametrize("table", ["outbox", "purchases"])
def test_a_published_table_without_replica_identity_loses_no_guard(
    shop: Shop, processor: ProbedProcessor, table: str
) -> None:
    shop.rows(f"ALTER TABLE {table} REPLICA IDENTITY NOTHING")
    shop.rows(f"CREATE PUBLICATION p_{shop.scalar('SELECT current_database()')} FOR TABLE {table}")
    shop.refund(bought(shop)[0])
    with pytest.raises(DBAPIError) as caught:
        processor.process_batch()
    assert classify(caught.value) is Failure.PAUSE
    assert processor.watch.state.guard is Guard.INDEX
    assert_uncharged(shop, 1)
    shop.rows(f"ALTER TABLE {table} REPLICA IDENTITY DEFAULT")
    assert processor.process_batch().outcomes() == {Outcome.REVOKED: 1}


def test_a_column_that_became_a_generated_one_is_the_databases(shop: Shop, processor: ProbedProcessor) -> None:
    shop.rows("ALTER TABLE purchases DROP COLUMN currency")
    shop.rows("ALTER TABLE purchases ADD currency text GENERATED ALWAYS AS ('EUR') STORED")
    shop.pay_many(3)
    with pytest.raises(DBAPIError) as caught:
        processor.process_batch()
    assert classify(caught.value) is Failure.PAUSE
    assert_uncharged(shop, 3)


@pytest.mark.parametrize("body", ["INSERT INTO log VALUES (1) ON CONFLICT (n) DO NOTHING", "RAISE SQLSTATE '55000'"])
def test_an_error_inside_somebody_elses_trigger_is_not_the_guards(
    shop: Shop, processor: ProbedProcessor, body: str
) -> None:
    shop.rows("CREATE TABLE log (n int)")
    shop.rows(
        f"CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NEW; END $$;"
        "CREATE TRIGGER odd BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION odd()"
    )
    shop.pay_many(3)
    with pytest.raises(DBAPIError) as caught:
        processor.process_batch()
    assert classify(caught.value) is Failure.UNCLEAR
    assert processor.watch.state.guard is Guard.INDEX
    assert_uncharged(shop, 3)


def test_settings_of_a_role_or_database_that_break_statements_are_overruled(
    shop: Shop, processor: ProbedProcessor
) -> None:
    name = shop.scalar("SELECT current_database()")
    given = ["array_nulls = off", "quote_all_identifiers = on", "statement_timeout = '1ms'", "lock_timeout = '1ms'"]
    given += ["extra_float_digits = -15", "datestyle = 'SQL, DMY'", "intervalstyle = 'sql_standard'"]
    if shop.scalar("SELECT current_setting('server_version_num')::int >= 170000"):
        given.append("transaction_timeout = '500ms'")
    for each in given:
        shop.rows(f"ALTER DATABASE {name} SET {each}")
    processor.database.close()
    with processor.database.engine.connect() as connection:
        assert connection.scalar(text("SHOW statement_timeout")) == "0", "also before a transaction sets its own"
    created, broken = shop.paid()[1], shop.confirm(None, payload="[]")
    with processor.database.transaction() as session:
        processor.watch._versions = None
        assert processor.watch.probe(session).guard is Guard.INDEX
        session.execute(text("SELECT pg_sleep(0.7)"))
        assert abs(session.scalars(text("SELECT date_part('epoch', clock_timestamp())")).one() - time.time()) < 60
    assert settle(processor) == {created: Outcome.CREATED, broken: Outcome.DEAD}
