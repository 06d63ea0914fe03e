"""The database refuses to record what became of one event. All other events are still settled."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest

from outbox_worker.errors import NothingRecorded, Swallowed
from outbox_worker.model import Outcome
from outbox_worker.store.set_aside import UNRECORDED_MAX
from tests.support.factories import Payment, ProbedProcessor, Shop
from tests.support.makers import MakeProcessor
from tests.support.settling import LAST, metric, settle

NEIGHBOURS = 6


class Way(NamedTuple):
    """How the schema refuses the row of one event.

    The ``outbox.id`` of the event replaces ``{id}``.
    """

    schema: str
    told: str = ""
    """What the worker must name when it sets the event aside."""


def trigger(event: str, body: str, timing: str = "BEFORE", table: str = "outbox") -> str:
    kind = "CONSTRAINT TRIGGER" if "DEFERRED" in timing else "TRIGGER"
    when, _, deferred = timing.partition(" ")
    return (
        f"CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;"
        f"CREATE {kind} odd {when} {event} ON {table} {deferred} FOR EACH ROW EXECUTE FUNCTION odd()"
    )


RAISES = "IF OLD.id = {id} THEN RAISE EXCEPTION 'on hold'; END IF; RETURN OLD;"
RAISES_ODDLY = "IF OLD.id = {id} THEN RAISE EXCEPTION 'on hold' USING ERRCODE = '42501'; END IF; RETURN OLD;"
SWALLOWS = "IF OLD.id = {id} THEN RETURN NULL; END IF; RETURN OLD;"
LOG = (
    "CREATE TABLE delivery_log (outbox_id bigint NOT NULL REFERENCES outbox (id) {more});"
    "INSERT INTO delivery_log VALUES ({id})"
)

UNREMOVABLE = {
    "foreign key": Way(LOG.replace("{more}", ""), "delivery_log_outbox_id_fkey"),
    "foreign key at COMMIT": Way(LOG.replace("{more}", "DEFERRABLE INITIALLY DEFERRED"), "delivery_log_outbox_id_fkey"),
    "trigger": Way(trigger("DELETE", RAISES), "the trigger odd"),
    "trigger, unclear": Way(trigger("DELETE", RAISES_ODDLY), "the trigger odd"),
    "trigger at COMMIT": Way(trigger("DELETE", RAISES, "AFTER DEFERRABLE INITIALLY DEFERRED"), "the trigger odd"),
    "trigger that swallows": Way(trigger("DELETE", SWALLOWS), "the trigger odd"),
    "rule": Way("CREATE RULE odd AS ON DELETE TO outbox WHERE OLD.id = {id} DO INSTEAD NOTHING", "the rule odd"),
}


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("name", UNREMOVABLE)
def test_an_event_whose_row_stays_has_its_purchase_and_its_mark(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]], name: str
) -> None:
    events = pay_some(shop, bad_at=2)
    payment, bad = events[2]
    forbid(shop, UNREMOVABLE[name], bad)
    assert settle(processor) == {event: Outcome.CREATED for _, event in events if event != bad}
    assert (shop.purchases(payment), left(shop)) == ([], [(bad, 0, None)]), "the cause may end by itself"
    (told,) = [record for record in records if record.get("event") == "events_set_aside"]
    assert (told["count"], told["outbox_ids"]) == (1, [shop.event(bad).id])
    assert UNREMOVABLE[name].told in told["refusals"][0]
    late = shop.paid()[1]
    assert settle(processor) == {late: Outcome.CREATED}, "no claim takes what is set aside"
    for outcome in (Outcome.CREATED, Outcome.ALREADY_EXISTS):
        release(processor)
        assert settle(processor) == {bad: outcome}
        assert [row.is_active for row in shop.purchases(payment)] == [True]
        assert (shop.outcome_of(bad), left(shop)) == ("created", [(bad, 0, None)])
    assert (shop.count("purchases"), shop.doubled()) == (NEIGHBOURS + 2, 0)


def test_a_drain_does_not_wait_until_a_row_can_be_removed(shop: Shop, processor: ProbedProcessor) -> None:
    events = pay_some(shop, bad_at=2)
    forbid(shop, UNREMOVABLE["foreign key"], events[2][1])
    report = processor.process_batch(shop.scalar("SELECT now()"))
    assert report.outcomes() == {Outcome.CREATED: NEIGHBOURS + 1}
    assert left(shop) == [(events[2][1], 0, None)]


def test_a_row_that_can_be_removed_after_all_is_an_event_like_any_other(shop: Shop, processor: ProbedProcessor) -> None:
    events = pay_some(shop, bad_at=2)
    _, bad = events[2]
    forbid(shop, UNREMOVABLE["foreign key"], bad)
    processor.process_batch()
    shop.rows("DELETE FROM delivery_log")
    release(processor)
    assert settle(processor) == {bad: Outcome.CREATED}
    assert (shop.count("outbox"), aside(processor), processor._pacing.set_aside.known) == (0, [], set())


def test_a_row_that_a_trigger_of_the_purchase_deletes_is_removed(shop: Shop, processor: ProbedProcessor) -> None:
    delete = "DELETE FROM outbox WHERE payload ->> 'payment_id' = CAST(NEW.payment_id AS text); RETURN NEW;"
    shop.rows(trigger("INSERT", delete, "AFTER", "purchases"))
    events = pay_some(shop, bad_at=0)
    assert settle(processor) == {event: Outcome.CREATED for _, event in events}
    assert (shop.count("outbox"), aside(processor)) == (0, [])


@pytest.mark.parametrize("body", [RAISES.replace("OLD.id = {id}", "true"), "RETURN NULL;"])
def test_a_trigger_against_every_removal_is_the_databases(shop: Shop, processor: ProbedProcessor, body: str) -> None:
    """No purchase is made, no event is lost or charged, and the error names the trigger."""
    events = pay_some(shop, bad_at=0)
    was = shop.rows("SELECT * FROM outbox ORDER BY id")
    shop.rows(trigger("DELETE", body))
    for _ in range(3):
        with pytest.raises(NothingRecorded, match="the trigger odd"):
            processor.process_batch()
    assert (shop.rows("SELECT * FROM outbox ORDER BY id"), shop.purchases()) == (was, [])
    assert aside(processor) == []
    shop.rows("DROP TRIGGER odd ON outbox")
    assert settle(processor) == {event: Outcome.CREATED for _, event in events}


# --- the try cannot be counted

PARTITIONED = (
    "CREATE TABLE parts (LIKE outbox INCLUDING DEFAULTS, PRIMARY KEY (id, due_at)) PARTITION BY RANGE (due_at);"
    "CREATE SEQUENCE ids; ALTER TABLE parts ALTER id SET DEFAULT nextval('ids');"
    "CREATE TABLE today PARTITION OF parts FOR VALUES FROM (MINVALUE) TO ('{soon}');"
    "INSERT INTO parts SELECT * FROM outbox; DROP TABLE outbox; ALTER TABLE parts RENAME TO outbox"
)
NO_UPDATE = "IF NEW.id = {id} THEN RAISE EXCEPTION 'on hold'; END IF; RETURN NEW;"
CHARGED = (1, True)
"""The try is counted, but its text is not recorded."""
UNCHARGED = (0, True)
"""The event is postponed and otherwise unchanged."""
ASIDE = (0, False)
"""The row of the event does not change."""

UNCHARGEABLE = {
    "short text": ("ALTER TABLE outbox ALTER last_error TYPE varchar(12)", CHARGED),
    "check on the text": ("ALTER TABLE outbox ADD CHECK (last_error NOT LIKE '%:%')", CHARGED),
    "check on attempts": ("ALTER TABLE outbox ADD CHECK (attempts < 1)", UNCHARGED),
    "trigger on attempts": (
        trigger("UPDATE", "IF NEW.attempts > OLD.attempts THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW;"),
        UNCHARGED,
    ),
    "trigger": (trigger("UPDATE", NO_UPDATE), ASIDE),
    "trigger at COMMIT": (trigger("UPDATE", NO_UPDATE, "AFTER DEFERRABLE INITIALLY DEFERRED"), ASIDE),
    "trigger that swallows": (trigger("UPDATE", "IF NEW.id = {id} THEN RETURN NULL; END IF; RETURN NEW;"), ASIDE),
    "rule": ("CREATE RULE odd AS ON UPDATE TO outbox WHERE OLD.id = {id} DO INSTEAD NOTHING", ASIDE),
    "check on the due time": ("ALTER TABLE outbox ADD CHECK (due_at < '{soon}') NOT VALID", ASIDE),
    "missing partition": (PARTITIONED, ASIDE),
}


@pytest.mark.parametrize("name", UNCHARGEABLE)
def test_an_event_that_cannot_be_charged_stops_no_other(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]], name: str
) -> None:
    schema, (attempts, is_later) = UNCHARGEABLE[name]
    events = pay_some(shop, bad_at=None)
    bad = shop.confirm(Payment(uuid4(), uuid4(), uuid4(), "1.00", "EUR"))
    forbid(shop, Way(schema), bad)
    expected = {event: Outcome.CREATED for _, event in events}
    assert settle(processor) == expected | ({bad: Outcome.RETRIED} if attempts else {})
    row = shop.event(bad)
    assert (row.attempts, row.due_at > shop.scalar("SELECT now()"), row.last_error) == (attempts, is_later, None)
    told = Counter(record["event"] for record in records if "refusals" in record)
    assert told == ({} if attempts else {"outcome_not_recorded": 1} if is_later else {"events_set_aside": 1})
    late = shop.paid()[1]
    assert settle(processor) == {late: Outcome.CREATED}
    assert aside(processor) == ([] if is_later else [row.id])


# --- the dead letter cannot be written

LETTER = "ALTER TABLE dead_letters "
UNBURIABLE = {
    "short text": (LETTER + "ALTER detail TYPE varchar(5)", Outcome.DEAD),
    "check on the text": (LETTER + "ADD CHECK (detail = '')", Outcome.DEAD),
    "not null": (LETTER + "ADD priority int NOT NULL", None),
    "check": (LETTER + "ADD CHECK (attempts < 5)", None),
    "unique": (
        LETTER + "ADD team int UNIQUE DEFAULT 1; INSERT INTO dead_letters (event_id, event_type, payload,"
        " created_at, attempts, reason, detail) VALUES (gen_random_uuid(), 'X', '{{}}', now(), 1, 'x', '')",
        None,
    ),
    "alarm trigger": (trigger("INSERT", "RAISE EXCEPTION 'alarm';", table="dead_letters"), None),
    "alarm trigger at COMMIT": (
        trigger("INSERT", "RAISE EXCEPTION 'alarm';", "AFTER DEFERRABLE INITIALLY DEFERRED", "dead_letters"),
        None,
    ),
    "trigger that swallows": (trigger("INSERT", "RETURN NULL;", table="dead_letters"), None),
    "trigger that deletes": (
        trigger(
            "INSERT", "DELETE FROM dead_letters WHERE event_id = NEW.event_id; RETURN NULL;", "AFTER", "dead_letters"
        ),
        None,
    ),
    "trigger that deletes at COMMIT": (
        trigger(
            "INSERT",
            "DELETE FROM dead_letters WHERE event_id = NEW.event_id; RETURN NULL;",
            "AFTER DEFERRABLE INITIALLY DEFERRED",
            "dead_letters",
        ),
        None,
    ),
    "trigger that closes": (trigger("INSERT", "NEW.state := 'settled'; RETURN NEW;", table="dead_letters"), None),
    "trigger that changes the reason": (
        trigger("INSERT", "NEW.reason := 'other'; RETURN NEW;", table="dead_letters"),
        None,
    ),
    "row that stays": (trigger("DELETE", RAISES), Outcome.DEAD),
}


@pytest.mark.parametrize("name", UNBURIABLE)
def test_an_event_that_cannot_be_buried_stops_no_other(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]], name: str
) -> None:
    schema, outcome = UNBURIABLE[name]
    events = pay_some(shop, bad_at=None)
    bad = shop.confirm(Payment(uuid4(), uuid4(), uuid4(), "1.00", "EUR"), attempts=LAST)
    forbid(shop, Way(schema), bad)
    assert settle(processor) == {event: Outcome.CREATED for _, event in events} | ({bad: outcome} if outcome else {})
    letter, row, stays = shop.letter_of(bad), shop.event(bad), name == "row that stays"
    if outcome:
        assert (letter.state, letter.reason, letter.detail) == ("open", "payment_not_found", "")
    else:
        assert (letter, row.attempts, row.due_at > shop.scalar("SELECT now()")) == (None, LAST, True)
    assert (row is None) == (outcome is Outcome.DEAD and not stays)
    told = Counter(record["event"] for record in records if "refusals" in record)
    assert told == ({"outcome_not_recorded": 1} if not outcome else {"events_set_aside": 1} if stays else {})
    assert metric(processor, "outbox_dead_letters_total", reason="payment_not_found") == (outcome is not None)


def test_an_event_that_can_never_be_recorded_is_told_to_everybody_after_a_while(
    shop: Shop, processor: ProbedProcessor
) -> None:
    """The event is set aside like an event whose row cannot be changed.

    ``status`` and ``doctor`` show it, and why.
    """
    bad = shop.confirm(Payment(uuid4(), uuid4(), uuid4(), "1.00", "EUR"), attempts=LAST)
    forbid(shop, Way(UNBURIABLE["trigger that deletes"][0]), bad)
    key = shop.event(bad).id
    for turn in range(UNRECORDED_MAX):
        assert aside(processor) == []
        _, good = shop.paid()
        assert settle(processor)[good] is Outcome.CREATED
        assert shop.event(bad).attempts == LAST, turn
        shop.make_due()
    assert aside(processor) == [key]
    assert "INSERT on public.dead_letters" in processor._pacing.set_aside.refusals()[str(key)]
    shop.rows("DROP FUNCTION odd() CASCADE")
    release(processor)
    assert settle(processor) == {bad: Outcome.DEAD}
    assert aside(processor) == []


# --- many events


def test_many_that_cannot_be_charged_are_found_step_by_step(shop: Shop, make_processor: MakeProcessor) -> None:
    """Every second of forty events cannot be updated.

    The other events are charged within the savepoints of a transaction.
    """
    processor = make_processor(batch_size=40)
    events = [shop.confirm(Payment(uuid4(), uuid4(), uuid4(), "1.00", "EUR")) for _ in range(40)]
    shop.rows(trigger("UPDATE", "IF NEW.id % 2 = 0 THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW;"))
    for _ in range(60):
        if not processor.process_batch().batch:
            break
    charged = {row.event_id for row in shop.rows("SELECT event_id FROM outbox WHERE attempts = 1")}
    odd = {row.event_id for row in shop.rows("SELECT event_id FROM outbox WHERE id % 2 = 1")}
    assert charged == odd
    assert aside(processor) == [row.id for row in shop.rows("SELECT id FROM outbox WHERE id % 2 = 0")]
    assert len(events) == shop.count("outbox")


def test_many_that_cannot_be_recorded_do_not_delay_the_others(shop: Shop, make_processor: MakeProcessor) -> None:
    """Events that cannot be recorded are found one by one, in many transactions.

    Between these transactions full batches of clean events are settled.
    """
    for _ in range(60):
        shop.confirm(Payment(uuid4(), uuid4(), uuid4(), "1.00", "EUR"), attempts=LAST)
    shop.connection.execute(UNBURIABLE["trigger that deletes"][0])
    shop.pay_many(120)
    processor = make_processor(batch_size=100)
    processor.set_target(0.0)
    reports = [processor.process_batch() for _ in range(4)]
    assert sum(report.created for report in reports) == 120
    assert shop.count("outbox") == 60, "they wait until their letters can be written"
    assert sum(len(report.postponed) for report in reports) < 60, "which takes longer"


def test_more_than_a_worker_may_set_aside_is_the_databases(
    shop: Shop, processor: ProbedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_worker.store.set_aside.MOST", 2)
    events = pay_some(shop, bad_at=None)
    shop.rows(trigger("DELETE", f"IF OLD.id <= {2} THEN RETURN NULL; END IF; RETURN OLD;"))
    assert len(settle(processor)) == len(events) - 2
    third = [shop.paid()[1] for _ in range(2)]
    shop.rows(
        "CREATE OR REPLACE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF OLD.event_id = '{third[0]}' THEN RETURN NULL; END IF; RETURN OLD; END $$"
    )
    with pytest.raises(NothingRecorded, match="more than"):
        processor.process_batch()
    assert shop.mark_of(third[0]) is shop.mark_of(third[1]) is None
    shop.rows("DROP TRIGGER odd ON outbox")
    assert set(settle(processor)) == set(third)
    assert len(aside(processor)) == 2


def test_a_mark_that_is_swallowed_for_one_event_is_that_events(shop: Shop, processor: ProbedProcessor) -> None:
    events = pay_some(shop, bad_at=2)
    payment, bad = events[2]
    shop.rows(
        trigger("INSERT", f"IF NEW.event_id = '{bad}' THEN RETURN NULL; END IF; RETURN NEW;", table="processed_events")
    )
    assert settle(processor) == {event: Outcome.CREATED for _, event in events} | {bad: Outcome.RETRIED}
    assert (shop.purchases(payment), shop.event(bad).attempts) == ([], 1)
    assert "INSERT on public.processed_events changed 0 of 1 rows" in shop.event(bad).last_error


def test_marks_that_are_swallowed_for_all_are_the_databases(shop: Shop, processor: ProbedProcessor) -> None:
    pay_some(shop, bad_at=None)
    shop.rows(trigger("INSERT", "RETURN NULL;", table="processed_events"))
    with pytest.raises(Swallowed):
        processor.process_batch()
    assert shop.purchases() == []


# --- helpers


def pay_some(shop: Shop, bad_at: int | None) -> list[tuple[Payment, UUID]]:
    """Write payments with their events, and one more if one is to be refused."""
    return [shop.paid() for _ in range(NEIGHBOURS + (bad_at is not None))]


def forbid(shop: Shop, way: Way, event: UUID) -> None:
    key = shop.event(event).id
    soon = shop.scalar("SELECT CAST(now() + interval '9 seconds' AS text)")
    shop.connection.execute(
        way.schema.replace("{id}", str(key)).replace("{soon}", soon).replace("{{}}", "{}"), prepare=False
    )


def release(processor: ProbedProcessor) -> None:
    """Let so much time pass that the events are no longer set aside."""
    processor._pacing.set_aside.release_old(1e12)


def aside(processor: ProbedProcessor) -> list[int]:
    return list(processor._pacing.set_aside.ids)


def left(shop: Shop) -> list[Any]:
    return [tuple(row) for row in shop.rows("SELECT event_id, attempts, last_error FROM outbox ORDER BY id")]
