"""A trigger on purchases can change a row.

If the row differs from what was paid, the worker does not report ``created``.
"""

from __future__ import annotations

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.model import Outcome, Reason
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.store.guard import GuardState
from tests.support.backfilling import Operator
from tests.support.factories import ProbedProcessor, Shop, drain_all
from tests.support.makers import MakeProcessor

LAST = 9
CHANGES = {
    "is_active": "NEW.is_active := false",
    "student_id": "NEW.student_id := gen_random_uuid()",
    "course_id": "NEW.course_id := gen_random_uuid()",
    "payment_id": "NEW.payment_id := gen_random_uuid()",
}
AFTER = "UPDATE purchases SET is_active = false WHERE id = NEW.id"
SPOILT = "NEW.currency = 'BAD'"


def spoil(shop: Shop, change: str, when: str = SPOILT, moment: str = "BEFORE INSERT") -> None:
    """Put a trigger on purchases that changes rows for which ``when`` is true."""
    shop.rows(
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$"
        f" BEGIN IF {when} THEN {change}; END IF; RETURN NEW; END $$"
    )
    shop.rows(f"CREATE TRIGGER spoil {moment} ON purchases FOR EACH ROW EXECUTE FUNCTION spoil()")


def probed(processor: ProbedProcessor) -> GuardState:
    """Return what the worker finds at its next look."""
    with processor.database.transaction() as session:
        return processor.watch.probe(session)


@pytest.mark.usefixtures("both_guards")
@pytest.mark.parametrize("change", [*CHANGES, "after"])
def test_a_purchase_that_a_trigger_changed_is_refused_and_its_neighbours_are_created(
    shop: Shop, processor: ProbedProcessor, change: str
) -> None:
    if change == "after":
        spoil(shop, AFTER, moment="AFTER INSERT")
    else:
        spoil(shop, CHANGES[change])
    (_, good), (spoilt, bad), (_, other) = (shop.paid(currency=each) for each in ("EUR", "BAD", "EUR"))
    probed(processor)
    assert drain_all(processor) == {Outcome.CREATED: 2, Outcome.RETRIED: 1}
    assert {shop.outcome_of(good), shop.outcome_of(other)} == {Outcome.CREATED}
    assert shop.outcome_of(bad) is None
    waiting = shop.event(bad)
    column = "is_active" if change == "after" else change
    assert (waiting.attempts, waiting.last_error) == (
        1,
        f"{Reason.REJECTED_BY_DATABASE}: a trigger on public.purchases changed the purchase: {column}",
    )
    assert shop.scalar("SELECT count(*) FROM purchases WHERE currency = 'BAD'") == 0
    assert shop.purchases(spoilt) == []


def test_in_the_end_it_becomes_a_dead_letter(shop: Shop, processor: ProbedProcessor) -> None:
    spoil(shop, CHANGES["is_active"], when="true")
    _, event = shop.paid(attempts=LAST)
    probed(processor)
    assert drain_all(processor) == {Outcome.DEAD: 1}
    letter = shop.letter_of(event)
    assert letter.reason == Reason.REJECTED_BY_DATABASE
    assert "changed the purchase: is_active" in letter.detail


def test_a_trigger_that_changes_nothing_costs_nobody_a_purchase(shop: Shop, processor: ProbedProcessor) -> None:
    spoil(shop, "NEW.created_at := now()", when="true")
    shop.pay_many(5)
    assert probed(processor).triggers_on == {"INSERT"}
    assert drain_all(processor) == {Outcome.CREATED: 5}


def test_the_trigger_is_noticed_while_the_worker_runs(shop: Shop, processor: ProbedProcessor) -> None:
    assert not probed(processor).triggers_on
    spoil(shop, "NULL", moment="BEFORE UPDATE OR INSERT")
    assert probed(processor).triggers_on == {"INSERT", "UPDATE"}
    shop.rows("ALTER TABLE purchases DISABLE TRIGGER spoil")
    assert not probed(processor).triggers_on


@pytest.mark.parametrize("has_purchase", [True, False], ids=["updated", "inserted"])
def test_a_refund_that_a_trigger_undoes_is_not_told_as_revoked(
    shop: Shop, processor: ProbedProcessor, has_purchase: bool
) -> None:
    payment = shop.payment()
    if has_purchase:
        shop.purchase(payment)
    spoil(shop, "NEW.is_active := true", when="true", moment="BEFORE INSERT OR UPDATE")
    refund = shop.refund(payment)
    probed(processor)
    assert drain_all(processor) == {Outcome.RETRIED: 1}
    assert "changed the purchase: is_active" in shop.event(refund).last_error


def test_the_grant_to_the_next_payer_is_read_back(shop: Shop, processor: ProbedProcessor) -> None:
    first = shop.payment()
    shop.purchase(first)
    heir = shop.payment(student=first.student_id, course=first.course_id, currency="BAD")
    shop.refund(first)
    spoil(shop, CHANGES["is_active"])
    probed(processor)
    drain_all(processor)
    assert shop.purchases(heir) == []


def test_a_backfill_reads_its_purchases_back(
    shop: Shop, database: Database, tables: Tables, settings: Settings
) -> None:
    good, bad = shop.payment(), shop.payment(currency="BAD")
    spoil(shop, CHANGES["is_active"])
    report = Operator(database, tables, settings).run()
    assert [each.payment_id for each in report.made.created] == [good.id]
    assert [each.payment.payment_id for each in report.made.refused] == [bad.id]
    assert "changed the purchase: is_active" in report.made.refused[0].detail
    assert shop.purchases(bad) == []


def test_a_deferred_trigger_that_looks_at_the_mark_finds_it(
    both_guards: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    """The worker knows the trigger from its start.

    The trigger must run after the mark is written, as at COMMIT.
    """
    unmarked = "NOT EXISTS (SELECT FROM processed_events WHERE payment_id = NEW.payment_id)"
    shop.rows(
        "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN IF {unmarked} THEN RAISE EXCEPTION 'no mark'; END IF; RETURN NEW; END $$;"
        "CREATE CONSTRAINT TRIGGER look AFTER INSERT ON purchases DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION look()"
    )
    processor = make_processor()
    shop.pay_many(3)
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 3}
    assert processor.watch.state.guard == both_guards
