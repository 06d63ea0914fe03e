"""The nine rules of one event, end to end under both guards: mark, purchase, outbox, dead letter and metrics.

The numbers are those of ``decide``. A test named ``…_comes_before_…`` holds two rules at once: the first must win.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg.types.string import TextLoader

from outbox_worker.model import PURCHASE_CONFIRMED, Guard, Outcome, Reason
from outbox_worker.settings import Settings
from tests.support.factories import ABSENT, Payment, ProbedProcessor, Shop, payload_text
from tests.support.makers import MakeProcessor

pytestmark = pytest.mark.usefixtures("both_guards")

STRANGER = UUID("0f0f0f0f-1111-4222-8333-444455556666")
CLAIMING_MARKS = ["created", "recovered", "already_exists", "handled_by_the_old_worker"]
OTHER_MARKS = ["duplicate_payment", "suppressed", "revoked"]
LAST = 9
"""Failed tries so far, of 10: the next one is the last."""
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
    """Marked as processed, never written: the money was taken and nothing given."""
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
    """The older is recovered, whichever was marked first; for the newer the purchase is there."""
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
    """Of two events of one payment the older has something against it: it must not get the credit of the clean one."""
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
    """The database never had the index: known from the start."""
    assert_settled_by_lock(shop, processor)


@pytest.mark.parametrize("both_guards", ["index"], indirect=True)
@pytest.mark.parametrize("how", ["dropped", "invalid", "total"])
def test_missing_constraint_while_believing_in_it(shop: Shop, processor: ProbedProcessor, how: str) -> None:
    """The index vanishes after the worker came to believe in it: 42P10, and the same batch is settled by the lock."""
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
    """All in one batch, next to a good one: none of them can hurt another, not even one that Python cannot decode."""
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
    """Waits double with each failed try up to the maximum, by the database's clock; the first waits the base."""
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


# --- 6: event and payment contradict each other

DIFFERENT: dict[str, Mapping[str, Any]] = {
    "student": {"student_id": STRANGER},
    "student not a string": {"student_id": 7},
    "student in braces": {"student_id": f"{{{STRANGER}}}"},
    "student empty": {"student_id": ""},
    "course": {"course_id": STRANGER},
    "amount": {"amount": "49.91"},
    "amount a number": {"amount": 49.91},
    "amount by little": {"amount": "49.900000001"},
    "amount negative": {"amount": "-49.90"},
    "amount with a comma": {"amount": "49,90"},
    "amount not a number": {"amount": "NaN"},
    "amount endless": {"amount": "Infinity"},
    "amount empty": {"amount": ""},
    "amount true": {"amount": True},
    "amount an object": {"amount": {"value": "49.90"}},
    "amount with a huge exponent": {"amount": "1e999999"},
    "amount of many digits": {"amount": "49.90" + "0" * 500 + "1"},
    "currency": {"currency": "USD"},
    "currency in lower case": {"currency": "eur"},
    "currency too long": {"currency": "EURO"},
    "currency a number": {"currency": 978},
}


def test_rule_6_each_contradiction_is_buried(shop: Shop, processor: ProbedProcessor) -> None:
    paid = {name: shop.paid(payload=payload) for name, payload in DIFFERENT.items()}
    assert settle(processor) == {event: Outcome.DEAD for _, event in paid.values()}
    for name, (payment, event) in paid.items():
        text = payload_text(payment, DIFFERENT[name])
        letter = assert_buried(shop, event, Reason.PAYMENT_MISMATCH, text)
        assert letter.payment_id == payment.id
        assert letter.detail == f"differs from the payment row: {', '.join(DIFFERENT[name])}", name
    assert shop.purchases() == []


def test_rule_6_names_every_key_that_differs_and_no_value(shop: Shop, processor: ProbedProcessor) -> None:
    _, event = shop.paid(payload={"student_id": STRANGER, "course_id": STRANGER, "amount": "1", "currency": "XTS"})
    assert settle(processor) == {event: Outcome.DEAD}
    detail = shop.letter_of(event).detail
    assert detail == "differs from the payment row: student_id, course_id, amount, currency"


def test_rule_6_comes_before_7(shop: Shop, processor: ProbedProcessor) -> None:
    other = {"amount": "1.00"}
    paid = [shop.paid(status=status, payload=other) for status in ("pending", "failed", "refunded")]
    assert settle(processor) == {event: Outcome.DEAD for _, event in paid}
    for payment, event in paid:
        assert_buried(shop, event, Reason.PAYMENT_MISMATCH, payload_text(payment, other))


def test_rule_6_comes_before_8_and_9(shop: Shop, processor: ProbedProcessor) -> None:
    """A mark that claims a purchase does not help an event that contradicts its payment."""
    payment, held = shop.paid(payload={"currency": "USD"})
    shop.purchase(student=payment.student_id, course=payment.course_id)
    other, marked = shop.paid(payload={"currency": "USD"})
    shop.mark(marked, "created", other.id)
    assert settle(processor) == {held: Outcome.DEAD, marked: Outcome.DEAD}
    assert shop.letter_of(held).reason == shop.letter_of(marked).reason == "payment_mismatch"
    assert len(shop.purchases()) == 1


SAME: dict[str, Mapping[str, Any]] = {
    "only the payment": dict.fromkeys(["student_id", "course_id", "amount", "currency"], ABSENT),
    "nulls": dict.fromkeys(["student_id", "course_id", "amount", "currency"]),
    "amount short": {"amount": "49.9"},
    "amount long": {"amount": "49.900"},
    "amount with a sign": {"amount": "+49.90"},
    "amount with zeros in front": {"amount": "0049.90"},
    "amount as exponent": {"amount": "4.99e1"},
    "amount as large exponent": {"amount": "4990E-2"},
    "keys we do not read": {"note": "x" * 10_000, "student": STRANGER, "nested": {"payment_id": STRANGER}},
}
SAME_AS_NUMBER = ["49.9", "49.90", "49.900", "4.99e1", "4990e-2"]


def test_rule_6_the_same_said_otherwise_is_no_contradiction(shop: Shop, processor: ProbedProcessor) -> None:
    paid = [shop.paid(payload=payload) for payload in SAME.values()]
    for number in SAME_AS_NUMBER:
        payment = shop.payment()
        paid.append((payment, shop.confirm(payment, payload=f'{{"payment_id": "{payment.id}", "amount": {number}}}')))
    assert settle(processor) == {event: Outcome.CREATED for _, event in paid}
    for payment, _ in paid:
        assert_one_purchase(shop, payment)


def test_rule_6_upper_case_ids_are_the_same(shop: Shop, processor: ProbedProcessor) -> None:
    payment = shop.payment()
    upper = {key: str(getattr(payment, key)).upper() for key in ("student_id", "course_id")}
    event = shop.confirm(payment, payload=upper | {"payment_id": str(payment.id).upper()})
    again = shop.confirm(payment, payload=upper | {"payment_id": str(payment.id).upper()}, due_in="-1 hour")
    assert settle(processor) == {again: Outcome.CREATED, event: Outcome.ALREADY_EXISTS}
    assert_one_purchase(shop, payment)


# --- 7: refunded


def test_rule_7_a_refunded_payment_comes_before_8_and_9(shop: Shop, processor: ProbedProcessor) -> None:
    free, held = shop.paid(status="refunded"), shop.paid(status="refunded")
    shop.purchase(None, *held[0].pair)
    before = shop.purchases()
    assert settle(processor) == {free[1]: Outcome.SUPPRESSED, held[1]: Outcome.SUPPRESSED}
    for payment, event in (free, held):
        assert_marked(shop, event, Outcome.SUPPRESSED, payment)
    assert shop.purchases() == before


# --- 8: the pair is held


@pytest.mark.parametrize("holder", ["another payment", "a gift"])
def test_rule_8_a_held_pair_is_a_duplicate_payment(shop: Shop, processor: ProbedProcessor, holder: str) -> None:
    """Whatever an earlier mark says; and what it says stays."""
    marks = [None, *CLAIMING_MARKS, *OTHER_MARKS]
    paid = [shop.paid() for _ in marks]
    for (payment, event), marked in zip(paid, marks, strict=True):
        shop.purchase(shop.payment("succeeded", *payment.pair) if holder == "another payment" else None, *payment.pair)
        if marked:
            shop.mark(event, marked, payment.id)
    before = shop.purchases()
    assert settle(processor) == {event: Outcome.DUPLICATE_PAYMENT for _, event in paid}
    assert_marked(shop, paid[0][1], Outcome.DUPLICATE_PAYMENT, paid[0][0])
    for (_, event), marked in zip(paid[1:], marks[1:], strict=True):
        assert (shop.event(event), shop.letter_of(event)) == (None, None)
        assert (shop.mark_of(event).outcome, shop.mark_of(event).recovered_at) == (marked, None)
    assert shop.purchases() == before
    counted = metric(processor, "outbox_events_total", event_type=PURCHASE_CONFIRMED, outcome="duplicate_payment")
    assert counted == len(paid)


def test_rule_8_an_inactive_purchase_holds_nothing(shop: Shop, processor: ProbedProcessor) -> None:
    (first, one), (second, other) = shop.paid(), shop.paid()
    shop.purchase(shop.payment("refunded", *first.pair), active=False)
    shop.purchase(None, *second.pair, active=False)
    assert settle(processor) == {one: Outcome.CREATED, other: Outcome.CREATED}
    assert_one_purchase(shop, first)
    assert_one_purchase(shop, second)


@pytest.mark.parametrize("gap", ["0 seconds", "-1 hour"])
def test_rule_8_of_two_payments_in_one_batch_the_older_event_wins(
    shop: Shop, processor: ProbedProcessor, gap: str
) -> None:
    payment, event = shop.paid()
    other = shop.payment("succeeded", *payment.pair)
    second = shop.confirm(other, due_in=gap)
    winner, loser = (event, second) if gap == "0 seconds" else (second, event)
    assert settle(processor) == {winner: Outcome.CREATED, loser: Outcome.DUPLICATE_PAYMENT}
    assert_marked(shop, loser, Outcome.DUPLICATE_PAYMENT, other if loser == second else payment)
    assert len(shop.purchases(payment.pair)) == 1


# --- 9: the purchase is inserted


@pytest.mark.parametrize(("marks", "outcome"), [(CLAIMING_MARKS, Outcome.RECOVERED), (OTHER_MARKS, Outcome.CREATED)])
def test_rule_9_what_a_mark_claimed_tells_recovered_from_created(
    shop: Shop, processor: ProbedProcessor, marks: list[str], outcome: Outcome
) -> None:
    paid = [shop.paid() for _ in range(2 * len(marks))]
    for (payment, event), marked in zip(paid, marks * 2, strict=True):
        named = (payment, event) in paid[: len(marks)]
        shop.mark(event, marked, payment.id if named else None)
    assert settle(processor) == {event: outcome for _, event in paid}
    for payment, event in paid:
        assert_marked(shop, event, outcome, payment)
        assert_one_purchase(shop, payment)


def test_rule_9_counts_what_it_did(shop: Shop, processor: ProbedProcessor, both_guards: str) -> None:
    shop.pay_many(7)
    payment, event = shop.paid()
    shop.mark(event, "created", payment.id)
    settle(processor)
    assert metric(processor, "outbox_events_total", event_type=PURCHASE_CONFIRMED, outcome="created") == 7
    assert metric(processor, "outbox_events_total", event_type=PURCHASE_CONFIRMED, outcome="recovered") == 1
    assert metric(processor, "outbox_transactions_total", result="commit") == 1
    assert metric(processor, "outbox_settle_latency_seconds_count") == 8
    assert metric(processor, "outbox_batch_size_sum") == 8
    assert metric(processor, "outbox_constraint_fallback_total") == (both_guards == "lock")


def test_an_empty_outbox_leaves_no_trace(shop: Shop, processor: ProbedProcessor) -> None:
    shop.paid(due_in="1 minute")
    assert settle(processor) == {}
    assert metric(processor, "outbox_transactions_total", result="commit") == 0
    assert metric(processor, "outbox_constraint_fallback_total") == 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_takes_the_oldest_first(shop: Shop, make_processor: MakeProcessor, batch_size: int) -> None:
    events = [shop.paid(due_in=f"-{minutes} minutes")[1] for minutes in (1, 3, 2, 5, 4)]
    oldest_first = [events[place] for place in (3, 4, 1, 2, 0)]
    assert [*settle(make_processor(batch_size=batch_size))] == oldest_first[:batch_size]


# --- helpers


def settle(processor: ProbedProcessor) -> dict[UUID, Outcome]:
    """One batch: the outcome of each event that has one, in the order of the claim."""
    report = processor.process_batch()
    return {
        event.event_id: report.verdicts[key].outcome for key, event in report.batch.items() if key in report.verdicts
    }


def metric(processor: ProbedProcessor, name: str, **labels: str) -> float:
    return processor.telemetry.metrics.registry.get_sample_value(name, labels) or 0


def assert_marked(shop: Shop, event: UUID, outcome: Outcome, payment: Payment) -> None:
    """Settled for good: marked for its payment, gone from the outbox, and nobody's work any more."""
    mark = shop.mark_of(event)
    assert (mark.event_type, mark.outcome, mark.payment_id) == (PURCHASE_CONFIRMED, outcome, payment.id)
    assert (mark.recovered_at is not None) == (outcome is Outcome.RECOVERED)
    assert (shop.event(event), shop.letter_of(event)) == (None, None)


def assert_one_purchase(shop: Shop, payment: Payment) -> None:
    """The payment's, as the payment row says, and the only active one of the pair."""
    (made,) = shop.purchases(payment)
    assert (made.student_id, made.course_id) == payment.pair
    assert (str(made.amount), made.currency) == (payment.amount, payment.currency)
    assert (made.is_active, made.deactivated_at) == (True, None)
    assert shop.active_pairs()[payment.pair] == 1


def assert_buried(
    shop: Shop, event: UUID, reason: Reason, payload: str, attempts: int = 1, marked: bool = False
) -> Any:
    """Dead: out of the outbox, kept whole in an open letter, and not marked by us."""
    letter = shop.letter_of(event)
    assert (letter.reason, letter.attempts, letter.state) == (reason, attempts, "open")
    assert (letter.resolved_at, letter.actor, letter.note) == (None, None, None)
    kept = "SELECT payload = CAST(%s AS jsonb) FROM dead_letters WHERE event_id = %s"
    assert shop.scalar(kept, payload, event), "the payload was not kept as it was"
    assert letter.detail
    assert letter.created_at < letter.dead_at
    assert shop.event(event) is None
    assert (shop.mark_of(event) is not None) == marked
    return letter


def assert_settled_by_lock(shop: Shop, processor: ProbedProcessor) -> None:
    """One batch with doubled payments and doubled events, and never a second purchase of a pair."""
    payment, event = shop.paid()
    shop.pay_many(20, pairs=10, events=2)
    assert settle(processor)[event] is Outcome.CREATED
    assert processor.watch.state.guard is Guard.LOCK
    assert metric(processor, "outbox_constraint_fallback_total") == 1
    assert metric(processor, "outbox_guard", mode="lock") == 1
    assert metric(processor, "outbox_guard", mode="index") == 0
    assert_one_purchase(shop, payment)
    assert (shop.count("outbox"), shop.count("processed_events"), shop.count("purchases")) == (0, 41, 11)
    assert (shop.owed(), shop.doubled()) == (0, 0)


def unpaid() -> Payment:
    """A payment whose row is not there."""
    return Payment(uuid4(), uuid4(), uuid4(), "49.90", "EUR")


def db_now(shop: Shop) -> datetime:
    now: datetime = shop.scalar("SELECT clock_timestamp()")
    return now
