"""Values at other places of the payload are read by paths, from jsonb, json and text alike."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.errors import SettingError
from outbox_worker.model import Outcome, Reason
from outbox_worker.reconcile.audit import Audit
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings, load_settings
from tests.support.factories import Payment, ProbedProcessor, Shop, drain_all
from tests.support.makers import MakeProcessor

PATHS = {"payment_id": "$.data.paymentId", "amount": '$.data."amount paid"', "currency": "$.cur-rency"}


@pytest.fixture
def settings(database_url: str) -> Settings:
    return load_settings(database_url=database_url, outbox={"payload": PATHS})


@pytest.fixture(params=["jsonb", "json", "text"])
def tables(request: pytest.FixtureRequest, settings: Settings, shop: Shop, database: Database) -> Tables:
    shop.rows(f"ALTER TABLE outbox ALTER payload TYPE {request.param} USING CAST(payload AS {request.param})")
    with database.transaction() as session:
        return check_schema(session, build_tables(settings))


@pytest.fixture(params=["fast", "careful"])
def processor(request: pytest.FixtureRequest, make_processor: MakeProcessor) -> ProbedProcessor:
    made = make_processor()
    made.is_careful = request.param == "careful"
    return made


def tell(shop: Shop, payment: Payment, tables: Tables, **data: Any) -> Any:
    """Write an event whose payload has the payment's values at the paths.

    ``data`` replaces some values.
    """
    inner = {"paymentId": str(payment.id), "amount paid": payment.amount} | data
    event = next(shop.event_ids)
    shop.rows(
        "INSERT INTO outbox (event_id, event_type, payload) VALUES"
        f" (%s, 'PURCHASE_CONFIRMED', CAST(%s AS {tables.outbox.c.payload.type.compile()}))",
        *(event, json.dumps({"data": inner, "cur-rency": payment.currency, "payment_id": "not this one"})),
    )
    return event


@pytest.mark.usefixtures("both_guards")
def test_values_are_read_where_the_paths_lead(shop: Shop, tables: Tables, processor: ProbedProcessor) -> None:
    paid, other = shop.payment(), shop.payment()
    tell(shop, paid, tables)
    differing = tell(shop, other, tables, **{"amount paid": "50.00"})
    nowhere = tell(shop, other, tables, paymentId={"id": str(other.id)})
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DEAD: 2}
    assert shop.letter_of(differing).reason == Reason.PAYMENT_MISMATCH
    assert "amount" in shop.letter_of(differing).detail
    assert shop.letter_of(nowhere).reason == Reason.INVALID_PAYLOAD
    assert [row.payment_id for row in shop.purchases()] == [paid.id]


def test_the_audit_finds_what_is_in_flight(shop: Shop, tables: Tables, database: Database) -> None:
    flying, owed = shop.payment(ago="1 hour"), shop.payment(ago="1 hour")
    tell(shop, flying, tables)
    report = Audit.start(database, tables).run()
    assert [each.payment_id for each in report.unexplained] == [owed.id]
    assert report.counts["in_flight"] == 1  # type: ignore[index]


@pytest.mark.parametrize("path", ["data.id", "$", "$.", "$..id", "$.a[0]", "$.a b", '$."a', ""])
def test_what_is_no_path_is_refused(path: str, database_url: str) -> None:
    with pytest.raises(SettingError, match="is not a path"):
        load_settings(database_url=database_url, outbox={"payload": {"payment_id": path}})


def test_a_field_that_the_worker_does_not_read(database_url: str) -> None:
    with pytest.raises(SettingError, match="outbox in"):
        load_settings(database_url=database_url, outbox={"payload": {"paymentId": "$.id"}})
