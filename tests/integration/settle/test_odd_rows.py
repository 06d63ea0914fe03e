"""The trigger of one row raises an error that only a server in trouble raises.

Other events are settled.
"""

from __future__ import annotations

import psycopg
import pytest

from outbox_worker.errors import OutboxWorkerError
from tests.support.factories import ProbedProcessor, Shop

STATES = ["XX000", "53100", "57P01", "57P03", "25006", "28000", "08006", "3D000", "26000", "58030"]


def raise_for(shop: Shop, body: str, timing: str = "TRIGGER odd BEFORE INSERT") -> None:
    """Let a trigger run this code for the purchase of 66.60."""
    shop.rows(
        "CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN IF NEW.amount = 66.60 THEN {body} END IF; RETURN NEW; END $$"
    )
    shop.rows(f"CREATE {timing} ON purchases FOR EACH ROW EXECUTE FUNCTION odd()".replace("INSERT ON", "INSERT ON"))


def settle_for(processor: ProbedProcessor, batches: int) -> None:
    """Process batches like the claim loop: an error of the database ends only the batch."""
    for _ in range(batches):
        try:
            processor.process_batch()
        except (psycopg.Error, OutboxWorkerError, Exception) as error:  # noqa: BLE001 - as the loop meets it
            processor.telemetry.trouble(error, 0.0)


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("state", STATES)
def test_what_a_trigger_raises_for_one_row_stops_no_other(state: str, shop: Shop, processor: ProbedProcessor) -> None:
    raise_for(shop, f"RAISE EXCEPTION 'odd' USING ERRCODE = '{state}';")
    shop.pay_many(3)
    _, odd = shop.paid(amount="66.60")
    shop.pay_many(3)
    settle_for(processor, 4)
    assert shop.count("purchases") == 6
    assert shop.rows("SELECT attempts FROM outbox WHERE event_id = %s", odd) == [(0,)]


def test_what_it_raises_for_every_row_charges_nobody(shop: Shop, processor: ProbedProcessor) -> None:
    shop.rows(
        "CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '53100'; END $$"
    )
    shop.rows("CREATE TRIGGER odd BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION odd()")
    shop.pay_many(5)
    settle_for(processor, 6)
    assert shop.rows("SELECT DISTINCT attempts FROM outbox") == [(0,)]
    shop.rows("DROP TRIGGER odd ON purchases")
    settle_for(processor, 2)
    assert shop.count("purchases") == 5


def test_an_event_that_ends_its_connection_makes_way(shop: Shop, processor: ProbedProcessor) -> None:
    raise_for(shop, "PERFORM pg_terminate_backend(pg_backend_pid());")
    shop.pay_many(3)
    shop.paid(amount="66.60")
    shop.pay_many(3)
    settle_for(processor, 15)
    assert shop.count("purchases") == 6
    assert shop.rows("SELECT attempts, crashes FROM outbox") == [(0, 0)]


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("change", ["is_active = false", "student_id = gen_random_uuid()"])
def test_what_a_deferred_trigger_changes_is_not_told_as_created(
    change: str, shop: Shop, processor: ProbedProcessor
) -> None:
    raise_for(
        shop,
        f"UPDATE purchases SET {change} WHERE id = NEW.id;",
        "CONSTRAINT TRIGGER odd AFTER INSERT",
    )
    shop.rows("DROP TRIGGER odd ON purchases")
    shop.rows(
        "CREATE CONSTRAINT TRIGGER odd AFTER INSERT ON purchases DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION odd()"
    )
    shop.pay_many(2)
    _, event = shop.paid(amount="66.60")
    with processor.database.transaction() as session:
        processor.watch.probe(session)
    settle_for(processor, 3)
    assert shop.count("purchases") == 2
    assert shop.rows("SELECT attempts FROM outbox WHERE event_id = %s", event) == [(1,)]
