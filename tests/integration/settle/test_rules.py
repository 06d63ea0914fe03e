"""The nine rules of one event, end to end under both guards.

The tests check mark, purchase, outbox, dead letter and metrics. The numbers are those of
``decide``. In a test named ``…_comes_before_…`` two rules apply, and the first must win.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import uuid4

import pytest
from psycopg.types.string import TextLoader

from outbox_worker.model import PURCHASE_CONFIRMED, Guard, Outcome, Reason
from outbox_worker.settings import Settings
from tests.support.factories import Payment, ProbedProcessor, Shop, payload_text
from tests.support.makers import MakeProcessor
from tests.support.settling import LAST, STRANGER, assert_buried, assert_marked, assert_one_purchase, metric, settle

pytestmark = pytest.mark.usefixtures("both_guards")


"""Every test runs under both guards."""

PAIR_INDEX = "purchases_active_student_course_key"


BREAK_INDEX = {
    "dropped": [f"DROP INDEX {PAIR_INDEX}"],
    "invalid": [f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = to_regclass('{PAIR_INDEX}')"],
    "total": [f"DROP INDEX {PAIR_INDEX}", "CREATE UNIQUE INDEX total ON purchases (student_id, course_id, id)"],
}


# --- the seed's four scenarios


def test_normal(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid(amount="49.90", currency="EUR")
    assert settle(processor) == {event: Outcome.CREATED}
    assert_marked(shop, event, Outcome.CREATED, payment)
    assert_one_purchase(shop, payment)


def test_recovery(shop: Shop, processor: ProbedProcessor) -> None:
    """The event is marked as processed, but its purchase was never written."""
    payment, event = shop.paid()
    shop.mark(event, "created", payment.id)
    assert settle(processor) == {event: Outcome.RECOVERED}
    assert_marked(shop, event, Outcome.RECOVERED, payment)
    assert_one_purchase(shop, payment)


def test_duplicate_event_delivered_twice(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid()
    assert settle(processor) == {event: Outcome.CREATED}
    first = shop.mark_of(event)
    shop.confirm(payment, event)
    assert settle(processor) == {event: Outcome.ALREADY_EXISTS}
    assert shop.event(event) is None
    assert shop.mark_of(event) == first
    assert_one_purchase(shop, payment)


def test_duplicate_events_of_one_payment_in_one_batch(shop: Shop, processor: ProbedProcessor) -> None:
    payment, older = shop.paid()
    newer = shop.confirm(payment)
    assert settle(processor) == {older: Outcome.CREATED, newer: Outcome.ALREADY_EXISTS}
    assert_marked(shop, older, Outcome.CREATED, payment)
    assert_marked(shop, newer, Outcome.ALREADY_EXISTS, payment)
    assert_one_purchase(shop, payment)


def test_duplicate_events_of_one_payment_that_are_both_marked(shop: Shop, processor: ProbedProcessor) -> None:
    """The older event is recovered, whichever was marked first.

    The newer event finds the purchase.
    """
    payment, older = shop.paid()
    newer = shop.confirm(payment)
    for event in (newer, older):
        shop.mark(event, "created", payment.id)
    assert settle(processor) == {older: Outcome.RECOVERED, newer: Outcome.ALREADY_EXISTS}
    assert (shop.outcome_of(older), shop.outcome_of(newer)) == ("recovered", "created")
    assert_one_purchase(shop, payment)


def test_duplicate_events_of_one_payment_one_after_the_other(shop: Shop, processor: ProbedProcessor) -> None:
    payment, older = shop.paid()
    assert settle(processor) == {older: Outcome.CREATED}
    newer = shop.confirm(payment)
    assert settle(processor) == {newer: Outcome.ALREADY_EXISTS}
    assert_one_purchase(shop, payment)


@pytest.mark.parametrize("flaw", ["mismatch", "reused", "marked", "buried"])
def test_duplicate_events_each_keep_their_own_fate(shop: Shop, processor: ProbedProcessor, flaw: str) -> None:
    """The older of two events of one payment has a flaw.

    It must not get the credit of the clean event.
    """
    payment, older = shop.paid(payload={"amount": "1.00"} if flaw == "mismatch" else None)
    if flaw in ("reused", "marked"):
        shop.mark(older, "created", STRANGER if flaw == "reused" else payment.id)
    if flaw == "buried":
        shop.dead_letter(payment, older)
    newer = shop.confirm(payment)
    outcomes = settle(processor)
    assert (outcomes[older], outcomes[newer]) in {
        "mismatch": [(Outcome.DEAD, Outcome.CREATED), (Outcome.ALREADY_EXISTS, Outcome.CREATED)],
        "reused": [(Outcome.DEAD, Outcome.CREATED)],
        "marked": [(Outcome.RECOVERED, Outcome.ALREADY_EXISTS), (Outcome.ALREADY_EXISTS, Outcome.CREATED)],
        "buried": [(Outcome.CREATED, Outcome.ALREADY_EXISTS), (Outcome.ALREADY_EXISTS, Outcome.CREATED)],
    }[flaw]
    assert shop.scalar("SELECT count(*) FROM dead_letters WHERE state = 'open'") == (outcomes[older] == "dead")
    assert_one_purchase(shop, payment)


@pytest.mark.parametrize("both_guards", ["lock"], indirect=True)
def test_missing_constraint(shop: Shop, processor: ProbedProcessor) -> None:
    """The database never had the index. The worker knows it from the start."""
    assert_settled_by_lock(shop, processor)


@pytest.mark.parametrize("both_guards", ["index"], indirect=True)
@pytest.mark.parametrize("how", ["dropped", "invalid", "total"])
def test_missing_constraint_while_believing_in_it(shop: Shop, processor: ProbedProcessor, how: str) -> None:
    """The index vanishes after the start of the worker: 42P10.

    The same batch is settled by the guard ``lock``.
    """
    assert processor.watch.state.guard is Guard.INDEX
    for statement in BREAK_INDEX[how]:
        shop.rows(statement)
    assert_settled_by_lock(shop, processor)


# --- 1: no handler


def test_rule_1_an_unknown_type_is_buried(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = shop.paid(event_type="LESSON_WATCHED")
    assert settle(processor) == {event: Outcome.DEAD}
    assert_buried(shop, event, Reason.UNSUPPORTED_EVENT_TYPE, payload_text(payment))
    assert shop.letter_of(event).event_type == "LESSON_WATCHED"
    assert metric(processor, "outbox_events_total", event_type="other", outcome="dead") == 1
    assert shop.purchases() == []


def test_rule_1_an_unknown_type_is_never_claimed_where_it_may_be_anothers(
    shop: Shop, make_processor: MakeProcessor
) -> None:
    foreign = shop.confirm(None, event_type="LESSON_WATCHED", payload="[1]")
    before = shop.event(foreign)
    _, ours = shop.paid()
    assert settle(make_processor(unknown_types="ignore")) == {ours: Outcome.CREATED}
    assert shop.event(foreign) == before
    assert shop.count("dead_letters") == 0


def test_rule_1_comes_before_2_and_3(shop: Shop, processor: ProbedProcessor) -> None:
    event = shop.confirm(None, event_type="LESSON_WATCHED", payload="[]")
    shop.mark(event, "created", STRANGER)
    assert settle(processor) == {event: Outcome.DEAD}
    assert_buried(shop, event, Reason.UNSUPPORTED_EVENT_TYPE, "[]", marked=True)


# --- 2: payload unusable


UNUSABLE = {
    "an array": "[]",
    "an array of the id": f'["{STRANGER}"]',
    "an array with an object in it": f'[{{"payment_id": "{STRANGER}"}}]',
    "a string": f'"{STRANGER}"',
    "a number": "7",
    "true": "true",
    "null": "null",
    "an empty object": "{}",
    "another key": f'{{"paymentId": "{STRANGER}"}}',
    "the id nested": f'{{"data": {{"payment_id": "{STRANGER}"}}}}',
    "payment_id null": '{"payment_id": null}',
    "payment_id a number": '{"payment_id": 123456789012}',
    "payment_id true": '{"payment_id": true}',
    "payment_id an object": f'{{"payment_id": {{"id": "{STRANGER}"}}}}',
    "payment_id an array": f'{{"payment_id": ["{STRANGER}"]}}',
    "payment_id empty": '{"payment_id": ""}',
    "payment_id without hyphens": f'{{"payment_id": "{STRANGER.hex}"}}',
    "payment_id in braces": f'{{"payment_id": "{{{STRANGER}}}"}}',
    "payment_id as URN": f'{{"payment_id": "urn:uuid:{STRANGER}"}}',
    "payment_id with a space behind": f'{{"payment_id": "{STRANGER} "}}',
    "payment_id with a newline behind": f'{{"payment_id": "{STRANGER}\\n"}}',
    "payment_id too long": f'{{"payment_id": "{STRANGER}0"}}',
    "payment_id not hexadecimal": f'{{"payment_id": "g{str(STRANGER)[1:]}"}}',
    "payment_id hyphens elsewhere": '{"payment_id": "0f0f-0f0f1111-4222-8333-444455556666"}',
    "deep": "[" * 2000 + "]" * 2000,
    "a huge number": f'{{"payment_id": {"9" * 5000}}}',
}


def test_rule_2_an_unusable_payload_is_buried_as_it_was(shop: Shop, processor: ProbedProcessor) -> None:
    """All unusable payloads are in one batch with a good event.

    None harms another event, even if Python cannot decode it.
    """
    shop.connection.adapters.register_loader("jsonb", TextLoader)
    _, good = shop.paid()
    shop.payment(id=STRANGER)
    events = {name: shop.confirm(None, payload=raw) for name, raw in UNUSABLE.items()}
    assert settle(processor) == {good: Outcome.CREATED} | dict.fromkeys(events.values(), Outcome.DEAD)
    for name, event in events.items():
        assert_buried(shop, event, Reason.INVALID_PAYLOAD, UNUSABLE[name])
    assert metric(processor, "outbox_dead_letters_total", reason="invalid_payload") == len(UNUSABLE)
    assert len(shop.purchases()) == 1


def test_rule_2_comes_before_3(shop: Shop, processor: ProbedProcessor) -> None:
    event = shop.confirm(None, payload="{}")
    shop.mark(event, "created", STRANGER)
    assert settle(processor) == {event: Outcome.DEAD}
    assert_buried(shop, event, Reason.INVALID_PAYLOAD, "{}", marked=True)


# --- 3: the event id is marked for another payment


def test_rule_3_comes_before_4_to_9(shop: Shop, processor: ProbedProcessor) -> None:
    paid = {what: shop.paid() for what in ["plain", "active", "inactive", "archived", "refunded", "held", "mismatched"]}
    shop.purchase(paid["active"][0])
    shop.purchase(paid["inactive"][0], active=False)
    shop.purchase(None, *paid["held"][0].pair)
    shop.rows("DELETE FROM payments WHERE id = %s", paid["archived"][0].id)
    shop.set_status(paid["refunded"][0], "refunded")
    shop.rows("UPDATE payments SET amount = 1 WHERE id = %s", paid["mismatched"][0].id)
    marks = [shop.mark_of(shop.mark(event, "created", STRANGER)) for _, event in paid.values()]
    before = shop.purchases()
    assert settle(processor) == {event: Outcome.DEAD for _, event in paid.values()}
    for payment, event in paid.values():
        letter = assert_buried(shop, event, Reason.EVENT_ID_REUSED, payload_text(payment), marked=True)
        assert letter.payment_id == payment.id
        assert str(STRANGER) in letter.detail
    assert [shop.mark_of(event) for _, event in paid.values()] == marks
    assert shop.purchases() == before


# --- 4: a purchase of this payment exists


@pytest.mark.parametrize(("active", "outcome"), [(True, Outcome.ALREADY_EXISTS), (False, Outcome.SUPPRESSED)])
def test_rule_4_an_existing_purchase_comes_before_5_to_9(
    shop: Shop, processor: ProbedProcessor, active: bool, outcome: Outcome
) -> None:
    paid = {what: shop.paid() for what in ["succeeded", "refunded", "pending", "failed", "archived", "mismatched"]}
    for payment, _ in paid.values():
        shop.purchase(payment, active=active)
    for status in ("refunded", "pending", "failed"):
        shop.set_status(paid[status][0], status)
    shop.rows("DELETE FROM payments WHERE id = %s", paid["archived"][0].id)
    shop.rows("UPDATE payments SET amount = 1 WHERE id = %s", paid["mismatched"][0].id)
    before = shop.purchases()
    assert settle(processor) == {event: outcome for _, event in paid.values()}
    for payment, event in paid.values():
        assert_marked(shop, event, outcome, payment)
    assert shop.purchases() == before


def test_rule_4_a_revoked_purchase_stays_revoked_though_another_holds_the_pair(
    shop: Shop, processor: ProbedProcessor
) -> None:
    payment, event = shop.paid()
    shop.purchase(payment, active=False)
    shop.purchase(student=payment.student_id, course=payment.course_id)
    assert settle(processor) == {event: Outcome.SUPPRESSED}
    assert_marked(shop, event, Outcome.SUPPRESSED, payment)
    assert [row.is_active for row in shop.purchases(payment)] == [False]


# --- 5 and 7: not yet


NOT_YET = [
    (None, Reason.PAYMENT_NOT_FOUND),
    ("pending", Reason.PAYMENT_NOT_SUCCEEDED),
    ("failed", Reason.PAYMENT_NOT_SUCCEEDED),
]


@pytest.mark.parametrize(("status", "reason"), NOT_YET)
def test_rules_5_and_7_retry_within_the_bounds(
    shop: Shop, processor: ProbedProcessor, settings: Settings, status: str | None, reason: Reason
) -> None:
    """Each failed try doubles the wait, up to the maximum, by the database's clock.

    The first wait is the base.
    """
    events = [shop.confirm(shop.payment(status) if status else unpaid(), attempts=tries) for tries in range(LAST)]
    before, started = [shop.event(event) for event in events], db_now(shop)
    assert settle(processor) == dict.fromkeys(events, Outcome.RETRIED)
    ended = db_now(shop)
    for tries, (event, was) in enumerate(zip(events, before, strict=True)):
        now = shop.event(event)
        wait = min(settings.retry_max_seconds, settings.retry_base_seconds * 2**tries)
        assert started + timedelta(seconds=wait) <= now.due_at <= ended + timedelta(seconds=wait * 1.25)
        assert now.attempts == tries + 1
        assert now.last_error.startswith(f"{reason}: ")
        assert now._replace(due_at=was.due_at, attempts=was.attempts, last_error=None) == was
        assert (shop.mark_of(event), shop.letter_of(event)) == (None, None)
    assert shop.purchases() == []
    assert metric(processor, "outbox_events_total", event_type=PURCHASE_CONFIRMED, outcome="retried") == LAST
    assert metric(processor, "outbox_settle_latency_seconds_count") == 0
    assert settle(processor) == {}, "a postponed event is not due"


@pytest.mark.parametrize(("status", "reason"), NOT_YET)
def test_rules_5_and_7_the_last_try_buries(
    shop: Shop, processor: ProbedProcessor, status: str | None, reason: Reason
) -> None:
    payment = shop.payment(status) if status else unpaid()
    event = shop.confirm(payment, attempts=LAST)
    assert settle(processor) == {event: Outcome.DEAD}
    letter = assert_buried(shop, event, reason, payload_text(payment), attempts=LAST + 1)
    assert letter.payment_id == payment.id
    assert metric(processor, "outbox_dead_letters_total", reason=reason) == 1
    assert shop.purchases() == []


def test_rules_5_and_7_an_event_lives_through_all_its_tries(shop: Shop, processor: ProbedProcessor) -> None:
    event = shop.confirm(unpaid())
    for attempts in range(1, LAST + 1):
        assert settle(processor) == {event: Outcome.RETRIED}
        assert shop.event(event).attempts == attempts
        shop.make_due()
    assert settle(processor) == {event: Outcome.DEAD}
    assert shop.letter_of(event).attempts == LAST + 1


def test_rules_5_and_7_a_payment_may_come_late_and_succeed_later(shop: Shop, processor: ProbedProcessor) -> None:
    event = shop.confirm(expected := unpaid())
    assert settle(processor) == {event: Outcome.RETRIED}
    payment = shop.payment("pending", *expected.pair, id=expected.id)
    shop.make_due()
    assert settle(processor) == {event: Outcome.RETRIED}
    shop.set_status(payment, "succeeded")
    shop.make_due()
    assert settle(processor) == {event: Outcome.CREATED}
    assert_marked(shop, event, Outcome.CREATED, payment)
    assert_one_purchase(shop, payment)


# --- helpers


def assert_settled_by_lock(shop: Shop, processor: ProbedProcessor) -> None:
    """Settle one batch with payments and events of the same pairs.

    No pair gets a second purchase.
    """
    payment, event = shop.paid()
    shop.pay_many(20, pairs=10, events=2)
    assert settle(processor)[event] is Outcome.CREATED
    assert processor.watch.state.guard is Guard.LOCK
    assert metric(processor, "outbox_constraint_fallback_total") in {1, 2}, (
        "a careful transaction, and a fast one before"
    )
    assert metric(processor, "outbox_guard", mode="lock") == 1
    assert metric(processor, "outbox_guard", mode="index") == 0
    assert_one_purchase(shop, payment)
    assert (shop.count("outbox"), shop.count("processed_events"), shop.count("purchases")) == (0, 41, 11)
    assert (shop.owed(), shop.doubled()) == (0, 0)


def unpaid() -> Payment:
    """Return a payment whose row does not exist."""
    return Payment(uuid4(), uuid4(), uuid4(), "49.90", "EUR")


def db_now(shop: Shop) -> datetime:
    now: datetime = shop.scalar("SELECT clock_timestamp()")
    return now
