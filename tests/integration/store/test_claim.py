"""The claim: what it takes, in which order, by which clock; and that every hot statement walks an index."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg import sql
from sqlalchemy import event as listener
from sqlalchemy import text

from outbox_worker.database.engine import Database
from outbox_worker.database.planner import INDEX_PLANS
from outbox_worker.model import Event, Outcome
from outbox_worker.schema.tables import Tables
from outbox_worker.store.outbox import Outbox
from tests.support.factories import Shop, drain_all
from tests.support.makers import Connect, MakeDatabase, MakeProcessor

LARGE = 50_000


@pytest.fixture
def outbox(tables: Tables) -> Outbox:
    return Outbox(tables, None)


def claim(database: Database, outbox: Outbox, limit: int = 1000, until: datetime | None = None) -> list[Event]:
    """What one transaction claims; it is rolled back."""
    with database.transaction(**INDEX_PLANS) as session:
        events = list(outbox.claim(session, limit, until).batch.values())
        session.rollback()
    return events


def event_ids(events: list[Event]) -> list[UUID]:
    return [event.event_id for event in events]


# --- rows that others hold


@pytest.mark.parametrize("strength", ["UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE"])
def test_a_row_that_somebody_holds_is_skipped_and_its_neighbours_are_claimed(
    strength: str, shop: Shop, connect: Connect, make_database: MakeDatabase, outbox: Outbox
) -> None:
    """Whatever would make our DELETE wait is skipped: also the share lock of a foreign key."""
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
    """The ids run against the times, and five events share one moment."""
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
    """A drain takes what was due at its start; what became due since, or was postponed by it, is not its matter."""
    early = shop.paid(due_in="-2 minutes")[1]
    until = shop.scalar("SELECT clock_timestamp() - interval '1 minute'")
    shop.paid(due_in="-10 seconds")
    assert event_ids(claim(database, outbox, until=until)) == [early]
    assert len(claim(database, outbox)) == 2


def test_no_statement_carries_the_workers_clock(
    shop: Shop, database: Database, make_processor: MakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All moments come from the database: no parameter is one, and a worker in 1970 settles and postpones the same."""
    shop.pay_many(3)
    recovered, its_event = shop.paid()
    shop.mark(its_event, "created", recovered.id)
    pending, waits = shop.paid(status="pending")
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
    assert pending.id


def test_the_keys_of_a_claimed_event(shop: Shop, database: Database, outbox: Outbox) -> None:
    payment, event = shop.paid(due_in="-100 seconds", attempts=3)
    upper = shop.confirm(payment, payload={"payment_id": str(payment.id).upper()})
    braces = shop.confirm(payment, payload={"payment_id": f"{{{payment.id}}}"})
    array = shop.confirm(None, payload="[]")
    found = {each.event_id: each for each in claim(database, outbox)}
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
    """Deep nesting and huge integers are legal jsonb; they never travel."""
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
    """IST is India where it is written, and Israel where it is read: the batch's window would be elsewhere."""
    name = database_url.split("?", maxsplit=1)[0].rpartition("/")[2]
    shop.rows(f"ALTER DATABASE {name} SET datestyle = 'SQL, DMY'")
    shop.rows(f"ALTER DATABASE {name} SET timezone = 'Asia/Kolkata'")
    shop.pay_many(30)
    assert drain_all(make_processor(batch_size=10, database=make_database())) == {Outcome.CREATED: 30}


# --- plans


PLANNED = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")


class Plans:
    """EXPLAIN of every statement of a batch, in its own transaction, just before it runs, prepared as psycopg does."""

    def __init__(self, database: Database) -> None:
        self.found: list[tuple[str, dict[str, Any]]] = []
        self._engine = database.engine
        listener.listen(self._engine, "before_cursor_execute", self._explain)

    def _explain(self, _connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "set_config" in statement or not statement.lstrip().startswith(PLANNED):
            return
        names: list[str] = re.findall(r"%\((\w+)\)s", statement)
        places = {name: f"${at}" for at, name in enumerate(dict.fromkeys(names), 1)}
        values = sql.SQL(", ").join(sql.Literal(parameters[name]) for name in places)
        given = sql.SQL("({})").format(values) if places else sql.SQL("")
        with cursor.connection.cursor() as own:
            own.execute("PREPARE explained AS " + re.sub(r"%\((\w+)\)s", lambda found: places[found[1]], statement))
            own.execute(sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE explained {}").format(given))
            self.found.append((statement, own.fetchone()[0][0]["Plan"]))
            own.execute("DEALLOCATE explained")

    def by_kind(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for statement, plan in self.found:
            kinds.setdefault(kind_of(statement), []).append(plan)
        return kinds


def kind_of(statement: str) -> str:
    marks = {
        "SKIP LOCKED": "claim",
        "pg_try_advisory": "lock",
        "INSERT INTO public.purchases": "insert",
        "INSERT INTO public.processed_events": "mark",
        "INSERT INTO public.dead_letters": "bury",
        "UPDATE public.dead_letters": "close letters",
        "DELETE FROM public.outbox": "delete",
        "UPDATE public.outbox": "postpone",
        "AS pair_held": "look",
        "AS traceparent": "trace",
        "AS kind": "standing",
    }
    return next((kind for mark, kind in marks.items() if mark in statement), statement)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


def table_scans(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in nodes(plan) if "Scan" in node["Node Type"] and "Relation Name" in node]


def is_index_path(node: dict[str, Any]) -> bool:
    """A scan that reads only what its condition names."""
    return node["Node Type"] in ("Index Scan", "Index Only Scan") and bool(node.get("Index Cond"))


def names_its_events(node: dict[str, Any]) -> bool:
    """An event looked up in ``(due_at, id)`` is looked for in the batch's window, not from end to end."""
    return node.get("Index Name") != "outbox_due_idx" or "due_at" in node["Index Cond"]


def keys_are_walked_again(plan: dict[str, Any]) -> bool:
    """The batch's keys as the inner side of a join: once more from the beginning for each row of the outer one."""
    joins = [node for node in nodes(plan) if node["Node Type"] == "Nested Loop"]
    return any("Function Scan" in {each["Node Type"] for each in nodes(join["Plans"][1])} for join in joins)


def fill(shop: Shop, analyzed: str) -> None:
    """A large shop with a large backlog; statistics as of the full tables, of an empty queue, or none at all."""
    for table in ("payments", "outbox", "purchases", "processed_events", "dead_letters"):
        shop.rows(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    shop.pay_many(LARGE)
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 1, 'EUR' FROM generate_series(1, %s)",
        LARGE,
    )
    shop.rows(
        "INSERT INTO processed_events (event_id, event_type, outcome, payment_id)"
        " SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', 'created', gen_random_uuid() FROM generate_series(1, %s)",
        LARGE,
    )
    shop.rows(
        "INSERT INTO dead_letters (event_id, event_type, payload, created_at, attempts, reason, detail)"
        " SELECT gen_random_uuid(), 'X', '{}', now(), 1, 'payment_not_found', '' FROM generate_series(1, %s)",
        LARGE // 5,
    )
    if analyzed == "empty":  # as VACUUM leaves it while somebody's snapshot keeps a million dead entries
        shop.rows("UPDATE pg_class SET reltuples = 0, relpages = 1000 WHERE oid = 'outbox'::regclass")
    if analyzed == "full":
        shop.rows("ANALYZE payments, outbox, purchases, processed_events, dead_letters")


def add_one_of_every_kind(shop: Shop) -> None:
    """At the head of the queue: events that make a batch run every statement."""
    recovered, event = shop.paid(due_in="-9 days")
    shop.mark(event, "created", recovered.id)
    first, _ = shop.paid(due_in="-9 days")
    shop.paid(student=first.student_id, course=first.course_id, due_in="-9 days")
    shop.paid(status="pending", due_in="-9 days")
    shop.confirm(None, payload={"payment_id": str(uuid4())}, due_in="-9 days")
    shop.paid(payload={"payment_id": None}, due_in="-9 days")


KINDS = {"claim", "lock", "insert", "mark", "bury", "close letters", "delete", "postpone", "look", "trace"}


@pytest.mark.parametrize("analyzed", ["full", "empty", "never"])
def test_every_statement_of_a_batch_walks_indexes(
    both_guards: str, analyzed: str, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    fill(shop, analyzed)
    add_one_of_every_kind(shop)
    processor = make_processor(batch_size=600)
    plans = Plans(database)
    report = processor.process_batch()
    assert report.guard == both_guards
    assert len(report.verdicts) == len(report.batch) == 600
    kinds = plans.by_kind()
    assert kinds.keys() == KINDS
    for kind, explained in kinds.items():
        for plan in explained:
            off = [node for node in table_scans(plan) if not is_index_path(node)]
            assert off == [], f"{kind}: {[(node['Node Type'], node['Relation Name']) for node in off]}"
            joins = {node["Node Type"] for node in nodes(plan)} & {"Hash Join", "Merge Join"}
            assert not joins, f"{kind}: {joins}"
            if kind != "claim":
                assert all(names_its_events(node) for node in table_scans(plan)), kind
            if kind in ("insert", "lock", "look"):
                assert not keys_are_walked_again(plan), kind
    (claim_plan,) = kinds["claim"]
    assert [node["Node Type"] for node in nodes(claim_plan)][:4] == ["Aggregate", "Limit", "LockRows", "Index Scan"]
    assert [node["Index Name"] for node in table_scans(claim_plan)] == ["outbox_due_idx"]
    assert not [node for node in nodes(claim_plan) if "Sort" in node["Node Type"]]


def add_refunds(shop: Shop, count: int, next_payments: int) -> None:
    """At the head of the queue: refunds of active purchases; of so many pairs another payment stands."""
    shop.rows(
        "WITH oldest AS (SELECT id, CAST(payload ->> 'payment_id' AS uuid) AS payment_id FROM outbox ORDER BY id"
        " LIMIT %s), first AS (UPDATE outbox SET event_type = 'PURCHASE_REFUNDED', due_at = now() - interval '9 days'"
        " FROM oldest WHERE oldest.id = outbox.id), refunded AS (UPDATE payments SET status = 'refunded' FROM oldest"
        " WHERE oldest.payment_id = payments.id RETURNING payments.*)"
        " INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT student_id, course_id, id, amount, currency FROM refunded",
        count,
    )
    shop.rows(
        "INSERT INTO payments (student_id, course_id, amount, currency, status)"
        " SELECT student_id, course_id, 1, 'EUR', 'succeeded' FROM payments WHERE status = 'refunded' LIMIT %s",
        next_payments,
    )


def executions(plan: dict[str, Any], table: str, times: int = 1) -> list[int]:
    """Of each sequential scan of a table how often it is made, by its place: once, or (2) for each row of another."""
    found = [times] if (plan["Node Type"], plan.get("Relation Name")) == ("Seq Scan", table) else []
    for place, inner in enumerate(plan.get("Plans", [])):
        found += executions(inner, table, 2 if plan["Node Type"] == "Nested Loop" and place == 1 else times)
    return found


@pytest.mark.parametrize("analyzed", ["full", "empty", "never"])
def test_refunds_walk_indexes_and_read_the_payments_once(
    both_guards: str, analyzed: str, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """The payments are the shop's, without an index on the pair; with one they are looked up."""
    fill(shop, analyzed)
    add_refunds(shop, 600, 30)
    processor = make_processor(batch_size=300)
    plans = Plans(database)
    for _ in range(2):
        assert processor.process_batch().outcomes() == {Outcome.REVOKED: 300}
        shop.rows("CREATE INDEX IF NOT EXISTS by_pair ON payments (student_id, course_id)")
        shop.rows("ANALYZE payments")
    assert processor.watch.state.guard == both_guards
    kinds = plans.by_kind()
    assert kinds.keys() == {"claim", "lock", "look", "insert", "standing", "mark", "close letters", "delete", "trace"}
    once, looked_up = kinds.pop("standing")
    assert executions(once, "payments") == [1]
    assert {node["Node Type"] for node in nodes(once)} & {"Hash Join", "Merge Join"}
    assert executions(looked_up, "payments") == []
    assert max(executions(once, "outbox") + executions(looked_up, "outbox")) == 1
    for kind, explained in kinds.items():
        off = [node for plan in explained for node in table_scans(plan) if not is_index_path(node)]
        assert off == [], f"{kind}: {[(node['Node Type'], node['Relation Name']) for node in off]}"


def test_without_the_switches_a_plan_would_stray(
    shop: Shop, database: Database, make_processor: MakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above is sharp: on tables never analyzed the planner itself chooses otherwise."""
    fill(shop, "never")
    add_one_of_every_kind(shop)
    processor = make_processor(batch_size=600)
    monkeypatch.setattr(processor, "_plans", dict)
    plans = Plans(database)
    processor.process_batch()
    scans = [node for explained in plans.by_kind().values() for plan in explained for node in table_scans(plan)]
    assert [node for node in scans if not is_index_path(node)]


@pytest.mark.parametrize("types", [None, ["PURCHASE_CONFIRMED"]], ids=["all types", "ours only"])
def test_a_claim_prepared_on_an_empty_queue_keeps_its_index(
    types: list[str] | None, shop: Shop, tables: Tables, make_database: MakeDatabase
) -> None:
    """After twelve empty looks the server holds one generic plan, made when a sequential scan cost nothing."""
    for table in ("payments", "outbox"):
        shop.rows(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    shop.rows("ANALYZE outbox")
    database, outbox = make_database(connections=1), Outbox(tables, types)
    for _ in range(15):  # committed: psycopg forgets what it prepared when it rolls back
        with database.transaction(**INDEX_PLANS) as session:
            assert not outbox.claim(session, 1000).batch
    shop.pay_many(LARGE)
    with database.transaction(**INDEX_PLANS) as session:
        prepared = session.execute(
            text(
                "SELECT name, generic_plans, parameter_types::text[] AS types FROM pg_prepared_statements"
                " WHERE statement LIKE '%SKIP LOCKED%' AND statement LIKE '%FROM public.outbox%'"
            )
        ).one()
        assert prepared.generic_plans > 0, "no generic plan was made; the test proves nothing"
        # The limit is the only number; every other parameter is a type's name or the moment, not given here.
        values = {"bigint": "1000", "text": "'PURCHASE_CONFIRMED'", "character varying": "'PURCHASE_CONFIRMED'"}
        arguments = [values.get(kind, "NULL") for kind in prepared.types]
        if types is None:
            arguments = [one if one != "'PURCHASE_CONFIRMED'" else "NULL" for one in arguments]
        plan = session.scalar(text(f'EXPLAIN (FORMAT JSON) EXECUTE "{prepared.name}"({", ".join(arguments)})'))[0][
            "Plan"
        ]
    assert [node["Index Name"] for node in table_scans(plan)] == ["outbox_due_idx"]
    assert all(is_index_path(node) for node in table_scans(plan))
    assert "Sort" not in {node["Node Type"] for node in nodes(plan)}
    with database.transaction(**INDEX_PLANS) as session:
        assert len(outbox.claim(session, 1000).batch) == 1000
