"""Refunds: their outcomes, which payment gets the pair, what is refused, what it costs."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.database.planner import FREE_PLANS, INDEX_PLANS, planned
from outbox_worker.model import PURCHASE_REFUNDED, Guard, Outcome, Reason
from tests.support.factories import Payment, ProbedProcessor, Shop, drain_all
from tests.support.makers import MakeProcessor
from tests.support.settling import LAST, STRANGER, bought, metric, settle
from tests.support.watching import on_statement

pytestmark = pytest.mark.usefixtures("both_guards")


# --- the rules


def test_the_purchase_of_a_refunded_payment_is_taken_back(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = bought(shop)
    before = shop.purchases(payment)[0]
    event = shop.refund(payment)
    assert settle(processor) == {event: Outcome.REVOKED}
    (after,) = shop.purchases(payment)
    assert after == before._replace(is_active=False, deactivated_at=after.deactivated_at)
    assert after.deactivated_at > before.created_at
    assert_marked_revoked(shop, event, payment)
    assert metric(processor, "outbox_events_total", event_type=PURCHASE_REFUNDED, outcome="revoked") == 1


def test_a_refund_before_its_confirmation_leaves_an_inactive_purchase(shop: Shop, processor: ProbedProcessor) -> None:
    """The confirmation then makes no purchase, even if the payment says that it succeeded."""
    payment = shop.payment()
    event = shop.refund(payment)
    assert settle(processor) == {event: Outcome.REVOKED}
    (left,) = shop.purchases(payment)
    assert (left.student_id, left.course_id) == payment.pair
    assert (str(left.amount), left.currency, left.is_active) == ("49.90", "EUR", False)
    assert left.created_at == left.deactivated_at is not None or left.created_at <= left.deactivated_at
    shop.set_status(payment, "succeeded")
    confirmed = shop.confirm(payment)
    assert settle(processor) == {confirmed: Outcome.SUPPRESSED}
    assert shop.purchases(payment) == [left]


def test_a_refund_of_a_duplicate_leaves_the_pair_as_it_is(shop: Shop, processor: ProbedProcessor) -> None:
    first, _ = bought(shop)
    second, duplicate = shop.paid(student=first.student_id, course=first.course_id)
    assert settle(processor) == {duplicate: Outcome.DUPLICATE_PAYMENT}
    event = shop.refund(second)
    assert settle(processor) == {event: Outcome.REVOKED}
    assert {row.payment_id: row.is_active for row in shop.purchases(first.pair)} == {first.id: True, second.id: False}
    later = shop.confirm(second)
    assert settle(processor) == {later: Outcome.SUPPRESSED}


def test_a_gift_keeps_the_pair(shop: Shop, processor: ProbedProcessor) -> None:
    payment, other = shop.payment(), shop.payment()
    shop.purchase(None, *payment.pair)
    shop.rows("UPDATE payments SET student_id = %s, course_id = %s WHERE id = %s", *payment.pair, other.id)
    event = shop.refund(payment)
    assert settle(processor) == {event: Outcome.REVOKED}
    assert [(row.payment_id, row.is_active) for row in shop.purchases(payment.pair)] == [
        (None, True),
        (payment.id, False),
    ]


NOT_YET = [
    (None, Reason.PAYMENT_NOT_FOUND),
    *((status, Reason.PAYMENT_NOT_REFUNDED) for status in ("succeeded", "pending", "failed")),
]


@pytest.mark.parametrize("has_purchase", [False, True])
@pytest.mark.parametrize(("status", "reason"), NOT_YET)
def test_a_payment_that_is_not_refunded_yet(
    shop: Shop, processor: ProbedProcessor, status: str | None, reason: Reason, has_purchase: bool
) -> None:
    """The payment is not visible, is archived, or has another status than "refunded".

    The worker retries the event and buries it at the end. The purchase stays active.
    """
    payments = [shop.payment(status or "succeeded") for _ in range(2)]
    for payment in payments if has_purchase else ():
        shop.purchase(payment)
    if status is None:
        shop.rows("DELETE FROM payments")
    waits = shop.confirm(payments[0], event_type=PURCHASE_REFUNDED)
    dies = shop.confirm(payments[1], event_type=PURCHASE_REFUNDED, attempts=LAST)
    before = shop.purchases()
    assert settle(processor) == {waits: Outcome.RETRIED, dies: Outcome.DEAD}
    assert shop.event(waits).last_error.startswith(f"{reason}: ")
    assert (shop.event(waits).attempts, shop.letter_of(dies).reason) == (1, reason)
    assert shop.purchases() == before
    if status is not None:
        shop.set_status(payments[0], "refunded")
        shop.make_due()
        assert settle(processor) == {waits: Outcome.REVOKED}
        assert [row.is_active for row in shop.purchases(payments[0])] == [False]


def test_a_refund_that_contradicts_its_payment_is_buried(shop: Shop, processor: ProbedProcessor) -> None:
    payment, _ = bought(shop)
    event = shop.refund(payment, payload={"amount": "1.00", "student_id": STRANGER})
    assert settle(processor) == {event: Outcome.DEAD}
    letter = shop.letter_of(event)
    assert (letter.reason, letter.attempts, letter.event_type) == ("payment_mismatch", 1, PURCHASE_REFUNDED)
    assert letter.detail == "differs from the payment row: student_id, amount"
    assert [row.is_active for row in shop.purchases(payment)] == [True]


def test_an_event_id_of_another_payment_takes_nothing_back(shop: Shop, processor: ProbedProcessor) -> None:
    payment, _ = bought(shop)
    event = shop.refund(payment, shop.mark(uuid4(), "created", STRANGER))
    assert settle(processor) == {event: Outcome.DEAD}
    assert shop.letter_of(event).reason == "event_id_reused"
    assert [row.is_active for row in shop.purchases(payment)] == [True]


def test_a_refund_under_the_event_id_of_its_own_confirmation_is_one(shop: Shop, processor: ProbedProcessor) -> None:
    """The mark is only evidence.

    The purchase exists, and the payment is refunded. The mark does not change.
    """
    payment, event = shop.paid()
    settle(processor)
    mark = shop.mark_of(event)
    shop.refund(payment, event)
    assert settle(processor) == {event: Outcome.REVOKED}
    assert [row.is_active for row in shop.purchases(payment)] == [False]
    assert shop.mark_of(event) == mark


def test_an_unusable_payload_is_buried(shop: Shop, processor: ProbedProcessor) -> None:
    event = shop.confirm(None, event_type=PURCHASE_REFUNDED, payload="[]")
    assert settle(processor) == {event: Outcome.DEAD}
    assert shop.letter_of(event).reason == "invalid_payload"


def test_what_is_taken_back_already_stays_as_it_is(shop: Shop, processor: ProbedProcessor) -> None:
    """The purchase stays inactive whatever the payment says now.

    The payment's row can be archived.
    """
    payments = {status: shop.payment(status) for status in ("refunded", "succeeded", "pending")}
    payments |= {"archived": shop.payment(), "mismatched": shop.payment()}
    events = []
    for payment in payments.values():
        shop.purchase(payment, active=False)
        events.append(shop.confirm(payment, event_type=PURCHASE_REFUNDED))
    shop.rows("DELETE FROM payments WHERE id = %s", payments["archived"].id)
    shop.rows("UPDATE payments SET amount = 1 WHERE id = %s", payments["mismatched"].id)
    before = shop.purchases()
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)
    assert shop.purchases() == before


def test_a_refund_delivered_again_changes_nothing(shop: Shop, processor: ProbedProcessor) -> None:
    payment, _ = bought(shop)
    event = shop.refund(payment)
    settle(processor)
    was = shop.purchases(), shop.mark_of(event)
    for again in (event, event, None):
        delivered = shop.confirm(payment, again, PURCHASE_REFUNDED)
        assert settle(processor) == {delivered: Outcome.REVOKED}
        assert (shop.purchases(), shop.mark_of(event)) == was


def test_two_refunds_of_one_payment_in_one_batch(shop: Shop, processor: ProbedProcessor) -> None:
    """One statement cannot write a row twice.

    Still, both refunds go together, and no savepoint is rolled back.
    """
    payment, _ = bought(shop)
    events = [shop.refund(payment) for _ in range(3)]
    sent: list[str] = []
    on_statement(processor.database, sent.append)
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)
    assert [statement for statement in sent if statement.startswith("ROLLBACK")] == []
    assert [row.is_active for row in shop.purchases(payment)] == [False]
    for event in events:
        assert_marked_revoked(shop, event, payment)


@pytest.mark.parametrize("first", ["confirmation", "refund"])
def test_confirmation_and_refund_of_one_payment_in_one_claim(
    shop: Shop, processor: ProbedProcessor, first: str
) -> None:
    payment = shop.payment()
    due = {"confirmation": "-1 minute", "refund": "-1 minute"} | {first: "-2 minutes"}
    confirmed = shop.confirm(payment, due_in=due["confirmation"])
    refunded = shop.refund(payment, due_in=due["refund"])
    assert drain_all(processor) == {Outcome.SUPPRESSED: 1, Outcome.REVOKED: 1}
    assert (shop.outcome_of(confirmed), shop.outcome_of(refunded)) == ("suppressed", "revoked")
    assert [row.is_active for row in shop.purchases(payment)] == [False]


def test_a_purchase_that_was_made_active_again_by_hand_tells_when_it_was_taken_back_last(
    shop: Shop, processor: ProbedProcessor
) -> None:
    payment, _ = bought(shop)
    shop.rows("UPDATE purchases SET deactivated_at = now() - interval '1 year'")
    shop.refund(payment)
    settle(processor)
    assert shop.scalar("SELECT now() - deactivated_at < interval '1 minute' FROM purchases")


def test_a_settled_refund_closes_its_dead_letter(shop: Shop, processor: ProbedProcessor) -> None:
    payment, _ = bought(shop)
    event = shop.dead_letter(payment, reason="payment_not_refunded", event_type=PURCHASE_REFUNDED)
    shop.refund(payment, event)
    assert settle(processor) == {event: Outcome.REVOKED}
    assert shop.letter_of(event).state == "settled"


# --- what it costs


def refunds(shop: Shop, count: int, next_payments: int) -> None:
    """Write refunds of active purchases, due now.

    ``next_payments`` of their pairs have another successful payment.
    """
    shop.pay_many(count)
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT student_id, course_id, id, amount, currency FROM payments"
    )
    shop.rows("UPDATE payments SET status = 'refunded'")
    shop.rows("UPDATE outbox SET event_type = %s", PURCHASE_REFUNDED)
    shop.rows(
        "INSERT INTO payments (student_id, course_id, amount, currency, status)"
        " SELECT student_id, course_id, 1, 'EUR', 'succeeded' FROM payments LIMIT %s",
        next_payments,
    )


@pytest.mark.parametrize("next_payments", [0, 100])
@pytest.mark.parametrize("size", [1, 10, 500])
def test_a_batch_of_refunds_takes_the_same_statements_however_large(
    size: int, next_payments: int, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    refunds(shop, size, min(next_payments, size))
    processor = make_processor()
    sent: list[str] = []
    on_statement(database, sent.append)
    assert processor.process_batch().outcomes() == {Outcome.REVOKED: size}
    # limits, fast (under the guard ``lock``: one statement more); limits, claim, lock, savepoint,
    # look, deactivate, deferred constraints twice; and if another payment gets the pair: grant,
    # traces
    locks = processor.watch.state.guard is Guard.LOCK
    assert len(sent) == (18 if next_payments else 16) + locks, sent
    assert len(shop.rows("SELECT id FROM purchases WHERE is_active")) == min(next_payments, size)


def test_a_thousand_refunds(shop: Shop, processor: ProbedProcessor) -> None:
    refunds(shop, 1000, 50)
    assert drain_all(processor) == {Outcome.REVOKED: 1000}
    assert (shop.count("outbox"), shop.owed(), shop.doubled()) == (0, 0, 0)
    assert processor.watch.state.lock_capacity < 1000, "it takes two claims: one transaction locks no more pairs"


def test_the_switches_of_the_planner_are_put_back(database: Database) -> None:
    switches = [*FREE_PLANS, "jit"]
    read = "SELECT " + ", ".join(f"current_setting('{name}')" for name in switches)
    for plans in (INDEX_PLANS, {}):
        with database.transaction(**plans) as session:
            connection = session.connection()
            before = connection.exec_driver_sql(read).one()
            with planned(session, **FREE_PLANS):
                inside = connection.exec_driver_sql(read).one()
            assert connection.exec_driver_sql(read).one() == before
        assert [*inside][: len(FREE_PLANS)] == [*FREE_PLANS.values()]
        assert (before == inside) is False


# --- helpers


def assert_marked_revoked(shop: Shop, event: UUID, payment: Payment) -> None:
    mark = shop.mark_of(event)
    assert (mark.event_type, mark.outcome, mark.payment_id) == (PURCHASE_REFUNDED, "revoked", payment.id)
    assert (shop.event(event), shop.letter_of(event)) == (None, None)
