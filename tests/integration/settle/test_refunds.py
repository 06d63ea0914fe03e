"""Refunds: what becomes of one, who gets the pair instead, what the database refuses, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import event as listener
from sqlalchemy.exc import DBAPIError

from outbox_worker.database import FREE_PLANS, INDEX_PLANS, Database, planned
from outbox_worker.errors import Failure, KeyMissing, classify
from outbox_worker.health import find_problems
from outbox_worker.model import PURCHASE_REFUNDED, Guard, Outcome, Reason
from outbox_worker.schema import Tables
from tests.support.factories import Clerk, Payment, ProbedProcessor, Shop, drain_all, hold_pair
from tests.support.interleaving import errors
from tests.support.makers import MakeDatabase, MakeProcessor

Connect = Callable[..., psycopg.Connection[Any]]

pytestmark = pytest.mark.usefixtures("both_guards")

STRANGER = UUID("0f0f0f0f-1111-4222-8333-444455556666")
LAST = 9
PAIR_INDEX = "purchases_active_student_course_key"


# --- the rules


def test_the_purchase_of_a_refunded_payment_is_taken_back(shop: Shop, processor: ProbedProcessor) -> None:
    payment, event = bought(shop)
    before = shop.purchases(payment)[0]
    event = shop.refund(payment)
    assert settle(processor) == {event: Outcome.REVOKED}
    (after,) = shop.purchases(payment)
    assert after == before._replace(is_active=False, deactivated_at=after.deactivated_at)
    assert after.deactivated_at > before.created_at
    assert_marked(shop, event, payment)
    assert metric(processor, "outbox_events_total", event_type=PURCHASE_REFUNDED, outcome="revoked") == 1


def test_a_refund_before_its_confirmation_leaves_an_inactive_purchase(shop: Shop, processor: ProbedProcessor) -> None:
    """So that the confirmation makes none, not even where the payment says that it succeeded."""
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
    """Not visible (or archived), or of another status: tried again, and at the end buried; the purchase stays."""
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
    """The mark is only evidence: the purchase is there, and the payment is refunded. The mark stays as it was."""
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
    """Whatever the payment says by now; its row may be archived."""
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
    """One statement cannot write a row twice; they go together all the same, and no savepoint is given up."""
    payment, _ = bought(shop)
    events = [shop.refund(payment) for _ in range(3)]
    sent: list[str] = []
    listener.listen(processor.database.engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)
    assert [statement for statement in sent if statement.startswith("ROLLBACK")] == []
    assert [row.is_active for row in shop.purchases(payment)] == [False]
    for event in events:
        assert_marked(shop, event, payment)


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


# --- who gets the pair instead


def test_the_oldest_other_payment_gets_the_pair(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    """Its mark still says that it was a duplicate once; a redelivery finds the purchase."""
    first, _ = bought(shop)
    others = [paid_too(shop, first) for _ in range(3)]
    oldest, its_event = others[1]
    shop.rows("UPDATE payments SET created_at = created_at - interval '1 hour' WHERE id = %s", oldest.id)
    assert set(settle(processor).values()) == {Outcome.DUPLICATE_PAYMENT}
    event = shop.refund(first)
    assert settle(processor) == {event: Outcome.REVOKED}
    assert holder(shop, first) == oldest.id
    (passed,) = (each for each in records if each.get("event") == "purchase_passed_on")
    told = {"event_id": str(event), "payment_id": str(first.id), "passed_to": str(oldest.id)}
    assert told.items() <= passed.items()
    assert shop.outcome_of(its_event) == "duplicate_payment"
    shop.confirm(oldest, its_event)
    assert settle(processor) == {its_event: Outcome.ALREADY_EXISTS}
    assert len(shop.purchases(first.pair)) == 2


def test_nobody_is_told_of_who_gets_nothing(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    payment, _ = bought(shop)
    shop.refund(payment)
    settle(processor)
    assert [each for each in records if each.get("event") == "purchase_passed_on"] == []


@pytest.mark.parametrize("status", ["pending", "failed", "refunded"])
def test_only_a_standing_payment_gets_it(shop: Shop, processor: ProbedProcessor, status: str) -> None:
    first, _ = bought(shop)
    shop.payment(status, *first.pair)
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) is None


@pytest.mark.parametrize("kind", ["taken back", "contradicted", "reused", "waived"])
def test_who_has_a_story_of_its_own_does_not(shop: Shop, processor: ProbedProcessor, kind: str) -> None:
    """A purchase that was revoked is never brought back, and what a person decides, a person decides."""
    first, _ = bought(shop)
    other, free = shop.payment("succeeded", *first.pair), shop.payment("succeeded", *first.pair)
    match kind:
        case "taken back":
            shop.purchase(other, active=False)
        case "contradicted" | "reused":
            shop.dead_letter(other, reason="payment_mismatch" if kind == "contradicted" else "event_id_reused")
        case "waived":
            shop.dead_letter(other, state="discarded", reason="rejected_by_database")
            shop.rows("UPDATE dead_letters SET note = 'paid out in cash'")
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) == free.id


def test_a_dead_letter_for_another_reason_does_not_keep_it_from_a_payment(
    shop: Shop, processor: ProbedProcessor
) -> None:
    first, _ = bought(shop)
    other = shop.payment("succeeded", *first.pair)
    shop.dead_letter(other, reason="payment_not_found")
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) == other.id


def test_who_is_on_its_way_is_left_to_its_own_event(shop: Shop, processor: ProbedProcessor) -> None:
    """Event and payment may contradict each other: nobody has judged that yet."""
    first, _ = bought(shop)
    late, its_event = paid_too(shop, first, due_in="1 hour", payload={"payment_id": None})
    shop.rows(
        "UPDATE outbox SET payload = jsonb_build_object('payment_id', upper(%s)) WHERE event_id = %s",
        *(str(late.id), its_event),
    )
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) is None
    shop.make_due()
    assert settle(processor) == {its_event: Outcome.CREATED}
    assert holder(shop, first) == late.id


def test_events_of_others_types_keep_nobody_waiting(shop: Shop, make_processor: MakeProcessor) -> None:
    first, _ = bought(shop)
    other = shop.payment("succeeded", *first.pair)
    shop.confirm(other, event_type="RECEIPT_SENT")
    shop.refund(first)
    settle(make_processor(unknown_types="ignore"))
    assert holder(shop, first) == other.id


def test_the_pair_that_a_refund_frees_goes_to_who_waits_longest_though_another_is_on_its_way(
    shop: Shop, processor: ProbedProcessor
) -> None:
    first, _ = bought(shop)
    waiting, _ = paid_too(shop, first)
    settle(processor)
    _, on_its_way = paid_too(shop, first, due_in="1 hour")
    shop.refund(first)
    settle(processor)
    assert holder(shop, first) == waiting.id
    shop.make_due()
    assert settle(processor) == {on_its_way: Outcome.DUPLICATE_PAYMENT}


@pytest.mark.parametrize("by", ["hand", "an earlier delivery"])
def test_who_is_owed_gets_it_though_the_purchase_was_taken_back_before(
    shop: Shop, processor: ProbedProcessor, by: str
) -> None:
    """The shop took it back itself, without a look at who else has paid; or the payment became a standing one later."""
    first, _ = bought(shop)
    if by == "hand":
        shop.rows("UPDATE purchases SET is_active = false, deactivated_at = now()")
    else:
        shop.refund(first)
        settle(processor)
    other = shop.payment("succeeded", *first.pair)
    event = shop.refund(first)
    assert settle(processor) == {event: Outcome.REVOKED}
    assert holder(shop, first) == other.id


def test_of_several_refunds_of_a_pair_one_passes_it_on(shop: Shop, processor: ProbedProcessor) -> None:
    """The duplicate's refund comes first, then that of the purchase; a third payment stands."""
    first, _ = bought(shop)
    second, _ = paid_too(shop, first)
    third, _ = paid_too(shop, first)
    fourth, _ = paid_too(shop, first)
    settle(processor)
    events = [shop.refund(second, due_in="-3 minutes"), shop.refund(first, due_in="-2 minutes")]
    events.append(shop.refund(first, due_in="-1 minute"))
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)
    assert holder(shop, first) == third.id
    assert shop.purchases(fourth) == []


def test_an_archived_payment_passes_its_pair_on(shop: Shop, processor: ProbedProcessor) -> None:
    first, _ = bought(shop)
    shop.rows("UPDATE purchases SET is_active = false")
    shop.rows("DELETE FROM payments")
    other = shop.payment("succeeded", *first.pair)
    shop.confirm(first, event_type=PURCHASE_REFUNDED)
    assert set(settle(processor).values()) == {Outcome.REVOKED}
    assert holder(shop, first) == other.id


@pytest.mark.parametrize("both_guards", ["index"], indirect=True)
@pytest.mark.parametrize("has_heirs", [True, False])
def test_the_index_vanishes_before_a_pair_is_passed_on(shop: Shop, processor: ProbedProcessor, has_heirs: bool) -> None:
    """42P10 of the grant is the guard's matter: the same batch is settled by the lock. Taking back needs no guard."""
    refunded = [bought(shop)[0] for _ in range(5)]
    heirs = [shop.payment("succeeded", *payment.pair) for payment in refunded] if has_heirs else []
    events = [shop.refund(payment) for payment in refunded]
    shop.rows(f"DROP INDEX {PAIR_INDEX}")
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)
    assert processor.watch.state.guard is (Guard.LOCK if has_heirs else Guard.INDEX)
    assert metric(processor, "outbox_constraint_fallback_total") == has_heirs
    assert {row.payment_id for row in shop.rows("SELECT payment_id FROM purchases WHERE is_active")} == {
        heir.id for heir in heirs
    }


# --- what the database refuses


class Refusal(NamedTuple):
    sqlstate: str
    schema: str
    """What the schema has against the deactivation of a purchase of the course BAD."""
    cure: str


GOOD, BAD = UUID(int=1), UUID(int=2)


def raising(state: str, kind: str = "TRIGGER refuse BEFORE", course: UUID | None = BAD) -> str:
    when = "true" if course is None else f"NEW.course_id = '{course}'"
    timing = "DEFERRABLE INITIALLY DEFERRED " if "CONSTRAINT" in kind else ""
    return (
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NOT NEW.is_active AND {when} THEN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END IF;"
        f" RETURN NEW; END $$;"
        f"CREATE {kind} INSERT OR UPDATE ON purchases {timing}FOR EACH ROW EXECUTE FUNCTION refuse()"
    )


NO_TRIGGER = "DROP TRIGGER refuse ON purchases"
REFUSALS = {
    "check": Refusal(
        "23514",
        f"ALTER TABLE purchases ADD CONSTRAINT ck CHECK (is_active OR course_id <> '{BAD}')",
        "ALTER TABLE purchases DROP CONSTRAINT ck",
    ),
    "trigger": Refusal("P0001", raising("P0001"), NO_TRIGGER),
    "trigger at COMMIT": Refusal("P0001", raising("P0001", "CONSTRAINT TRIGGER refuse AFTER"), NO_TRIGGER),
    "unclear class": Refusal("42501", raising("42501"), NO_TRIGGER),
    "silence": Refusal(
        "",
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.course_id = '{BAD}' THEN RETURN NULL; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON purchases FOR EACH ROW EXECUTE FUNCTION refuse()",
        NO_TRIGGER,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_refund_alone_is_charged(shop: Shop, processor: ProbedProcessor, name: str) -> None:
    refusal = REFUSALS[name]
    shop.rows(refusal.schema)
    good = [shop.refund(bought(shop, course=GOOD)[0]) for _ in range(2)]
    kept, doomed = (bought(shop, course=BAD)[0] for _ in range(2))
    bad, at_its_end = shop.refund(kept), shop.refund(doomed, attempts=LAST)
    good += [shop.refund(shop.payment(course=GOOD)) for _ in range(2)]
    assert settle(processor) == dict.fromkeys(good, Outcome.REVOKED) | {bad: Outcome.RETRIED, at_its_end: Outcome.DEAD}
    assert {row.payment_id: row.is_active for row in shop.purchases() if row.is_active} == {
        kept.id: True,
        doomed.id: True,
    }
    assert shop.event(bad).attempts == 1
    assert shop.event(bad).last_error.startswith("rejected_by_database: ")
    assert refusal.sqlstate in shop.event(bad).last_error
    assert shop.letter_of(at_its_end).reason == Reason.REJECTED_BY_DATABASE
    shop.rows(refusal.cure)
    shop.make_due()
    assert settle(processor) == {bad: Outcome.REVOKED}
    assert [row.is_active for row in shop.purchases(kept)] == [False]


def test_an_inactive_row_in_a_full_unique_index_is_the_refunds_own_trouble(
    shop: Shop, processor: ProbedProcessor
) -> None:
    shop.rows("CREATE UNIQUE INDEX whole ON purchases (student_id, course_id)")
    held = shop.payment()
    shop.purchase(None, *held.pair)
    bad = shop.refund(held)
    good = [shop.refund(bought(shop)[0]) for _ in range(5)]
    assert settle(processor) == dict.fromkeys(good, Outcome.REVOKED) | {bad: Outcome.RETRIED}
    assert "SQLSTATE 23505" in shop.event(bad).last_error
    shop.rows("UPDATE outbox SET attempts = 9, due_at = clock_timestamp()")
    assert settle(processor) == {bad: Outcome.DEAD}
    assert shop.letter_of(bad).reason == "rejected_by_database"


def test_what_nobody_may_take_back_is_nobodys_fault(shop: Shop, processor: ProbedProcessor) -> None:
    """That something was taken back before says nothing of the database's health."""
    shop.rows(raising("42501", course=None))
    shop.rows("ALTER TABLE purchases DISABLE TRIGGER refuse")
    done = shop.payment("refunded")
    shop.purchase(done, active=False)
    again = shop.refund(done)
    events = [shop.refund(bought(shop)[0]) for _ in range(5)]
    shop.rows("ALTER TABLE purchases ENABLE TRIGGER refuse")
    with pytest.raises(DBAPIError) as caught:
        processor.process_batch()
    assert classify(caught.value) is Failure.UNCLEAR
    assert shop.rows("SELECT DISTINCT attempts FROM outbox") == [(0,)]
    assert shop.count("outbox") == 6
    shop.rows(NO_TRIGGER)
    assert settle(processor) == dict.fromkeys([again, *events], Outcome.REVOKED)


def test_a_grant_that_is_refused_keeps_its_refund_waiting_and_no_other(shop: Shop, processor: ProbedProcessor) -> None:
    """Refund and grant stand together or not at all."""
    shop.rows("ALTER TABLE purchases ADD CONSTRAINT ck CHECK (amount < 100)")
    first, other = bought(shop)[0], bought(shop)[0]
    heir = shop.payment("succeeded", *first.pair, amount="100.00")
    bad, good = shop.refund(first), shop.refund(other)
    assert settle(processor) == {bad: Outcome.RETRIED, good: Outcome.REVOKED}
    assert holder(shop, first) == first.id
    shop.rows("ALTER TABLE purchases DROP CONSTRAINT ck")
    shop.make_due()
    assert settle(processor) == {bad: Outcome.REVOKED}
    assert holder(shop, first) == heir.id


def test_a_grant_that_is_not_written_is_told(shop: Shop, processor: ProbedProcessor) -> None:
    """Somebody's trigger swallows the row without an error: the refund stands, its event is tried again."""
    first, _ = bought(shop)
    heir = shop.payment("succeeded", *first.pair)
    event = shop.refund(first)
    shop.rows("CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    shop.rows(
        "CREATE TRIGGER swallow BEFORE INSERT ON purchases FOR EACH ROW WHEN (NEW.is_active) EXECUTE FUNCTION swallow()"
    )
    assert settle(processor) == {event: Outcome.RETRIED}
    assert shop.event(event).last_error.startswith("rejected_by_database: ")
    assert holder(shop, first) is None
    shop.rows("DROP TRIGGER swallow ON purchases")
    shop.make_due()
    assert settle(processor) == {event: Outcome.REVOKED}
    assert holder(shop, first) == heir.id


def test_a_refund_whose_purchase_a_foreign_transaction_holds_makes_way_uncharged(
    shop: Shop, connect: Connect, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    payments = [bought(shop)[0] for _ in range(4)]
    events = [shop.refund(payment) for payment in payments]
    holder = connect()
    holder.execute("SELECT FROM purchases WHERE payment_id = %s FOR UPDATE", [payments[2].id])
    processor = make_processor(database=make_database(deadline_seconds=1))
    settled: dict[UUID, Outcome] = {}
    while left := settle(processor):
        settled |= left
    while shop.scalar("SELECT count(*) FROM outbox WHERE due_at <= clock_timestamp()"):
        settled |= settle(processor)
    assert settled == dict.fromkeys(events[:2] + events[3:], Outcome.REVOKED)
    assert shop.event(events[2]).attempts == 0
    holder.rollback()
    shop.make_due()
    assert settle(processor) == {events[2]: Outcome.REVOKED}


def test_a_pair_that_somebody_has_locked_keeps_its_refund_in_the_outbox(
    shop: Shop, connect: Connect, processor: ProbedProcessor
) -> None:
    payment, other = bought(shop)[0], bought(shop)[0]
    event, free = shop.refund(payment), shop.refund(other)
    before = shop.event(event)
    stranger = connect()
    hold_pair(stranger, payment)
    assert settle(processor) == {free: Outcome.REVOKED}
    assert settle(processor) == {}
    assert shop.event(event) == before
    stranger.rollback()
    assert settle(processor) == {event: Outcome.REVOKED}


def test_a_privilege_to_take_back_that_is_lost_is_nobodys_fault(
    shop: Shop, clerk: Clerk, make_processor: MakeProcessor
) -> None:
    """It is asked for whatever the row: that nothing was to be written for one refund does not accuse the other."""
    done = shop.payment("refunded")
    shop.purchase(done, active=False)
    shop.refund(done)
    shop.refund(bought(shop)[0])
    processor = make_processor(database=clerk.database)
    clerk.revoke("UPDATE", "purchases")
    with pytest.raises(DBAPIError) as caught:
        processor.process_batch()
    assert classify(caught.value) is Failure.UNCLEAR
    assert shop.rows("SELECT attempts, count(*) FROM outbox GROUP BY 1") == [(0, 2)]
    clerk.grant("UPDATE (is_active, deactivated_at)", "purchases")
    assert set(settle(processor).values()) == {Outcome.REVOKED}, "these two columns are all that it changes"


# --- the unique key of payments in purchases

KEYS = {
    "a constraint": ("ALTER TABLE purchases ADD UNIQUE (payment_id)", True),
    "an index": ("CREATE UNIQUE INDEX ON purchases (payment_id)", True),
    "without gifts": ("CREATE UNIQUE INDEX ON purchases (payment_id) WHERE payment_id IS NOT NULL", True),
    "with more in it": ("CREATE UNIQUE INDEX ON purchases (payment_id) INCLUDE (is_active)", True),
    "none": ("SELECT", False),
    "not unique": ("CREATE INDEX ON purchases (payment_id)", False),
    "of active ones": ("CREATE UNIQUE INDEX ON purchases (payment_id) WHERE is_active", False),
    "of two columns": ("CREATE UNIQUE INDEX ON purchases (payment_id, student_id)", False),
    "deferrable": ("ALTER TABLE purchases ADD UNIQUE (payment_id) DEFERRABLE", False),
}


@pytest.mark.parametrize("name", KEYS)
def test_which_unique_keys_will_do(
    shop: Shop, database: Database, tables: Tables, make_processor: MakeProcessor, name: str
) -> None:
    """What the start demands is what the statement needs: full, or partial where there is a payment. And the remedy."""
    made, will_do = KEYS[name]
    shop.rows("ALTER TABLE purchases DROP CONSTRAINT purchases_payment_id_key")
    shop.rows(made)
    with database.transaction() as session:
        problems = find_problems(session, tables)
    assert [problem.finding for problem in problems] == (
        [] if will_do else ["public.purchases.payment_id is not unique"]
    )
    for problem in problems:
        shop.rows(problem.remedy)
    if "deferrable" not in name:
        payment, _ = bought(shop)
        events = [shop.refund(payment), shop.refund(shop.payment())]
        assert settle(make_processor()) == dict.fromkeys(events, Outcome.REVOKED)


def test_a_key_that_vanishes_while_it_runs_is_nobodys_fault_and_no_matter_of_the_guard(
    shop: Shop, processor: ProbedProcessor, both_guards: str
) -> None:
    events = [shop.refund(bought(shop)[0]) for _ in range(3)]
    shop.rows("ALTER TABLE purchases DROP CONSTRAINT purchases_payment_id_key")
    for _ in range(3):
        with pytest.raises(KeyMissing) as caught:
            processor.process_batch()
        assert classify(caught.value) is Failure.PAUSE
    assert processor.watch.state.guard == both_guards
    assert shop.rows("SELECT attempts, count(*) FROM outbox GROUP BY 1") == [(0, 3)]
    assert metric(processor, "outbox_database_errors_total", **{"class": "pause"}) == 3
    assert metric(processor, "outbox_constraint_fallback_total") == 0
    shop.rows("ALTER TABLE purchases ADD UNIQUE (payment_id)")
    assert settle(processor) == dict.fromkeys(events, Outcome.REVOKED)


@pytest.mark.parametrize("table", ["processed_events", "dead_letters"])
def test_so_do_the_keys_of_marks_and_letters(shop: Shop, processor: ProbedProcessor, table: str) -> None:
    refunded = shop.refund(bought(shop)[0])
    broken = shop.confirm(None, event_type=PURCHASE_REFUNDED, payload="[]")
    shop.rows(f"ALTER TABLE {table} DROP CONSTRAINT {table}_pkey")
    with pytest.raises(KeyMissing):
        processor.process_batch()
    assert shop.rows("SELECT attempts, count(*) FROM outbox GROUP BY 1") == [(0, 2)]
    shop.rows(f"ALTER TABLE {table} ADD PRIMARY KEY (event_id)")
    assert settle(processor) == {refunded: Outcome.REVOKED, broken: Outcome.DEAD}


def test_thirty_refunds_one_by_one_on_one_connection(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    """A statement that is prepared after a while, with a generic plan after another, still finds its key."""
    payments = [bought(shop)[0] for _ in range(30)]
    heirs = [shop.payment("succeeded", *payment.pair) for payment in payments]
    for payment in payments:
        shop.refund(payment)
    processor = make_processor(batch_size=1, database=make_database(connections=1))
    assert drain_all(processor) == {Outcome.REVOKED: 30}
    assert {row.payment_id for row in shop.purchases() if row.is_active} == {heir.id for heir in heirs}
    assert errors(processor) == {}


# --- what it costs


def refunds(shop: Shop, count: int, heirs: int) -> None:
    """So many refunds of active purchases, due now; of so many pairs another payment stands."""
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
        heirs,
    )


@pytest.mark.parametrize("heirs", [0, 100])
@pytest.mark.parametrize("size", [1, 10, 500])
def test_a_batch_of_refunds_takes_the_same_statements_however_large(
    size: int, heirs: int, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    refunds(shop, size, min(heirs, size))
    processor = make_processor()
    sent: list[str] = []
    listener.listen(database.engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    assert processor.process_batch().outcomes() == {Outcome.REVOKED: size}
    # limits, claim, savepoint, lock, look, take back, switches, who stands, switches, mark, letters, remove
    # and where somebody gets the pair instead: grant, traces
    assert len(sent) == (14 if heirs else 12), sent
    assert len(shop.rows("SELECT id FROM purchases WHERE is_active")) == min(heirs, size)


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


def bought(shop: Shop, **of_payment: Any) -> tuple[Payment, UUID]:
    """A payment with its active purchase."""
    payment = shop.payment(**of_payment)
    return payment, shop.purchase(payment)


def paid_too(shop: Shop, like: Payment, **more: Any) -> tuple[Payment, UUID]:
    """Another payment of the pair, with its event."""
    return shop.paid(student=like.student_id, course=like.course_id, **more)


def settle(processor: ProbedProcessor) -> dict[UUID, Outcome]:
    """One batch: the outcome of each event that has one."""
    report = processor.process_batch()
    return {
        event.event_id: report.verdicts[key].outcome for key, event in report.batch.items() if key in report.verdicts
    }


def holder(shop: Shop, payment: Payment) -> UUID | None:
    """The payment whose purchase holds the pair."""
    held = [row.payment_id for row in shop.purchases(payment.pair) if row.is_active]
    assert len(held) <= 1
    return held[0] if held else None


def metric(processor: ProbedProcessor, name: str, **labels: str) -> float:
    return processor.telemetry.metrics.registry.get_sample_value(name, labels) or 0


def assert_marked(shop: Shop, event: UUID, payment: Payment) -> None:
    mark = shop.mark_of(event)
    assert (mark.event_type, mark.outcome, mark.payment_id) == (PURCHASE_REFUNDED, "revoked", payment.id)
    assert (shop.event(event), shop.letter_of(event)) == (None, None)
