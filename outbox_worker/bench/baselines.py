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
    """Settle all events by the statement ``BARE`` on ``connections`` connections. Return the seconds that this took."""
    with ThreadPoolExecutor(connections) as pool:
        begin = time.monotonic()
        list(pool.map(_drain_bare, [conninfo] * connections))
        return time.monotonic() - begin


def _drain_bare(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        while connection.execute(BARE).rowcount:
            pass


def drain_one_by_one(conninfo: str) -> float:
    """Settle all events one at a time, each in its own transaction. Return the seconds that this took."""
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
