"""The claim: what it takes, in which order, by which clock."""

from __future__ import annotations

import time
from datetime import date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event as listener

from outbox_worker.database.engine import Database
from outbox_worker.database.planner import INDEX_PLANS
from outbox_worker.model import Event, Outcome
from outbox_worker.schema.tables import Tables
from outbox_worker.store.outbox import Outbox
from tests.support.factories import Shop, drain_all
from tests.support.makers import Connect, MakeDatabase, MakeProcessor


@pytest.fixture
def outbox(tables: Tables) -> Outbox:
    return Outbox(tables, None)


def claim(database: Database, outbox: Outbox, limit: int = 1000, until: datetime | None = None) -> list[Event]:
    """Return the events that one transaction claims. The transaction is rolled back."""
    with database.transaction(**INDEX_PLANS) as session:
        events = list(outbox.claim(session, limit, until).batch.values())
        session.rollback()
    return events


def event_ids(events: list[Event]) -> list[UUID]:
    return [UUID(event.event_id) for event in events]


# --- rows that other transactions have locked


@pytest.mark.parametrize("strength", ["UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE"])
def test_a_row_that_somebody_holds_is_skipped_and_its_neighbours_are_claimed(
    strength: str, shop: Shop, connect: Connect, make_database: MakeDatabase, outbox: Outbox
) -> None:
    """The claim skips each row that would make its DELETE wait.

    The share lock of a foreign key is enough for that.
    """
    events = [shop.paid(due_in=f"-{9 - n} minutes")[1] for n in range(5)]
    holder = connect()
    holder.execute(f"SELECT FROM outbox WHERE event_id = ANY(%s) FOR {strength}", [[events[0], events[2]]])
    impatient = make_database(deadline_seconds=2)
    assert event_ids(claim(impatient, outbox)) == [events[1], events[3], events[4]]
    assert event_ids(claim(impatient, outbox, limit=2)) == [events[1], events[3]]
    holder.rollback()
    assert event_ids(claim(impatient, outbox)) == events


def test_two_claims_share_the_queue(shop: Shop, make_database: MakeDatabase, outbox: Outbox) -> None:
    shop.pay_many(30)
    database = make_database(deadline_seconds=2)
    with database.transaction(**INDEX_PLANS) as one, database.transaction(**INDEX_PLANS) as two:
        first = outbox.claim(one, 20).batch
        second = outbox.claim(two, 20).batch
        assert len(first) == 20
        assert len(second) == 10
        assert not first.keys() & second.keys()
        one.rollback()
        assert outbox.claim(two, 100).batch.keys() == first.keys() | second.keys()


def test_a_claim_that_is_rolled_back_leaves_no_trace(shop: Shop, database: Database, outbox: Outbox) -> None:
    shop.pay_many(3)
    before = shop.rows("SELECT *, xmin::text FROM outbox ORDER BY id")
    for _ in range(3):
        assert len(claim(database, outbox)) == 3
    assert shop.rows("SELECT *, xmin::text FROM outbox ORDER BY id") == before


# --- order and time


def test_the_oldest_due_comes_first_then_the_smaller_id(shop: Shop, database: Database, outbox: Outbox) -> None:
    """The ids run against the times, and five events have the same due time."""
    late = [shop.paid(due_in=f"-{n} minutes")[1] for n in range(10, 15)]
    same = [shop.paid()[1] for _ in range(5)]
    shop.rows("UPDATE outbox SET due_at = clock_timestamp() - interval '1 hour' WHERE event_id = %s", same[3])
    shop.rows("UPDATE outbox SET due_at = now() - interval '12.5 minutes' WHERE event_id = ANY(%s)", same)
    moved = shop.rows("SELECT event_id FROM outbox WHERE event_id = ANY(%s) ORDER BY id", same)
    expected = [late[4], late[3], *(row.event_id for row in moved), late[2], late[1], late[0]]
    assert [row.event_id for row in moved] == same
    assert event_ids(claim(database, outbox)) == expected
    for limit in (1, 4, 8):
        assert event_ids(claim(database, outbox, limit)) == expected[:limit]


def test_only_what_is_due_is_claimed(shop: Shop, database: Database, outbox: Outbox) -> None:
    due = shop.paid(due_in="-1 millisecond")[1]
    shop.paid(due_in="1 minute")
    shop.paid(due_in="10 years")
    assert event_ids(claim(database, outbox)) == [due]
    shop.rows("UPDATE outbox SET due_at = '-infinity' WHERE event_id <> %s", due)
    assert len(claim(database, outbox)) == 3
    shop.rows("UPDATE outbox SET due_at = 'infinity'")
    assert claim(database, outbox) == []


def test_until_bounds_the_claim(shop: Shop, database: Database, outbox: Outbox) -> None:
    """A drain claims only events that were due at its start.

    It leaves events that became due later, or that the drain postponed.
    """
    early = shop.paid(due_in="-2 minutes")[1]
    until = shop.scalar("SELECT clock_timestamp() - interval '1 minute'")
    shop.paid(due_in="-10 seconds")
    assert event_ids(claim(database, outbox, until=until)) == [early]
    assert len(claim(database, outbox)) == 2


def test_no_statement_carries_the_workers_clock(
    shop: Shop, database: Database, make_processor: MakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All moments come from the database. No parameter is a moment.

    A worker whose clock says 1970 settles and postpones in the same way.
    """
    shop.pay_many(3)
    recovered, its_event = shop.paid()
    shop.mark(its_event, "created", recovered.id)
    _, waits = shop.paid(status="pending")
    shop.paid(payload={"payment_id": 5})
    moments: list[Any] = []

    def look_at(_c: Any, _cursor: Any, statement: str, parameters: dict[str, Any], *_: Any) -> None:
        flat = [one for value in parameters.values() for one in (value if isinstance(value, list) else [value])]
        moments.extend((statement, one) for one in flat if isinstance(one, date | datetime))

    processor = make_processor()
    listener.listen(database.engine, "before_cursor_execute", look_at)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    outcomes = processor.process_batch().outcomes()
    monkeypatch.undo()
    assert outcomes == {Outcome.CREATED: 3, Outcome.RECOVERED: 1, Outcome.RETRIED: 1, Outcome.DEAD: 1}
    assert moments == []
    wait = shop.scalar("SELECT due_at - clock_timestamp() FROM outbox WHERE event_id = %s", waits)
    assert timedelta(seconds=25) < wait < timedelta(seconds=38)
    written = shop.rows(
        "SELECT created_at AS at FROM purchases UNION ALL SELECT processed_at FROM processed_events"
        " UNION ALL SELECT recovered_at FROM processed_events WHERE recovered_at IS NOT NULL"
        " UNION ALL SELECT dead_at FROM dead_letters"
    )
    assert len(written) == 4 + 4 + 1 + 1
    assert all(row.at > shop.scalar("SELECT now() - interval '1 minute'") for row in written)


def test_the_keys_of_a_claimed_event(shop: Shop, database: Database, outbox: Outbox) -> None:
    payment, event = shop.paid(due_in="-100 seconds", attempts=3)
    upper = shop.confirm(payment, payload={"payment_id": str(payment.id).upper()})
    braces = shop.confirm(payment, payload={"payment_id": f"{{{payment.id}}}"})
    array = shop.confirm(None, payload="[]")
    found = {UUID(each.event_id): each for each in claim(database, outbox)}
    assert set(found) == {event, upper, braces, array}
    assert found[event].payment_id == found[upper].payment_id == str(payment.id)
    assert found[braces].payment_id is found[array].payment_id is None
    assert found[event].attempts == 3
    assert 99 < found[event].lateness < 130
    assert found[event].event_type == "PURCHASE_CONFIRMED"


def test_other_consumers_events_are_left_alone(shop: Shop, database: Database, tables: Tables) -> None:
    shop.pay_many(3, event_type="INVOICE_SENT")
    ours = shop.paid()[1]
    assert event_ids(claim(database, Outbox(tables, ["PURCHASE_CONFIRMED"]))) == [ours]
    assert len(claim(database, Outbox(tables, None))) == 4


def test_a_payload_the_driver_cannot_decode_does_not_stop_a_claim(
    shop: Shop, database: Database, outbox: Outbox, make_processor: MakeProcessor
) -> None:
    """Deep nesting and huge integers are legal jsonb. The worker never fetches them."""
    payment = shop.payment()
    deep = "[" * 3000 + "]" * 3000
    shop.confirm(None, payload=f'{{"payment_id": "{payment.id}", "extra": {deep}}}')
    shop.confirm(None, payload=f'{{"payment_id": {"9" * 5000}}}')
    shop.confirm(None, payload=deep)
    shop.paid()
    assert len(claim(database, outbox)) == 4
    assert drain_all(make_processor()) == {Outcome.CREATED: 2, Outcome.DEAD: 2}


def test_due_times_travel_safely_under_any_style(
    shop: Shop, database_url: str, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    """IST means India to the server that writes it and Israel to the server that reads it.

    A due time that is sent as such a text would move the window of the batch.
    """
    name = database_url.split("?", maxsplit=1)[0].rpartition("/")[2]
    shop.rows(f"ALTER DATABASE {name} SET datestyle = 'SQL, DMY'")
    shop.rows(f"ALTER DATABASE {name} SET timezone = 'Asia/Kolkata'")
    shop.pay_many(30)
    assert drain_all(make_processor(batch_size=10, database=make_database())) == {Outcome.CREATED: 30}
