"""A refund is valid even if the purchase for the next payment of its pair is refused."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event as listener

from outbox_worker.database.engine import Database
from outbox_worker.model import Outcome
from outbox_worker.settle.savepoints import MAX_SAVEPOINTS
from tests.support.factories import Payment, ProbedProcessor, Shop
from tests.support.settling import bought, holder, settle
from tests.support.trips import RoundTrips

pytestmark = pytest.mark.usefixtures("both_guards")


def heir_of(shop: Shop, payment: Payment, amount: str = "100.00") -> Payment:
    return shop.payment("succeeded", *payment.pair, amount=amount)


def trigger(body: str, kind: str = "TRIGGER refuse BEFORE") -> str:
    timing = "DEFERRABLE INITIALLY DEFERRED" if "CONSTRAINT" in kind else ""
    return (
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$;"
        f"CREATE {kind} INSERT ON purchases {timing} FOR EACH ROW EXECUTE FUNCTION refuse()"
    )


RAISES = "IF NEW.is_active AND NEW.amount = 100 THEN RAISE EXCEPTION 'no' USING ERRCODE = '{}'; END IF;"
REFUSALS = {
    "check": ("ALTER TABLE purchases ADD CHECK (amount < 100)", "SQLSTATE 23514"),
    "trigger": (trigger(RAISES.format("P0001")), "SQLSTATE P0001"),
    "trigger at COMMIT": (trigger(RAISES.format("P0001"), "CONSTRAINT TRIGGER refuse AFTER"), "SQLSTATE P0001"),
    "unclear class": (trigger(RAISES.format("42501")), "SQLSTATE 42501"),
    "silence": (trigger("IF NEW.is_active AND NEW.amount = 100 THEN RETURN NULL; END IF;"), "raised no error"),
    "another key": (
        "ALTER TABLE purchases ADD UNIQUE (amount); INSERT INTO purchases (student_id, course_id, amount, currency)"
        " VALUES (gen_random_uuid(), gen_random_uuid(), 100, 'EUR')",
        "SQLSTATE 23505",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refund_stands_though_its_heir_is_refused(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]], name: str
) -> None:
    schema, told = REFUSALS[name]
    first, other, third = (bought(shop, amount=f"{10 + at}.00")[0] for at in range(3))
    refused, granted = heir_of(shop, first), heir_of(shop, other, "50.00")
    events = [shop.refund(payment) for payment in (first, other, third)]
    shop.connection.execute(schema, prepare=False)
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)
    assert (holder(shop, first), holder(shop, other)) == (None, granted.id)
    assert not any(row.is_active for row in shop.purchases(first))
    assert (shop.count("outbox"), shop.count("dead_letters")) == (0, 0)
    (record,) = [record for record in records if record.get("event") == "next_payment_refused"]
    assert (record["payment_id"], record["next_payment_id"]) == (str(first.id), str(refused.id))
    assert told in record["refusal"]
    assert shop.owed() == 1


def test_many_refused_heirs_keep_within_the_savepoints(
    shop: Shop, database: Database, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    payments = [bought(shop, amount=f"{at}.00")[0] for at in range(1, 21)]
    heirs = [heir_of(shop, payment) for payment in payments[::2]]
    for payment in payments:
        shop.refund(payment)
    shop.rows("ALTER TABLE purchases ADD CHECK (amount < 100)")
    trips = RoundTrips(database)
    while processor.process_batch().batch:
        pass
    assert max(trips.savepoints()) <= MAX_SAVEPOINTS
    assert not any(shop.active_pairs().values())
    assert shop.count("outbox") == 0
    told = {record["next_payment_id"] for record in records if record.get("event") == "next_payment_refused"}
    assert told == {str(heir.id) for heir in heirs}


def test_a_conflict_with_an_heir_still_undoes_its_refund(
    shop: Shop, database: Database, processor: ProbedProcessor
) -> None:
    first, _ = bought(shop)
    heir = heir_of(shop, first)
    event = shop.refund(first)
    shop.rows(trigger(RAISES.format("40001")))
    commits: list[Any] = []
    listener.listen(database.engine, "commit", lambda _: commits.append(shop.mark_of(event)))
    assert settle(processor) == {}
    assert (holder(shop, first), shop.event(event).attempts) == (first.id, 0)
    shop.rows("DROP TRIGGER refuse ON purchases")
    shop.make_due()
    assert settle(processor) == {event: Outcome.REVOKED}
    assert holder(shop, first) == heir.id
