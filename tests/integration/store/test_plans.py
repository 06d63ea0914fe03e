"""Every frequent statement uses an index on a large shop, whatever the statistics say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from psycopg import sql
from sqlalchemy import event as listener
from sqlalchemy import text

from outbox_worker.database.direct import Direct
from outbox_worker.database.engine import Database
from outbox_worker.database.planner import INDEX_PLANS
from outbox_worker.database.statements import Statement
from outbox_worker.model import Outcome
from outbox_worker.schema.tables import Tables
from outbox_worker.settle import fast
from outbox_worker.store.outbox import Outbox
from tests.support import servers
from tests.support.factories import Shop
from tests.support.makers import MakeDatabase, MakeProcessor

LARGE = 50_000

PLANNED = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")


class Plans:
    """EXPLAIN every statement of a batch in its own transaction, just before it runs.

    The statements are prepared as psycopg prepares them.
    """

    def __init__(self, database: Database) -> None:
        self.found: list[tuple[str, dict[str, Any]]] = []
        listener.listen(database.engine, "before_cursor_execute", self._explain)
        database._can_queue = False
        self._open = database.direct
        database.direct = self._direct  # type: ignore[method-assign]

    @contextmanager
    def _direct(self, **parameters: str) -> Iterator[Direct]:
        with self._open(**parameters) as transaction:
            fetch = transaction.fetch

            def explain(statement: Statement, values: Mapping[str, Any]) -> Any:
                text, given = statement.numbered(values)
                self._explain_prepared(transaction._connection, text, given, str(statement))
                return fetch(statement, values)

            transaction.fetch = explain  # type: ignore[method-assign]
            yield transaction

    def _explain(self, _connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "set_config" in statement or not statement.lstrip().startswith(PLANNED):
            return
        names: list[str] = re.findall(r"%\((\w+)\)s", statement)
        places = {name: f"${at}" for at, name in enumerate(dict.fromkeys(names), 1)}
        numbered = re.sub(r"%\((\w+)\)s", lambda found: places[found[1]], statement)
        self._explain_prepared(cursor.connection, numbered, [parameters[name] for name in places], statement)

    def _explain_prepared(self, connection: Any, numbered: str, given: Sequence[Any], statement: str) -> None:
        values = sql.SQL("({})").format(sql.SQL(", ").join(map(sql.Literal, given))) if given else sql.SQL("")
        with connection.cursor() as own:
            own.execute("PREPARE explained AS " + numbered)
            own.execute(sql.SQL("EXPLAIN (FORMAT JSON) EXECUTE explained {}").format(values))
            self.found.append((statement, own.fetchone()[0][0]["Plan"]))
            own.execute("DEALLOCATE explained")

    def by_kind(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for statement, plan in self.found:
            kinds.setdefault(kind_of(statement), []).append(plan)
        return kinds


def kind_of(statement: str) -> str:
    marks = {
        "won AS": "fast",
        "tried AS": "claim and lock",
        "SKIP LOCKED": "claim",
        "pg_try_advisory": "lock",
        "INSERT INTO public.purchases": "insert",
        "INSERT INTO public.processed_events": "mark",
        "INSERT INTO public.dead_letters": "bury",
        "UPDATE public.dead_letters": "close letters",
        "DELETE FROM public.outbox": "delete",
        "UPDATE public.outbox": "postpone",
        "AS written": "read back",
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
    """Tell whether a scan reads only the rows that its condition names."""
    return node["Node Type"] in ("Index Scan", "Index Only Scan") and bool(node.get("Index Cond"))


def finds_any_open_letter(node: dict[str, Any]) -> bool:
    """Tell whether a scan reads the first entry of the index of open dead letters."""
    return node.get("Index Name") == "dead_letters_open_idx"


def names_its_events(node: dict[str, Any]) -> bool:
    """Tell whether a scan of ``(due_at, id)`` stays in the batch's window."""
    return node.get("Index Name") != "outbox_due_idx" or "due_at" in node["Index Cond"]


def keys_are_walked_again(plan: dict[str, Any]) -> bool:
    """Tell whether a join reads the batch's keys again for each row of its outer side."""
    joins = [node for node in nodes(plan) if node["Node Type"] == "Nested Loop"]
    return any("Function Scan" in {each["Node Type"] for each in nodes(join["Plans"][1])} for join in joins)


def fill(shop: Shop) -> None:
    """Fill a large shop with a large backlog, without ANALYZE."""
    for table in ("payments", "outbox", "purchases", "processed_events", "dead_letters"):
        shop.rows(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    shop.pay_many(LARGE)
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)"
        " SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 1, 'EUR' FROM generate_series(1, %s)",
        LARGE // 2,
    )
    shop.rows(
        "INSERT INTO processed_events (event_id, event_type, outcome, payment_id)"
        " SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED', 'created', gen_random_uuid() FROM generate_series(1, %s)",
        LARGE // 2,
    )
    shop.rows(
        "INSERT INTO dead_letters (event_id, event_type, payload, created_at, attempts, reason, detail)"
        " SELECT gen_random_uuid(), 'X', '{}', now(), 1, 'payment_not_found', '' FROM generate_series(1, %s)",
        LARGE // 5,
    )


def analyze(shop: Shop, analyzed: str) -> None:
    """Leave statistics of the full tables, of an empty queue, or none at all."""
    if analyzed == "empty":  # as VACUUM leaves it while a snapshot keeps a million dead entries
        shop.rows("UPDATE pg_class SET reltuples = 0, relpages = 1000 WHERE oid = 'outbox'::regclass")
    if analyzed == "full":
        shop.rows("ANALYZE payments, outbox, purchases, processed_events, dead_letters")


@pytest.fixture
def database_url(server: servers.Server, make_url: Callable[[str | None], str], guard_kind: str) -> str:
    """Make a database with a large shop for this test. It is filled once per guard and run."""
    name = f"large_{guard_kind}"
    server.make_template(name, guard_kind, fill)
    return make_url(name)


def add_one_of_every_kind(shop: Shop) -> None:
    """Put events at the head of the queue that make a batch run every statement."""
    recovered, event = shop.paid(due_in="-9 days")
    shop.mark(event, "created", recovered.id)
    first, _ = shop.paid(due_in="-9 days")
    shop.paid(student=first.student_id, course=first.course_id, due_in="-9 days")
    shop.paid(status="pending", due_in="-9 days")
    shop.confirm(None, payload={"payment_id": str(uuid4())}, due_in="-9 days")
    shop.paid(payload={"payment_id": None}, due_in="-9 days")


KINDS = {"fast", "claim", "lock", "look", "insert", "mark", "delete", "bury", "read back", "close letters"}
KINDS |= {"postpone", "trace"}


@pytest.mark.parametrize("analyzed", ["full", "empty", "never"])
def test_every_statement_of_a_batch_walks_indexes(
    both_guards: str, analyzed: str, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    analyze(shop, analyzed)
    add_one_of_every_kind(shop)
    processor = make_processor(batch_size=600)
    processor.set_target(0.0)
    plans = Plans(database)
    report = processor.process_batch()
    assert report.guard == both_guards
    assert report.claimed == report.settled == 600
    kinds = plans.by_kind()
    assert kinds.keys() == KINDS | ({"claim and lock"} if both_guards == "lock" else set())
    for kind, explained in kinds.items():
        for plan in explained:
            off = [node for node in table_scans(plan) if not is_index_path(node) and not finds_any_open_letter(node)]
            assert off == [], f"{kind}: {[(node['Node Type'], node['Relation Name']) for node in off]}"
            joins = {node["Node Type"] for node in nodes(plan)} & {"Hash Join", "Merge Join"}
            assert not joins, f"{kind}: {joins}"
            if "claim" not in kind:
                assert all(names_its_events(node) for node in table_scans(plan)), kind
            if kind in ("insert", "lock", "look"):
                assert not keys_are_walked_again(plan), kind
    (first, *_) = kinds["claim and lock" if both_guards == "lock" else "fast"]
    assert [node["Node Type"] for node in nodes(first)][:4] == ["Aggregate", "Limit", "LockRows", "Index Scan"]
    claims = [node for node in table_scans(first) if node["Relation Name"] == "outbox" and node["Alias"] == "outbox"]
    assert [node["Index Name"] for node in claims] == ["outbox_due_idx"]


def add_refunds(shop: Shop, count: int, next_payments: int) -> None:
    """Put refunds of active purchases at the head of the queue.

    ``next_payments`` of their pairs have another successful payment.
    """
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
    """List how often each sequential scan of a table runs: 1 is once, 2 is once per outer row."""
    found = [times] if (plan["Node Type"], plan.get("Relation Name")) == ("Seq Scan", table) else []
    for place, inner in enumerate(plan.get("Plans", [])):
        found += executions(inner, table, 2 if plan["Node Type"] == "Nested Loop" and place == 1 else times)
    return found


@pytest.mark.parametrize("analyzed", ["full", "empty", "never"])
def test_refunds_walk_indexes_and_read_the_payments_once(
    both_guards: str, analyzed: str, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """The shop's payments have no index on the pair and are read once.

    With such an index they are looked up.
    """
    analyze(shop, analyzed)
    add_refunds(shop, 600, 30)
    processor = make_processor(batch_size=300)
    plans = Plans(database)
    for _ in range(2):
        assert processor.process_batch().outcomes() == {Outcome.REVOKED: 300}
        shop.rows("CREATE INDEX IF NOT EXISTS by_pair ON payments (student_id, course_id)")
        shop.rows("ANALYZE payments")
    assert processor.watch.state.guard == both_guards
    kinds = plans.by_kind()
    plans_of_fast = {"fast"} if both_guards == "index" else {"claim and lock", "fast"}
    assert kinds.keys() == plans_of_fast | {
        *("claim", "lock", "look", "insert", "standing", "mark", "close letters", "delete", "trace")
    }
    once, looked_up = kinds.pop("standing")
    assert executions(once, "payments") == [1]
    assert {node["Node Type"] for node in nodes(once)} & {"Hash Join", "Merge Join"}
    assert executions(looked_up, "payments") == []
    assert max(executions(once, "outbox") + executions(looked_up, "outbox")) == 1
    for kind, explained in kinds.items():
        scans = [node for plan in explained for node in table_scans(plan)]
        off = [node for node in scans if not is_index_path(node) and not finds_any_open_letter(node)]
        assert off == [], f"{kind}: {[(node['Node Type'], node['Relation Name']) for node in off]}"


def test_without_the_switches_a_plan_would_stray(
    shop: Shop, database: Database, make_processor: MakeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: on tables never analyzed, the planner alone chooses other plans."""
    add_one_of_every_kind(shop)
    processor = make_processor(batch_size=600)
    monkeypatch.setattr(fast, "index_plans", lambda _: {})
    plans = Plans(database)
    processor.process_batch()
    scans = [node for explained in plans.by_kind().values() for plan in explained for node in table_scans(plan)]
    assert [node for node in scans if not is_index_path(node)]


@pytest.mark.parametrize("types", [None, ["PURCHASE_CONFIRMED"]], ids=["all types", "ours only"])
def test_a_claim_prepared_on_an_empty_queue_keeps_its_index(
    types: list[str] | None, shop: Shop, tables: Tables, make_database: MakeDatabase
) -> None:
    """After twelve empty claims the server has one generic plan.

    It was made when a sequential scan cost nothing.
    """
    shop.rows("TRUNCATE outbox, payments")
    shop.rows("ANALYZE outbox")
    database, outbox = make_database(connections=1), Outbox(tables, types)
    for _ in range(15):  # committed: psycopg forgets its prepared statements at a rollback
        with database.transaction(**INDEX_PLANS) as session:
            assert not outbox.claim(session, 1000).batch
    shop.pay_many(LARGE // 5)
    with database.transaction(**INDEX_PLANS) as session:
        prepared = session.execute(
            text(
                "SELECT name, generic_plans, parameter_types::text[] AS types FROM pg_prepared_statements"
                " WHERE statement LIKE '%SKIP LOCKED%' AND statement LIKE '%FROM public.outbox%'"
            )
        ).one()
        assert prepared.generic_plans > 0, "no generic plan was made; the test proves nothing"
        # The limit is the only number. Every other parameter is the name of a type, or a moment
        # that is not given here.
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
