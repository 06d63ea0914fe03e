"""Integer or text ids of payments and events are settled, judged, found and repaired like UUIDs."""

from __future__ import annotations

import json
from collections import Counter
from datetime import timedelta

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.decision import RetryPolicy
from outbox_worker.diagnose.explanation import PaymentStory, explain
from outbox_worker.keys import Key, KeyKind
from outbox_worker.model import Outcome, Reason
from outbox_worker.reconcile.audit import Audit
from outbox_worker.reconcile.backfill import Backfill, Request
from outbox_worker.schema.requirements import check_schema, find_problems
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings
from outbox_worker.store.purchases import backfill_event_id
from tests.support.factories import Payment, ProbedProcessor, Shop, drain_all
from tests.support.key_kinds import PECULIAR, KeyTypes, every_key_type, retype_keys
from tests.support.makers import MakeProcessor

pytestmark = every_key_type
both_guards = pytest.mark.usefixtures("both_guards")
MANY = len(PECULIAR) + 3


@pytest.fixture(autouse=True)
def retyped(key_types: KeyTypes, shop: Shop) -> None:
    retype_keys(shop, key_types)


@pytest.fixture
def tables(key_types: KeyTypes, database: Database, retyped: None) -> Tables:  # noqa: ARG001 - an order
    """Return the tables as the worker finds them."""
    with database.transaction() as session:
        found = check_schema(session, build_tables(Settings()))
    assert (found.payment_key, found.event_key) == (key_types.payment_key, key_types.event_key)
    return found


@pytest.fixture(params=["fast", "careful"])
def processor(request: pytest.FixtureRequest, make_processor: MakeProcessor) -> ProbedProcessor:
    made = make_processor(policy=None)
    made.is_careful = request.param == "careful"
    return made


def many(shop: Shop) -> list[tuple[Payment, object]]:
    return [shop.paid() for _ in range(MANY)]


def outcomes(shop: Shop, of: list[tuple[Payment, object]]) -> list[tuple[str, str]]:
    """Return the outcome and the payment of each event's mark, as text."""
    marks = (shop.mark_of(event) for _, event in of)  # type: ignore[arg-type]
    return [(mark.outcome, str(mark.payment_id)) for mark in marks]


@both_guards
def test_each_payment_gets_its_purchase(shop: Shop, processor: ProbedProcessor) -> None:
    paid = many(shop)
    assert drain_all(processor) == {Outcome.CREATED: MANY}
    assert outcomes(shop, paid) == [("created", str(payment.id)) for payment, _ in paid]
    assert [str(made.payment_id) for payment, _ in paid for made in shop.purchases(payment)] == [
        str(payment.id) for payment, _ in paid
    ]


@both_guards
def test_what_is_delivered_again_and_what_lost_its_purchase(shop: Shop, processor: ProbedProcessor) -> None:
    paid = many(shop)
    drain_all(processor)
    for payment, event in paid:
        shop.confirm(payment, event)  # type: ignore[arg-type]
    assert drain_all(processor) == {Outcome.ALREADY_EXISTS: MANY}
    shop.rows("DELETE FROM purchases")
    for payment, event in paid:
        shop.confirm(payment, event)  # type: ignore[arg-type]
    assert drain_all(processor) == {Outcome.RECOVERED: MANY}
    assert outcomes(shop, paid) == [("recovered", str(payment.id)) for payment, _ in paid]


@both_guards
def test_refunds_and_second_payments(shop: Shop, processor: ProbedProcessor) -> None:
    paid = many(shop)
    drain_all(processor)
    seconds = [shop.paid(student=payment.student_id, course=payment.course_id) for payment, _ in paid]
    assert drain_all(processor) == {Outcome.DUPLICATE_PAYMENT: MANY}
    for payment, _ in paid:
        shop.refund(payment)
    assert drain_all(processor) == {Outcome.REVOKED: MANY}
    holders = [str(row.payment_id) for row in shop.purchases() if row.is_active]
    assert Counter(holders) == Counter(str(payment.id) for payment, _ in seconds)


def test_what_cannot_be_an_id_is_invalid(key_types: KeyTypes, shop: Shop, make_processor: MakeProcessor) -> None:
    unusable: list[object] = [None, True, [], {"a": 1}, "", "x" * 1001]
    unusable += {
        KeyKind.INTEGER: ["1.0", "0x1", "9223372036854775808", "99999999999999999999", "1e3", "²", "1\n", 1.5],
        KeyKind.TEXT: [],
        KeyKind.UUID: [],
    }[key_types.payment_key]
    events = [shop.confirm(None, payload=json.dumps({"payment_id": each})) for each in unusable]
    assert drain_all(make_processor()) == {Outcome.DEAD: len(unusable)}
    assert [shop.letter_of(event).reason for event in events] == [Reason.INVALID_PAYLOAD] * len(unusable)


def test_an_integer_may_be_written_in_several_ways(key_types: KeyTypes, shop: Shop, processor: ProbedProcessor) -> None:
    if key_types.payment_key is not KeyKind.INTEGER:
        return
    payments = [shop.payment() for _ in range(3)]
    for payment, written in zip(payments, (payments[0].id, f"{payments[1].id}", f"00{payments[2].id}"), strict=True):
        shop.confirm(payment, payload={"payment_id": written})
    assert drain_all(processor) == {Outcome.CREATED: 3}


def test_an_event_id_of_another_payment(shop: Shop, processor: ProbedProcessor) -> None:
    one, two = shop.payment(), shop.payment()
    event = shop.mark(shop.confirm(two), "created", one.id)
    assert drain_all(processor) == {Outcome.DEAD: 1}
    assert (shop.letter_of(event).reason, str(one.id) in shop.letter_of(event).detail) == (Reason.EVENT_ID_REUSED, True)


@pytest.mark.parametrize("kind", ["json", "text"])
def test_documents(kind: str, shop: Shop, make_processor: MakeProcessor) -> None:
    shop.rows(f"ALTER TABLE outbox ALTER payload TYPE {kind} USING CAST(payload AS {kind})")
    paid = [shop.payment() for _ in range(MANY)]
    for payment in paid:
        shop.rows(
            f"INSERT INTO outbox (event_id, event_type, payload) VALUES (%s, 'PURCHASE_CONFIRMED', CAST(%s AS {kind}))",
            *(next(shop.event_ids), json.dumps({"payment_id": str(payment.id), "amount": "49.90"})),
        )
    assert drain_all(make_processor()) == {Outcome.CREATED: MANY}
    assert sorted(str(row.payment_id) for row in shop.purchases()) == sorted(str(payment.id) for payment in paid)


def test_audit_backfill_and_why(
    key_types: KeyTypes, shop: Shop, database: Database, tables: Tables, settings: Settings
) -> None:
    owed = [shop.payment(ago="1 hour") for _ in range(MANY)]
    flying = [shop.payment(ago="1 hour") for _ in range(MANY)]
    for payment in flying:
        shop.confirm(payment)
    report = Audit.start(database, tables).run()
    assert {each.payment_id for each in report.unexplained} == {_key(key_types, each) for each in owed}
    assert report.counts["in_flight"] == MANY  # type: ignore[index]
    backfill = Backfill.start(database, tables, settings.retry_policy, Request(actor="test"))
    assert backfill.look(lambda *_: True) == MANY
    assert backfill.make(lambda *_: True).ok
    assert sorted(str(row.payment_id) for row in shop.purchases()) == sorted(str(payment.id) for payment in owed)
    for payment in owed:
        mark = shop.mark_of(backfill_event_id(_key(key_types, payment), key_types.event_key))
        assert (mark.event_type, str(mark.payment_id)) == ("PURCHASE_BACKFILLED", str(payment.id))
    with database.snapshot() as session:

        def story_of(payment: Payment) -> PaymentStory:
            told = explain(session, tables, settings.retry_policy, None, str(payment.id)).stories
            return next(each for each in told if each.payment_id == _key(key_types, payment))

        for payment in owed:
            assert story_of(payment).kind == "active"
        for payment in flying:
            assert story_of(payment).kind == "in_flight"
            assert [each.verdict.outcome for each in story_of(payment).predictions] == [Outcome.CREATED]


def test_a_lost_purchase_of_a_backfill_is_recovered(
    key_types: KeyTypes, shop: Shop, database: Database, tables: Tables, settings: Settings
) -> None:
    payment = shop.payment(ago="1 hour")
    for outcome in ("created", "recovered"):
        backfill = Backfill.start(database, tables, settings.retry_policy, Request(actor="test"))
        backfill.look(lambda *_: True)
        backfill.make(lambda *_: True)
        mark = shop.mark_of(backfill_event_id(_key(key_types, payment), key_types.event_key))
        assert mark.outcome == outcome
        shop.rows("DELETE FROM purchases")


def test_a_letter_is_closed_when_its_event_is_settled(shop: Shop, make_processor: MakeProcessor) -> None:
    paid = [(shop.payment(status="pending"), next(shop.event_ids)) for _ in range(MANY)]
    processor = make_processor(policy=RetryPolicy(1, timedelta(seconds=30), timedelta(hours=1)))
    for payment, event in paid:
        shop.confirm(payment, event)
    assert drain_all(processor) == {Outcome.DEAD: MANY}
    assert [str(shop.letter_of(event).payment_id) for _, event in paid] == [str(payment.id) for payment, _ in paid]
    for payment, event in paid:
        shop.set_status(payment, "succeeded")
        shop.confirm(payment, event)
    assert drain_all(processor) == {Outcome.CREATED: MANY}
    assert {shop.letter_of(event).state for _, event in paid} == {"settled"}


def test_two_kinds_in_one_shop_are_refused(key_types: KeyTypes, shop: Shop, database: Database, tables: Tables) -> None:
    other = "text" if key_types.payment_key is KeyKind.INTEGER else "bigint"
    shop.rows(f"ALTER TABLE purchases ALTER payment_id TYPE {other} USING CAST(NULL AS {other})")
    with database.transaction() as session:
        (problem,) = find_problems(session, tables)
    assert "purchases.payment_id" in problem.finding
    assert "both contain the ids of payments" in problem.remedy


def _key(key_types: KeyTypes, payment: Payment) -> Key:
    return key_types.payment_key.key(str(payment.id))
