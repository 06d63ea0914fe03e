"""Events of every kind through the real command: each ends as planned. A second drain finds none.

The full run has ten thousand events. The smaller runs have a part of them in smaller batches.

The table ``expected`` holds the result of each event, written when the event is made.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psycopg
import pytest

from outbox_worker.model import Outcome
from outbox_worker.schema.tables import PAIR_INDEX, PAIR_LOOKUP_INDEX
from tests.support.factories import Shop
from tests.support.makers import Connect
from tests.support.processes import eventually, finish, start
from tests.support.refusals import BAD, GOOD, pay, run, trigger

TABLES = ("payments", "outbox", "purchases", "processed_events", "dead_letters")

# kind: (share, payment's status or None for no payment, outcome, reason). Kinds whose events
# compete for one pair come in groups. One event of a group is granted; one worker grants the
# oldest.
KINDS: dict[str, tuple[int, str | None, str, str | None]] = {
    "clean": (2850, "succeeded", "created", None),
    "confirmed twice": (500, "succeeded", "created", None),  # and 500 more events: already_exists
    "paid twice": (500, "succeeded", "created", None),  # and 500 more payments: duplicate_payment
    "paid four times": (50, "succeeded", "created", None),  # and 150 more payments: duplicate_payment
    "marked created": (400, "succeeded", "recovered", None),
    "marked already_exists": (100, "succeeded", "recovered", None),
    "marked by another worker": (100, "succeeded", "recovered", None),
    "marked without payment": (100, "succeeded", "recovered", None),
    "marked duplicate": (100, "succeeded", "created", None),
    "marked suppressed": (100, "succeeded", "created", None),
    "owned": (600, "succeeded", "already_exists", None),
    "owned and marked": (200, "succeeded", "already_exists", None),
    "owned, payment archived": (100, None, "already_exists", None),
    "owned by a gift": (300, "succeeded", "duplicate_payment", None),
    "owned by another payment": (300, "succeeded", "duplicate_payment", None),
    "marked duplicate, still held": (100, "succeeded", "duplicate_payment", None),
    "marked created, held": (100, "succeeded", "duplicate_payment", None),
    "revoked": (200, "succeeded", "suppressed", None),
    "revoked and marked": (100, "succeeded", "suppressed", None),
    "refunded": (300, "refunded", "suppressed", None),
    "no payment": (300, None, "retried", "payment_not_found"),
    "no payment, last try": (200, None, "dead", "payment_not_found"),
    "pending": (200, "pending", "retried", "payment_not_succeeded"),
    "failed": (100, "failed", "retried", "payment_not_succeeded"),
    "pending, last try": (100, "pending", "dead", "payment_not_succeeded"),
    "failed, last try": (100, "failed", "dead", "payment_not_succeeded"),
    "other type": (200, "succeeded", "dead", "unsupported_event_type"),
    "payload is a list": (50, "succeeded", "dead", "invalid_payload"),
    "payload is null": (50, "succeeded", "dead", "invalid_payload"),
    "payload without payment": (50, "succeeded", "dead", "invalid_payload"),
    "payment is a number": (50, "succeeded", "dead", "invalid_payload"),
    "payment is no UUID": (50, "succeeded", "dead", "invalid_payload"),
    "payment without hyphens": (30, "succeeded", "dead", "invalid_payload"),
    "event id reused": (100, "succeeded", "dead", "event_id_reused"),
    "another amount": (50, "succeeded", "dead", "payment_mismatch"),
    "another currency": (30, "succeeded", "dead", "payment_mismatch"),
    "another student": (30, "succeeded", "dead", "payment_mismatch"),
    "another course": (30, "succeeded", "dead", "payment_mismatch"),
    "amount is text": (12, "succeeded", "dead", "payment_mismatch"),
    "refused": (4, "succeeded", "retried", "rejected_by_database"),
    "refused, last try": (4, "succeeded", "dead", "rejected_by_database"),
    "payload in capitals": (10, "succeeded", "created", None),
}
MAKE = """
CREATE TABLE making AS
SELECT k.kind, k.status, k.outcome, k.reason, n, copy,
       gen_random_uuid() AS event_id, gen_random_uuid() AS payment_id,
       CAST(md5(k.kind || n || 'student') AS uuid) AS student_id,
       CAST(md5(k.kind || n || 'course') AS uuid) AS course_id,
       CASE WHEN k.kind LIKE 'refused%%' THEN 66666 ELSE 10 + n %% 90 END AS amount,
       -- spread over an hour; the copies of a group right after one another, so that the first is the oldest
       clock_timestamp() - interval '1 hour' * (1 - ('x' || left(md5(k.kind || n), 6))::bit(24)::int / 2.0^24)
           + interval '1 microsecond' * copy AS due_at
FROM unnest(%(kinds)s::text[], %(shares)s::int[], %(statuses)s::text[], %(outcomes)s::text[], %(reasons)s::text[])
         AS k(kind, share, status, outcome, reason),
     generate_series(1, k.share) AS n,
     generate_series(1, CASE WHEN k.kind LIKE '%%four times' THEN 4 WHEN k.kind LIKE '%%twice' THEN 2 ELSE 1 END)
         AS copy;
UPDATE making m SET payment_id = f.payment_id FROM making f
WHERE m.kind = 'confirmed twice' AND f.kind = m.kind AND f.n = m.n AND f.copy = 1 AND m.copy = 2;
UPDATE making SET outcome = CASE kind WHEN 'confirmed twice' THEN 'already_exists' ELSE 'duplicate_payment' END
WHERE copy > 1;

INSERT INTO payments (id, student_id, course_id, amount, currency, status)
SELECT payment_id, student_id, course_id, amount, 'EUR', status FROM making
WHERE status IS NOT NULL AND NOT (kind = 'confirmed twice' AND copy = 2);

INSERT INTO purchases (student_id, course_id, payment_id, amount, currency, is_active)
SELECT student_id, course_id,
       CASE WHEN kind IN ('owned by another payment', 'marked created, held') THEN gen_random_uuid()
            WHEN kind IN ('owned by a gift', 'marked duplicate, still held') THEN NULL ELSE payment_id END,
       amount, 'EUR', kind NOT LIKE 'revoked%%'
FROM making WHERE kind LIKE 'owned%%' OR kind LIKE 'revoked%%' OR kind LIKE '%%held';

CREATE TABLE marked AS
SELECT event_id,
       CASE WHEN kind = 'marked already_exists' THEN 'already_exists'
            WHEN kind = 'marked by another worker' THEN 'done'
            WHEN kind LIKE 'marked duplicate%%' THEN 'duplicate_payment'
            WHEN kind = 'marked suppressed' THEN 'suppressed' ELSE 'created' END AS outcome,
       CASE kind WHEN 'marked without payment' THEN NULL
                 WHEN 'event id reused' THEN gen_random_uuid() ELSE payment_id END AS payment_id
FROM making WHERE kind LIKE '%%marked%%' OR kind = 'event id reused';
INSERT INTO processed_events (event_id, event_type, outcome, payment_id)
SELECT event_id, 'PURCHASE_CONFIRMED', outcome, payment_id FROM marked;

INSERT INTO outbox (event_id, event_type, payload, due_at, attempts)
SELECT event_id, CASE kind WHEN 'other type' THEN 'INVOICE_SENT' ELSE 'PURCHASE_CONFIRMED' END,
       CASE kind
           WHEN 'payload is a list' THEN '[1]'
           WHEN 'payload is null' THEN 'null'
           WHEN 'payload without payment' THEN jsonb_build_object('student_id', student_id)
           WHEN 'payment is a number' THEN jsonb_build_object('payment_id', 7)
           WHEN 'payment is no UUID' THEN jsonb_build_object('payment_id', left(payment_id::text, 35) || 'g')
           WHEN 'payment without hyphens' THEN jsonb_build_object('payment_id', replace(payment_id::text, '-', ''))
           WHEN 'payload in capitals' THEN jsonb_build_object(
               'payment_id', upper(payment_id::text), 'student_id', upper(student_id::text),
               'course_id', upper(course_id::text), 'amount', amount::text || '.000', 'currency', NULL)
           ELSE jsonb_build_object(
                   'payment_id', payment_id, 'student_id', student_id, 'course_id', course_id, 'currency', 'EUR',
                   'amount', CASE WHEN n %% 2 = 0 THEN to_jsonb(amount) ELSE to_jsonb(amount::text) END)
               || CASE kind
                   WHEN 'another amount' THEN jsonb_build_object('amount', amount + 0.01)
                   WHEN 'another currency' THEN '{"currency": "USD"}'
                   WHEN 'another student' THEN jsonb_build_object('student_id', course_id)
                   WHEN 'another course' THEN jsonb_build_object('course_id', student_id)
                   WHEN 'amount is text' THEN '{"amount": "ten"}'
                   ELSE '{}' END
           END,
       due_at, CASE WHEN kind LIKE '%%last try' THEN 9 ELSE 0 END
FROM making ORDER BY md5(event_id::text);

CREATE TABLE expected AS
SELECT m.event_id, m.kind, CASE WHEN max(m.copy) OVER (PARTITION BY m.kind) > 1 THEN m.kind || m.n END AS together,
       m.outcome, m.reason,
       -- the mark: written once, and rewritten by a grant only
       CASE WHEN m.outcome IN ('retried', 'dead') THEN marked.outcome
            WHEN m.outcome IN ('created', 'recovered') THEN m.outcome
            ELSE coalesce(marked.outcome, m.outcome) END AS mark
FROM making m LEFT JOIN marked USING (event_id);
"""

# Find what became of every event: its mark, or its row in outbox or dead letters.
FOUND = """
SELECT e.event_id, e.kind, e.together, e.outcome, e.reason, e.mark,
       p.outcome AS mark_found, p.recovered_at IS NOT NULL AS was_recovered, p.payment_id AS marked_payment,
       o.attempts, split_part(o.last_error, ':', 1) AS error, o.due_at > clock_timestamp() AS later,
       d.reason AS letter, d.state, d.attempts AS tries
FROM expected e LEFT JOIN processed_events p USING (event_id) LEFT JOIN outbox o USING (event_id)
     LEFT JOIN dead_letters d USING (event_id)
"""


def shares(part: int) -> list[int]:
    """Return the number of events of each kind, divided by ``part``."""
    return [max(share // part, 1) for share, *_ in KINDS.values()]


def make_events(shop: Shop, part: int) -> Counter[str]:
    """Write all events in one statement. Return the expected outcomes and their counts."""
    shop.rows("ALTER TABLE purchases ADD CONSTRAINT not_so_much CHECK (amount <> 66666)")
    _, *columns = zip(*KINDS.values(), strict=True)
    given = dict(zip(("statuses", "outcomes", "reasons"), map(list, columns), strict=True))
    with shop.connection.transaction(), psycopg.ClientCursor(shop.connection) as cursor:
        cursor.execute(MAKE, {"kinds": list(KINDS), "shares": shares(part), **given})
    assert shop.count("outbox") == shop.count("expected") >= 9_900 // part
    return Counter({row.outcome: row.n for row in shop.rows("SELECT outcome, count(*) AS n FROM expected GROUP BY 1")})


def check_every_event(shop: Shop, *, in_order: bool) -> None:
    """Check each event by itself.

    If several workers can swap events of a group, check the whole group.
    """
    groups: dict[str, tuple[Counter[str], Counter[str]]] = {}
    found = shop.rows(FOUND)
    assert found
    for row in found:
        match row.outcome:
            case "retried":
                is_right = (row.attempts, row.error, row.later, row.letter) == (1, row.reason, True, None)
                is_right &= row.mark_found == row.mark
            case "dead":
                tries = 10 if row.kind.endswith("last try") else 1
                is_right = (row.letter, row.state, row.tries, row.attempts) == (row.reason, "open", tries, None)
                is_right &= row.mark_found == row.mark
            case _:
                is_right = row.attempts is None and row.letter is None and row.marked_payment is not None
                is_right &= row.was_recovered == (row.outcome == "recovered")
                if row.together is None or in_order:
                    is_right &= row.mark_found == row.mark
                else:
                    expected, met = groups.setdefault(row.together, (Counter(), Counter()))
                    expected[row.mark] += 1
                    met[row.mark_found] += 1
        assert is_right, row
    assert [each for each in groups.values() if each[0] != each[1]] == []


def check_purchases(shop: Shop) -> None:
    """Check that no purchase is missing and none is too many.

    Each is like its payment, and each pair has one active purchase.
    """
    assert shop.doubled() == 0
    assert shop.owed() == shop.scalar(
        "SELECT count(*) FROM making WHERE status = 'succeeded' AND outcome IN ('dead', 'retried')"
    )
    strangers = shop.scalar(
        "SELECT count(*) FROM purchases q JOIN payments p ON p.id = q.payment_id"
        " WHERE (q.student_id, q.course_id, q.amount, q.currency) IS DISTINCT FROM"
        " (p.student_id, p.course_id, p.amount, p.currency)"
    )
    assert strangers == 0
    granted = shop.scalar("SELECT count(*) FROM making WHERE outcome IN ('created', 'recovered')")
    before = shop.scalar(
        "SELECT count(*) FROM making WHERE kind LIKE 'owned%' OR kind LIKE 'revoked%' OR kind LIKE '%held'"
    )
    assert shop.count("purchases") == before + granted


def check_audit(url: str, shop: Shop, part: int) -> None:
    """Check that the audit counts the same results."""
    audit = finish("audit", "--json", url=url)
    told = audit.object
    count = dict(
        shop.rows(
            "SELECT outcome || coalesce(' ' || reason, ''), count(*) FROM making WHERE status = 'succeeded' GROUP BY 1"
        )
    )
    confirmed_twice = dict(zip(KINDS, shares(part), strict=True))["confirmed twice"]
    active = count["created"] + count["recovered"] + count["already_exists"] - confirmed_twice
    contradicted = count["dead payment_mismatch"] + count["dead event_id_reused"]
    others = {key: n for key, n in count.items() if key.startswith("dead ")}
    unexplained = sum(others.values()) - contradicted
    assert told["counts"] == {
        "active": active,
        "revoked": count["suppressed"],
        "duplicate": count["duplicate_payment"],
        "in_flight": count["retried rejected_by_database"],
        "dead": contradicted,
        "waived": 0,
        "unexplained": unexplained,
    }
    assert sum(told["counts"].values()) == shop.scalar("SELECT count(*) FROM payments WHERE status = 'succeeded'")
    assert len(told["unexplained"]) == unexplained > 0
    assert (audit.code, told["ok"], told["refunded_but_active"]) == (1, False, [])


def snapshot(shop: Shop) -> dict[str, str]:
    """Return a digest of every row of every table except ``workers``."""
    return {
        table: shop.scalar(f"SELECT count(*) || md5(string_agg(t::text, E'\\n' ORDER BY t::text)) FROM {table} t")
        for table in TABLES
    }


def check_second_drain(url: str, shop: Shop, *options: str) -> None:
    before = snapshot(shop)
    again = finish("run", "--drain", *options, url=url)
    assert again.code == 0, again.stderr
    stopped = again.record("worker_stopped")
    assert not stopped.keys() & {str(outcome) for outcome in Outcome}
    assert snapshot(shop) == before


@pytest.mark.parametrize("part", [10, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_ten_thousand_events_of_every_kind(
    both_guards: str, concurrency: int, part: int, database_url: str, shop: Shop
) -> None:
    expected = make_events(shop, part)
    options = ("--concurrency", str(concurrency), "--batch-size", str(1000 // part))
    done = finish("run", "--drain", *options, url=database_url)
    assert done.code == 0, done.stderr
    assert done.sentences() == ""
    assert done.record("worker_started")["guard"] == both_guards
    stopped = done.record("worker_stopped")
    assert {name: stopped[name] for name in expected} == dict(expected)
    check_every_event(shop, in_order=concurrency == 1)
    check_purchases(shop)
    if concurrency == 1:
        check_audit(database_url, shop, part)
    check_second_drain(database_url, shop, *options)


@pytest.mark.parametrize("part", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_while_the_index_comes_and_goes(
    concurrency: int, part: int, database_url: str, shop: Shop, connect: Connect
) -> None:
    """During the drain the index is dropped and built again and again, concurrently or not."""
    make_events(shop, part)
    shop.rows(f"CREATE INDEX {PAIR_LOOKUP_INDEX} ON purchases (student_id, course_id) WHERE is_active")
    on_pair = f"{PAIR_INDEX} ON purchases (student_id, course_id) WHERE is_active"
    steps = [
        f"DROP INDEX IF EXISTS {PAIR_INDEX}",
        f"CREATE UNIQUE INDEX CONCURRENTLY {on_pair}",
        f"DROP INDEX CONCURRENTLY IF EXISTS {PAIR_INDEX}",
        f"CREATE UNIQUE INDEX {on_pair}",
    ]
    builder, over, built = connect(autocommit=True), threading.Event(), []

    def build() -> None:
        for step in itertools.cycle(steps):
            if over.is_set():
                return
            with contextlib.suppress(psycopg.errors.DeadlockDetected):  # the server's victim; next step
                builder.execute(step)
                built.append(step)

    with ThreadPoolExecutor() as pool, ExitStack() as at_the_end:
        at_the_end.callback(over.set)
        options = ("--concurrency", str(concurrency), "--batch-size", str(500 // part))
        with start("run", "--drain", *options, url=database_url, log_level="DEBUG") as process:
            process.wait_for("batch_committed", guard="index")
            building = pool.submit(build)
            code = process.wait()
            steps_done = len(built)
            over.set()
            building.result()
        assert code == 0, process.stderr
        guards = Counter(record["guard"] for record in process.records if record.get("event") == "batch_committed")
    assert steps_done >= len(steps), "the index was hardly ever touched during the drain; the test proves nothing"
    assert guards["index"] > 0 < guards["lock"], guards
    check_every_event(shop, in_order=concurrency == 1)
    check_purchases(shop)
    check_second_drain(database_url, shop)


def test_rows_and_pairs_that_others_hold_are_waited_for_until_the_deadline(
    both_guards: str, database_url: str, shop: Shop, connect: Connect
) -> None:
    """The drain claims an event with a locked pair again and again, and does not change it."""
    shop.pay_many(50)
    held = connect()
    ids = [row[0] for row in held.execute("SELECT id FROM outbox ORDER BY id LIMIT 3 FOR UPDATE")]
    first = shop.payment()
    shop.purchase(first)
    _, event = shop.paid(student=first.student_id, course=first.course_id)
    held.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"{first.student_id}:{first.course_id}"])
    ids.append(shop.event(event).id)
    done = finish("run", "--drain", url=database_url, database_deadline_seconds=1)
    assert done.code == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.record("worker_stopped")["created"] == 47
    assert [row.id for row in shop.rows("SELECT id FROM outbox WHERE attempts = 0 ORDER BY id")] == ids
    held.rollback()
    assert finish("run", "--drain", url=database_url).code == 0
    assert (shop.count("outbox"), shop.count("purchases")) == (0, 51)
    assert shop.outcome_of(event) == "duplicate_payment"
    assert done.record("worker_started")["guard"] == both_guards


def test_an_event_that_takes_too_long_makes_way_for_all_others(both_guards: str, database_url: str, shop: Shop) -> None:
    """The tries of the slow event take longer than a drain waits for progress.

    To postpone the event counts as progress.
    """
    run(shop, trigger(f"IF NEW.course_id = '{BAD}' THEN PERFORM pg_sleep(5); END IF;"))
    before = [pay(shop, GOOD) for _ in range(6)]
    _, slow = pay(shop, BAD)
    after = [pay(shop, GOOD) for _ in range(6)]
    done = finish("run", "--drain", url=database_url, database_deadline_seconds=0.5)
    assert done.code == 0, done
    assert [len(shop.purchases(payment)) for payment, _ in (*before, *after)] == [1] * 12
    assert shop.event(slow).attempts == 0
    assert done.record("worker_started")["guard"] == both_guards


def test_rows_that_come_free_in_time_are_settled(database_url: str, shop: Shop, connect: Connect) -> None:
    shop.pay_many(50)
    held = connect()
    held.execute("SELECT id FROM outbox ORDER BY id LIMIT 3 FOR UPDATE")
    with start("run", "--drain", url=database_url) as process:
        eventually(lambda: shop.count("outbox") == 3, "all others are settled")
        assert process.popen.poll() is None
        held.rollback()
        assert process.wait() == 0
    assert (shop.count("outbox"), shop.count("purchases")) == (0, 50)


def test_what_becomes_due_during_the_drain_is_not_its_matter(database_url: str, shop: Shop) -> None:
    """A drain ends even if a producer never stops: it takes events that were due at its start."""
    shop.pay_many(500)
    with start("run", "--drain", url=database_url, batch_size=10) as process:
        process.wait_for("worker_started")
        while process.popen.poll() is None:
            shop.pay_many(20)
            assert shop.count("payments") < 40_000, process.stderr
        assert process.wait() == 0
    assert 500 <= shop.count("purchases") < shop.count("payments")
    assert shop.count("purchases") + shop.count("outbox") == shop.count("payments")


def test_what_is_not_due_is_left(database_url: str, shop: Shop) -> None:
    shop.paid(due_in="1 hour")
    check_second_drain(database_url, shop)
    assert shop.count("outbox") == 1


def test_confirmations_and_refunds_in_turns(both_guards: str, database_url: str, shop: Shop) -> None:
    """The outbox is adopted and shared.

    The drain settles both of the worker's types and leaves the others.
    """
    shop.rows("COMMENT ON TABLE outbox IS 'the shop''s own'")
    shop.rows("DELETE FROM outbox_worker_tables WHERE table_name = 'outbox'")
    shop.pay_many(400)
    refund_every_other(shop)
    foreign = [shop.confirm(None, event_type=name) for name in ("RECEIPT_SENT", "REFUND_REPORTED")]
    done = finish("run", "--drain", url=database_url, batch_size=50)
    assert done.code == 0, done.stderr
    assert {row.event_id for row in shop.rows("SELECT event_id FROM outbox")} == set(foreign)
    assert dict(shop.rows("SELECT outcome, count(*) FROM processed_events GROUP BY 1")) == {
        "created": 200,
        "revoked": 200,
    }
    assert shop.active_pairs().total() == 200
    assert shop.scalar("SELECT guard FROM workers") == both_guards


def refund_every_other(shop: Shop) -> None:
    """Refund half of the payments.

    The refunds alternate in the outbox with the confirmations of the other payments.
    """
    shop.rows("UPDATE outbox SET event_type = 'PURCHASE_REFUNDED' WHERE id % 2 = 0")
    shop.rows(
        "UPDATE payments SET status = 'refunded' FROM outbox"
        " WHERE event_type = 'PURCHASE_REFUNDED' AND payments.id = CAST(payload ->> 'payment_id' AS uuid)"
    )
