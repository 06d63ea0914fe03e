"""A decision about a dead letter is done only if its rows were written: the result is checked."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from sqlalchemy import JSON, Text

from outbox_worker.database.engine import Database
from outbox_worker.schema.tables import Tables
from outbox_worker.store.dead_letters import DecidedLetters, Decision, Selection, decide_letters, preview
from tests.support.factories import Shop
from tests.support.oddities import let_be_null

SWALLOW = "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} RETURN NEW; END $$"


def decide(database: Database, tables: Tables, decision: Decision, *ids: UUID) -> DecidedLetters:
    with database.transaction() as session:
        chosen = Selection(event_ids=ids)
        token = preview(session, tables, chosen).token
        return decide_letters(session, tables, chosen, decision, token=token, actor="ann", why="again")


def states(shop: Shop) -> dict[UUID, str]:
    return {row.event_id: row.state for row in shop.rows("SELECT event_id, state FROM dead_letters")}


def trigger(shop: Shop, table: str, timing: str, body: str) -> None:
    shop.rows(SWALLOW.format(body))
    shop.rows(f"CREATE TRIGGER swallow {timing} ON {table} FOR EACH ROW EXECUTE FUNCTION swallow()")


def test_rows_of_others_without_an_id_do_not_hide_it(database: Database, tables: Tables, shop: Shop) -> None:
    let_be_null(shop)
    shop.rows("INSERT INTO outbox (event_id, event_type, payload) VALUES (NULL, 'MAIL_SENT', '{}')")
    event = shop.dead_letter(shop.payment())
    assert decide(database, tables, Decision.REQUEUE, event) == (1, [])
    assert shop.event(event).event_type == "PURCHASE_CONFIRMED"


@pytest.mark.parametrize("other", ["payment", "type", "due time"])
def test_another_event_under_its_id(other: str, database: Database, tables: Tables, shop: Shop) -> None:
    """The outbox has another event with this id, or an event that no worker ever claims.

    The dead letter stays open.
    """
    let_be_null(shop)
    payment, sound = shop.payment(), shop.dead_letter(shop.payment())
    event = shop.dead_letter(payment)
    named = shop.payment() if other == "payment" else payment
    shop.confirm(named, event, event_type="PURCHASE_REFUNDED" if other == "type" else "PURCHASE_CONFIRMED")
    if other == "due time":
        shop.rows("UPDATE outbox SET due_at = NULL")
    before = shop.event(event)
    decided = decide(database, tables, Decision.REQUEUE, event, sound)
    assert (decided.done, [each.event_id for each in decided.refused]) == (1, [event])
    assert "another event with this id" in decided.refused[0].reason
    assert states(shop) == {event: "open", sound: "requeued"}
    assert shop.event(event) == before
    assert shop.event(sound) is not None


@pytest.mark.parametrize("kind", ["swallowed", "refused", "never due"])
def test_an_outbox_that_does_not_take_it(kind: str, database: Database, tables: Tables, shop: Shop) -> None:
    let_be_null(shop)
    odd, *sound = [shop.dead_letter(shop.payment()) for _ in range(4)]
    does = {
        "swallowed": "RETURN NULL;",
        "refused": "RAISE EXCEPTION 'no';",
        "never due": "NEW.due_at = NULL;",
    }[kind]
    trigger(shop, "outbox", "BEFORE INSERT", f"IF NEW.event_id = '{odd}' THEN {does} END IF;")
    decided = decide(database, tables, Decision.REQUEUE, odd, *sound)
    assert (decided.done, [each.event_id for each in decided.refused]) == (3, [odd])
    assert states(shop) == {odd: "open"} | dict.fromkeys(sound, "requeued")
    assert {row.event_id for row in shop.rows("SELECT event_id FROM outbox")} == set(sound)


@pytest.mark.parametrize("decision", Decision)
def test_a_letter_that_cannot_be_closed(decision: Decision, database: Database, tables: Tables, shop: Shop) -> None:
    odd, sound = (shop.dead_letter(shop.payment()) for _ in range(2))
    trigger(shop, "dead_letters", "BEFORE UPDATE", f"IF NEW.event_id = '{odd}' THEN RETURN NULL; END IF;")
    decided = decide(database, tables, decision, odd, sound)
    assert (decided.done, [each.event_id for each in decided.refused]) == (1, [odd])
    assert states(shop)[odd] == "open"
    assert shop.event(odd) is None, "an event whose letter is open is not in the outbox as well"


@pytest.mark.parametrize("column", ["json", "text"])
def test_documents(column: str, database: Database, tables: Tables, shop: Shop) -> None:
    """The payment is read from the document in the outbox and in the dead letter."""
    shop.rows(f"ALTER TABLE outbox ALTER COLUMN payload TYPE {column} USING payload::text::{column}")
    typed = tables.with_documents(JSON() if column == "json" else Text())
    payment = shop.payment()
    event = shop.dead_letter(payment, payload=f'"{{\\"payment_id\\": \\"{payment.id}\\"}}"')
    assert decide(database, typed, Decision.REQUEUE, event) == (1, [])
    assert str(payment.id) in str(shop.event(event).payload)


def test_a_letter_that_is_already_in_the_outbox(database: Database, tables: Tables, shop: Shop) -> None:
    payment = shop.payment()
    event = shop.dead_letter(payment)
    shop.confirm(payment, event, due_in="1 hour")
    assert decide(database, tables, Decision.REQUEUE, event) == (1, [])
    assert decide(database, tables, Decision.DISCARD, *[shop.dead_letter(event_id=uuid4())]) == (1, [])
