"""The baselines of the benchmark: bare SQL that does the same work, and a loop that settles events one by one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg

FILL = """
    WITH paid AS (
        INSERT INTO payments (student_id, course_id, amount, currency, status)
        SELECT gen_random_uuid(), gen_random_uuid(), 49.90, 'EUR', 'succeeded' FROM generate_series(1, %s)
        RETURNING *
    )
    INSERT INTO outbox (event_id, event_type, payload)
    SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED',
           jsonb_build_object('payment_id', id, 'student_id', student_id, 'course_id', course_id,
                              'amount', amount, 'currency', currency)
    FROM paid
"""

FILL_MIXED = """
    WITH numbered AS MATERIALIZED (
        SELECT n, gen_random_uuid() AS event_id, gen_random_uuid() AS payment_id, gen_random_uuid() AS student_id,
               gen_random_uuid() AS course_id, n %% 100 IN (10, 40, 70) AS is_redelivered, n %% 50 = 1 AS is_second,
               n %% 100 = 30 AS is_early, n %% 1000 = 505 AS is_poison, n %% 100 IN (20, 60, 90) AS is_refund
        FROM generate_series(1, %s) AS n
    ), drawn AS MATERIALIZED (
        SELECT n, event_id, payment_id, is_redelivered, is_early, is_poison, is_refund,
               CASE WHEN is_second AND n > 1 THEN lag(student_id) OVER by_number ELSE student_id END AS student_id,
               CASE WHEN is_second AND n > 1 THEN lag(course_id) OVER by_number ELSE course_id END AS course_id
        FROM numbered WINDOW by_number AS (ORDER BY n)
    ), paid AS (
        INSERT INTO payments (id, student_id, course_id, amount, currency, status)
        SELECT payment_id, student_id, course_id, 49.90, 'EUR', CASE WHEN is_refund THEN 'refunded' ELSE 'succeeded' END
        FROM drawn WHERE NOT is_early AND NOT is_poison
    ), bought AS (
        INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)
        SELECT student_id, course_id, payment_id, 49.90, 'EUR' FROM drawn WHERE is_redelivered OR is_refund
    ), marked AS (
        INSERT INTO processed_events (event_id, event_type, outcome, payment_id)
        SELECT event_id, 'PURCHASE_CONFIRMED', 'created', payment_id FROM drawn WHERE is_redelivered
    )
    INSERT INTO outbox (event_id, event_type, payload)
    SELECT event_id, CASE WHEN is_refund THEN 'PURCHASE_REFUNDED' ELSE 'PURCHASE_CONFIRMED' END,
           CASE WHEN is_poison THEN '[]' ELSE
               jsonb_build_object('payment_id', payment_id, 'student_id', student_id, 'course_id', course_id,
                                  'amount', 49.90, 'currency', 'EUR') END
    FROM drawn ORDER BY n
"""
"""Fills the outbox with a mix: 3 % of the events are redelivered, and 3 % are refunds.

2 % are second payments of a pair (a student and a course). 1 % come before their payment. 0.1 %
have an unreadable payload.
"""

# what: claims up to 1,000 events, inserts their purchases and marks, and deletes the events, all without checks
BARE = """
    WITH claimed AS MATERIALIZED (
        SELECT id, event_id, event_type, payload FROM outbox WHERE due_at <= statement_timestamp()
        ORDER BY due_at, id LIMIT 1000 FOR UPDATE SKIP LOCKED
    ), bought AS (
        INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)
        SELECT CAST(payload ->> 'student_id' AS uuid), CAST(payload ->> 'course_id' AS uuid),
               CAST(payload ->> 'payment_id' AS uuid), CAST(payload ->> 'amount' AS numeric), payload ->> 'currency'
        FROM claimed ON CONFLICT DO NOTHING
    ), marked AS (
        INSERT INTO processed_events (event_id, event_type, outcome, payment_id)
        SELECT event_id, event_type, 'created', CAST(payload ->> 'payment_id' AS uuid) FROM claimed
        ON CONFLICT DO NOTHING
    )
    DELETE FROM outbox USING claimed WHERE outbox.id = claimed.id
"""

_CLAIM_ONE = """
    SELECT id, event_id, event_type, payload FROM outbox WHERE due_at <= statement_timestamp()
    ORDER BY due_at, id LIMIT 1 FOR UPDATE SKIP LOCKED
"""
_BUY_ONE = """
    INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)
    VALUES (%(student_id)s, %(course_id)s, %(payment_id)s, %(amount)s, %(currency)s) ON CONFLICT DO NOTHING
"""
_MARK_ONE = """
    INSERT INTO processed_events (event_id, event_type, outcome, payment_id) VALUES (%s, %s, 'created', %s)
    ON CONFLICT DO NOTHING
"""


def drain_bare(conninfo: str, connections: int) -> float:
    """Settle all events by the statement ``BARE`` on several connections. Return the time in s."""
    with ThreadPoolExecutor(connections) as pool:
        begin = time.monotonic()
        list(pool.map(_drain_bare, [conninfo] * connections))
        return time.monotonic() - begin


def _drain_bare(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        while connection.execute(BARE).rowcount:
            pass


def drain_one_by_one(conninfo: str) -> float:
    """Settle all events one at a time, each in its own transaction. Return the time in s."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        begin = time.monotonic()
        while all(map(partial(_settle_one, connection), range(100))):
            pass
        return time.monotonic() - begin


def _settle_one(connection: psycopg.Connection, _turn: int) -> bool:
    with connection.transaction():
        event = connection.execute(_CLAIM_ONE).fetchone()
        if event is None:
            return False
        key, event_id, event_type, payload = event
        connection.execute(_BUY_ONE, payload)
        connection.execute(_MARK_ONE, (event_id, event_type, payload["payment_id"]))
        connection.execute("DELETE FROM outbox WHERE id = %s", (key,))
    return True
