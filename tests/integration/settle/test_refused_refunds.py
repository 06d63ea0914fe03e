"""Refunds that the database refuses, and the unique key on payments that refunds need."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

import pytest
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import Failure, classify
from outbox_worker.errors import KeyMissing
from outbox_worker.model import PURCHASE_REFUNDED, Outcome, Reason
from outbox_worker.schema.requirements import find_problems
from outbox_worker.schema.tables import Tables
from tests.support.factories import Clerk, ProbedProcessor, Shop, drain_all, hold_pair
from tests.support.interleaving import errors
from tests.support.makers import Connect, MakeDatabase, MakeProcessor
from tests.support.settling import LAST, bought, metric, settle

pytestmark = pytest.mark.usefixtures("both_guards")


# --- what the database refuses


class Refusal(NamedTuple):
    sqlstate: str
    schema: str
    """How the schema refuses to deactivate a purchase of the course BAD."""
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
    """One purchase was deactivated before. That does not prove that the database is healthy."""
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
    """PostgreSQL checks the privilege even if a refund has nothing to write.

    A refund with nothing to write does not prove that the other refund is at fault.
    """
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
    """The start demands the key that the statement needs, and prints a remedy.

    The key must be full, or partial for rows with a payment.
    """
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
    """After some executions the statement is prepared, then planned generically.

    The statement still finds its key.
    """
    payments = [bought(shop)[0] for _ in range(30)]
    next_payments = [shop.payment("succeeded", *payment.pair) for payment in payments]
    for payment in payments:
        shop.refund(payment)
    processor = make_processor(batch_size=1, database=make_database(connections=1))
    assert drain_all(processor) == {Outcome.REVOKED: 30}
    assert {row.payment_id for row in shop.purchases() if row.is_active} == {heir.id for heir in next_payments}
    assert errors(processor) == {}
