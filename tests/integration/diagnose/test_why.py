"""The command ``why``: its predictions come true, and its stories are what was written.

The worlds are those of ``tests.support.worlds``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import Phase, given
from hypothesis import settings as examples
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import sqlstate
from outbox_worker.decision import CRASHES_MAX
from outbox_worker.diagnose import explanation as why
from outbox_worker.diagnose.explanation import Explanation, Occasion, PaymentStory, Prediction
from outbox_worker.errors import Refused
from outbox_worker.keys import KeyKind
from outbox_worker.model import Outcome, Reason, Verdict
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.store.dead_letters import Decision, Selection, decide_letters, preview
from outbox_worker.store.payment_classes import PaymentClass
from outbox_worker.store.purchases import backfill_event_id
from tests.support.factories import ProbedProcessor, Shop
from tests.support.makers import MakeProcessor
from tests.support.payloads import TYPES, retype
from tests.support.settling import judge
from tests.support.worlds import ALONE, FEW, REFUNDS_ALONE, PairCase, write

Ask = Callable[..., Explanation]
SOME = examples(FEW, max_examples=12, phases=[Phase.generate])


@pytest.fixture
def ask(database: Database, tables: Tables, settings: Settings) -> Ask:
    found: list[Tables] = []

    def about(asked: object, claimed_types: tuple[str, ...] | None = None) -> Explanation:
        with database.snapshot() as session:
            if not found:
                found.append(check_schema(session, tables))
            return why.explain(session, found[0], settings.retry_policy, claimed_types, str(asked))

    return about


def only(found: Explanation) -> PaymentStory:
    (story,) = found.stories
    return story


def foretold(found: Explanation, event_id: UUID) -> Prediction:
    """Return the prediction for an event. All stories with that event must predict the same."""
    prospects = [each for story in found.stories for each in story.predictions if each.event_id == event_id]
    assert prospects, found
    assert all(each == prospects[0] for each in prospects)
    return prospects[0]


def meant(verdict: Verdict) -> tuple[object, ...]:
    return verdict.outcome, verdict.reason, verdict.detail, verdict.writes


def happened(processor: ProbedProcessor) -> Mapping[UUID, tuple[object, ...]]:
    """Settle all due events and return their verdicts.

    One transaction settles one type of event.
    """
    found: dict[UUID, tuple[object, ...]] = {}
    while verdicts := judge(processor):
        found |= {event: meant(verdict) for event, verdict in verdicts.items()}
    return found


# --- predictions come true


@pytest.mark.usefixtures("both_guards")
@SOME
@given(world=ALONE | REFUNDS_ALONE)
def test_of_an_event_that_waits(world: list[PairCase], shop: Shop, ask: Ask, processor: ProbedProcessor) -> None:
    told = [one.event_id for one in write(shop, world)]
    said = {event: foretold(ask(event), event) for event in told}
    assert {each.occasion for each in said.values()} == {Occasion.DUE}
    assert {event: meant(each.verdict) for event, each in said.items()} == happened(processor)


@pytest.mark.parametrize("column", TYPES)
def test_of_a_dead_letter_that_is_requeued(
    column: str, shop: Shop, ask: Ask, make_processor: MakeProcessor, database: Database, tables: Tables
) -> None:
    """The payload can be a document. A dead letter keeps a document in another form."""
    retype(shop, column)
    processor = make_processor()

    @SOME
    @given(world=ALONE | REFUNDS_ALONE)
    def requeued(world: list[PairCase]) -> None:
        told = [one.event_id for one in write(shop, world)]
        bury_all(shop, column)
        said = {event: foretold(ask(event), event) for event in told}
        assert {each.occasion for each in said.values()} == {Occasion.REQUEUED}
        with database.transaction() as session:
            chosen, kept = Selection(event_ids=told), check_schema(session, tables)
            token = preview(session, kept, chosen).token
            decide_letters(session, kept, chosen, Decision.REQUEUE, token=token, actor="ann", why="again")
        assert {event: meant(each.verdict) for event, each in said.items()} == happened(processor)

    requeued()


def bury_all(shop: Shop, column: str) -> None:
    """Turn all events in the outbox into dead letters, as the worker writes them."""
    kept = "payload" if column == "jsonb" else "to_jsonb(payload::text)"
    shop.rows(
        "INSERT INTO dead_letters (event_id, event_type, payload, created_at, payment_id, attempts, reason, detail)"
        f" SELECT event_id, event_type, {kept}, created_at, NULL, 10, 'crashed_worker', '' FROM outbox"
        " ON CONFLICT (event_id) DO UPDATE SET state = 'open', payload = excluded.payload"
    )
    shop.rows("DELETE FROM outbox")


@pytest.mark.usefixtures("both_guards")
def test_of_a_settled_event_that_is_delivered_again(shop: Shop, ask: Ask, processor: ProbedProcessor) -> None:
    first, created = shop.paid()
    _, twice = shop.paid(student=first.student_id, course=first.course_id)
    refunded, suppressed = shop.paid(status="refunded")
    lost, marked = shop.paid()
    events = {created: first, suppressed: refunded, marked: lost}
    happened(processor)
    shop.rows("DELETE FROM purchases WHERE payment_id = %s", lost.id)
    said = {event: foretold(ask(event), event) for event in events}
    assert {each.occasion for each in said.values()} == {Occasion.DELIVERED}
    assert [each.verdict.outcome for each in said.values()] == ["already_exists", "suppressed", "recovered"]
    assert [each.verdict.rule for each in said.values()] == [4, 7, 9]
    assert foretold(ask(twice), twice).verdict.rule == 8
    for event, payment in events.items():
        shop.confirm(payment, event)
    assert {event: meant(each.verdict) for event, each in said.items()} == happened(processor)


def test_of_what_is_owed_by_the_next_backfill(shop: Shop, ask: Ask) -> None:
    """A backfill makes a purchase only if nothing explains the payment.

    Its mark has the predicted id.
    """
    owed, twin, waiting, held = shop.payment(ago="2 hours"), shop.payment(), shop.paid()[0], shop.payment()
    shop.purchase(None, *held.pair)
    (prospect,) = only(ask(owed.id)).predictions
    assert prospect == Prediction(
        backfill_event_id(owed.id, KeyKind.UUID),
        "PURCHASE_BACKFILLED",
        Occasion.BACKFILL,
        Verdict(Outcome.CREATED, writes=True),
    )
    assert only(ask(owed.id)).kind == PaymentClass.UNEXPLAINED
    shop.mark(backfill_event_id(twin.id, KeyKind.UUID), "created", twin.id, "PURCHASE_BACKFILLED")
    assert [each.verdict.outcome for each in only(ask(twin.id)).predictions] == ["recovered"]
    shop.purchase(twin)
    assert only(ask(twin.id)).predictions == [], "nobody delivers what a backfill has marked"
    assert [each.occasion for each in only(ask(waiting.id)).predictions] == [Occasion.DUE]
    assert only(ask(held.id)).predictions == []
    assert only(ask(held.id)).kind == PaymentClass.DUPLICATE


def test_of_several_that_are_owed_by_one_pair_a_backfill_takes_the_oldest(shop: Shop, ask: Ask) -> None:
    young = shop.payment(ago="1 hour")
    old = shop.payment("succeeded", *young.pair, ago="2 hours")
    (first,), (second,) = only(ask(old.id)).predictions, only(ask(young.id)).predictions
    assert (first.verdict.outcome, first.verdict.detail) == ("created", "")
    assert (second.verdict.outcome, second.verdict.rule) == ("duplicate_payment", 8)
    assert str(old.id) in second.verdict.detail


@pytest.mark.parametrize("status", ["pending", "failed", "refunded"])
def test_payments_that_do_not_stand(status: str, shop: Shop, ask: Ask) -> None:
    payment = shop.payment(status)
    assert only(ask(payment.id)).kind is None
    shop.purchase(payment)
    assert only(ask(payment.id)).kind == ("refunded_but_active" if status == "refunded" else None)


def test_a_purchase_is_asked_for_by_its_id(shop: Shop, ask: Ask) -> None:
    payment = shop.payment()
    found = ask(shop.purchase(payment))
    assert (found.kinds, only(found).payment_id) == (["purchase"], payment.id)
    gift = shop.purchase(None)
    assert [each.id for each in ask(gift).gifts] == [gift]
    assert ask(gift).stories == []


def test_what_was_requeued_was_written_once(shop: Shop, ask: Ask, database: Database, tables: Tables) -> None:
    payment = shop.payment()
    event = shop.dead_letter(payment, reason="payment_not_found")
    with database.transaction() as session:
        token = preview(session, tables, Selection()).token
        decide_letters(session, tables, Selection(), Decision.REQUEUE, token=token, actor="ann", why="again")
    assert [each.what for each in only(ask(event)).timeline].count("event written") == 1


def test_of_an_event_that_came_again_since_it_died(shop: Shop, ask: Ask, processor: ProbedProcessor) -> None:
    """The event in the outbox counts. A closed dead letter is not requeued."""
    payment = shop.payment()
    event = shop.dead_letter(payment, payload={"currency": "USD"}, reason="payment_mismatch")
    assert foretold(ask(event), event).verdict.rule == 6
    shop.confirm(payment, event)
    found = foretold(ask(event), event)
    assert (found.occasion, found.verdict.outcome) == (Occasion.DUE, "created")
    assert happened(processor) == {event: meant(found.verdict)}
    assert shop.letter_of(event).state == "settled"
    assert foretold(ask(event), event).occasion is Occasion.DELIVERED


def test_a_suspect_of_crashes_and_one_that_waits(shop: Shop, ask: Ask) -> None:
    _, event = shop.paid(due_in="1 hour")
    shop.rows("UPDATE outbox SET crashes = %s", CRASHES_MAX)
    found = foretold(ask(event), event)
    assert (found.occasion, found.verdict.reason) == (Occasion.POSTPONED, Reason.CRASHED_WORKER)


def test_events_of_others_are_left_alone(shop: Shop, ask: Ask) -> None:
    """Other applications share the outbox."""
    _, event = shop.paid(event_type="LESSON_WATCHED")
    assert foretold(ask(event, ("PURCHASE_CONFIRMED",)), event).occasion is Occasion.NEVER
    assert foretold(ask(event), event).verdict.reason is Reason.UNSUPPORTED_EVENT_TYPE


# --- what is told


def test_the_story_of_a_payment_that_was_lost_and_found(shop: Shop, ask: Ask, processor: ProbedProcessor) -> None:
    payment, event = shop.paid(ago="1 hour")
    shop.mark(event, "created")
    shop.rows("UPDATE processed_events SET processed_at = processed_at - interval '30 minutes'")
    happened(processor)
    (purchase,) = shop.purchases()
    assert [(each.what, each.subject, each.rules) for each in only(ask(payment.id)).timeline] == [
        ("paid", payment.id, ()),
        ("event marked", event, ()),
        ("purchase made", purchase.id, ()),
        ("event settled", event, (9,)),
    ]


def test_the_story_of_a_dead_letter(shop: Shop, ask: Ask, database: Database, tables: Tables) -> None:
    payment = shop.payment(status="pending")
    event = shop.dead_letter(payment, reason="payment_not_succeeded", detail="not yet")
    with database.transaction() as session:
        chosen = Selection(event_ids=[event])
        token = preview(session, tables, chosen).token
        why_ = "because\nthey said so, 2026-01-01 00:00:00.000Z: yes"
        decide_letters(session, tables, chosen, Decision.DISCARD, token=token, actor="ann, of\tfinance", why=why_)
    told = only(ask(payment.id)).timeline
    assert [(each.what, each.rules) for each in told] == [
        ("paid", ()),
        ("event written", ()),
        ("event buried", (7,)),
        ("dead letter discarded", ()),
    ]
    assert told[2].detail == "payment_not_succeeded: not yet (10 attempts)"
    assert told[3].detail == "by ann, of finance: because they said so, 2026-01-01 00:00:00.000Z: yes"
    assert told[3].at == shop.scalar("SELECT date_trunc('milliseconds', resolved_at) FROM dead_letters")


def test_the_story_of_one_who_paid_twice(shop: Shop, ask: Ask, processor: ProbedProcessor) -> None:
    """The story says whose purchase counts.

    After its refund, the second payment gets the purchase.
    """
    first, _ = shop.paid(ago="2 hours")
    second, event = shop.paid(student=first.student_id, course=first.course_id)
    happened(processor)
    story = only(ask(event))
    assert story.payment_id == second.id
    assert story.kind == PaymentClass.DUPLICATE
    assert [each.detail for each in story.timeline if each.what == "purchase made"] == [
        f"of payment {first.id}: it already gives the student this course"
    ]
    refund = shop.refund(first)
    happened(processor)
    told = only(ask(first.id)).timeline
    assert [each.what for each in told if each.subject == refund] == ["event settled"]
    assert "purchase taken back" in [each.what for each in told]
    assert only(ask(second.id)).kind == PaymentClass.ACTIVE


def test_a_student_is_all_their_payments_and_gifts(shop: Shop, ask: Ask) -> None:
    student = uuid4()
    payments = [shop.payment(student=student, ago=f"{hours} hours").id for hours in (3, 2, 1)]
    shop.payment()
    gift = shop.purchase(None, student, uuid4())
    archived = shop.payment(student=student)
    shop.purchase(archived)
    shop.rows("DELETE FROM payments WHERE id = %s", archived.id)
    found = ask(student)
    assert (found.kinds, found.has_more) == (["student"], False)
    assert [story.payment_id for story in found.stories] == [*payments, archived.id]
    assert [each.id for each in found.gifts] == [gift]
    assert found.stories[-1].payment is None
    assert [each.what for each in found.stories[-1].timeline] == ["purchase made"]


@pytest.mark.parametrize("kind", ["bigint", "text"])
def test_students_that_are_known_by_something_else(kind: str, shop: Shop, ask: Ask) -> None:
    for table in ("payments", "purchases"):
        shop.rows(f"ALTER TABLE {table} ALTER student_id TYPE {kind} USING 7")
    payment_id = shop.scalar(
        "INSERT INTO payments (student_id, course_id, amount, currency, status)"
        " VALUES ('7', gen_random_uuid(), 1, 'EUR', 'succeeded') RETURNING id"
    )
    assert only(ask("7")).payment_id == payment_id
    assert [each.occasion for each in only(ask("7")).predictions] == [Occasion.BACKFILL]
    for unknown in ("8", "seven", uuid4(), "", "\N{SNOWMAN}", "9" * 40):
        with pytest.raises(Refused, match="No event, payment, purchase or student has the id"):
            ask(unknown)


def test_of_a_student_with_very_many_payments_the_oldest(shop: Shop, ask: Ask) -> None:
    student = uuid4()
    shop.rows(
        "INSERT INTO payments (student_id, course_id, amount, currency, status, created_at)"
        " SELECT %s, gen_random_uuid(), 1, 'EUR', 'succeeded', clock_timestamp() - i * interval '1 hour'"
        " FROM generate_series(1, 101) AS i",
        student,
    )
    found = ask(student)
    assert (len(found.stories), found.has_more) == (100, True)
    newest = shop.scalar("SELECT id FROM payments ORDER BY created_at DESC LIMIT 1")
    assert newest not in {story.payment_id for story in found.stories}


def test_an_id_may_be_several_things(shop: Shop, ask: Ask) -> None:
    """Many producers use the id of the payment as the id of the event."""
    payment = shop.payment()
    shop.confirm(payment, payment.id)
    found = ask(payment.id)
    assert found.kinds == ["event", "payment"]
    assert only(found).payment_id == payment.id


def test_an_event_between_two_payments_is_told_of_both(shop: Shop, ask: Ask) -> None:
    marked, named = shop.payment(), shop.payment()
    event = shop.confirm(named)
    shop.mark(event, "created", marked.id)
    found = ask(event)
    assert {story.payment_id for story in found.stories} == {marked.id, named.id}
    assert foretold(found, event).verdict.rule == 3
    assert all({"event written", "event settled"} <= {each.what for each in story.timeline} for story in found.stories)


@pytest.mark.parametrize("column", TYPES)
def test_an_event_that_names_no_payment(column: str, shop: Shop, ask: Ask) -> None:
    retype(shop, column)
    event = shop.rows(
        f"INSERT INTO outbox (event_id, event_type, payload) VALUES (gen_random_uuid(), 'PURCHASE_CONFIRMED',"
        f" CAST('{{\"payment_id\": 7}}' AS {column})) RETURNING event_id"
    )[0].event_id
    story = only(ask(event))
    assert (story.payment_id, story.payment) == (None, None)
    assert [each.verdict.rule for each in story.predictions] == [2]


def test_a_payment_that_only_an_event_names(shop: Shop, ask: Ask) -> None:
    payment = shop.payment()
    event = shop.confirm(payment)
    shop.rows("DELETE FROM payments")
    for asked in (event, payment.id, str(payment.id).upper()):
        story = only(ask(asked))
        assert (story.payment_id, story.payment, story.kind) == (payment.id, None, None)
        assert [each.verdict.rule for each in story.predictions] == [5]


def test_times_that_no_client_can_read(shop: Shop, ask: Ask) -> None:
    payment, event = shop.paid()
    shop.rows("UPDATE payments SET created_at = '-infinity'")
    shop.rows("UPDATE outbox SET created_at = 'infinity', due_at = '-infinity', attempts = 1")
    assert [each.at for each in only(ask(event)).timeline] == [None, None, None]
    assert foretold(ask(payment.id), event).occasion is Occasion.DUE


def test_it_changes_nothing(shop: Shop, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command cannot change anything, because its transaction is READ ONLY."""
    payment, _ = shop.paid()

    def write_instead(session: Any, *_: object) -> None:
        session.connection().exec_driver_sql("DELETE FROM payments")

    monkeypatch.setattr(why, "look_up", write_instead)
    with pytest.raises(DBAPIError) as caught:
        ask(payment.id)
    assert sqlstate(caught.value) == "25006"
