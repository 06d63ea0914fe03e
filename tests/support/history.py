"""Proves by a history that no pair had two active purchases at any moment. Triggers write the
history.

A purchase is active from the COMMIT that activated it to the COMMIT that deactivated it. The times
of statements do not show this, because a transaction can write a refund early and commit it late.
So the history is ordered by the server's commit timestamps (``track_commit_timestamp``). If a
transaction waited for another one or saw its rows, its timestamp is the later one.

If the write of a purchase is rolled back to a savepoint, its history row is rolled back, too.
"""

from __future__ import annotations

from typing import Any

import psycopg

from tests.support.factories import Shop
from tests.support.servers import libpq

SHOWN = 5

# what: one row each time a purchase becomes active or inactive, with the writer's locks and guard
_TABLE = """
    CREATE TABLE IF NOT EXISTS purchase_history (
        student_id text NOT NULL, course_id text NOT NULL, purchase_id text NOT NULL, payment_id text,
        is_active bool NOT NULL, written_at timestamptz NOT NULL, transaction_id xid8 NOT NULL, pid int NOT NULL,
        application text NOT NULL, pair_locks bigint[] NOT NULL, guard text NOT NULL
    )
"""

# The trigger fires once per statement. Reading pg_locks for each row would slow the writers down.
_WRITE = """
    CREATE OR REPLACE FUNCTION keep_purchase_history() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        held bigint[] := (
            SELECT coalesce(array_agg((l.classid::bigint << 32) | l.objid::bigint), '{}') FROM pg_locks l
            WHERE l.pid = pg_backend_pid() AND l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
        );
        told text := CASE WHEN current_query() ~ 'ON CONFLICT \\("?student_id"?, "?course_id"?\\)' THEN 'index'
                          WHEN current_query() ~ 'DO UPDATE' THEN 'refund'
                          WHEN current_query() ~ 'DISTINCT ON' THEN 'lock'
                          ELSE 'none' END;
    BEGIN
        IF TG_OP = 'UPDATE' THEN
            INSERT INTO purchase_history
            SELECT c.student_id, c.course_id, c.id, c.payment_id, c.is_active, clock_timestamp(), pg_current_xact_id(),
                   pg_backend_pid(), current_setting('application_name'), held, told
            FROM changed c JOIN before b ON b.id = c.id WHERE b.is_active IS DISTINCT FROM c.is_active;
        ELSE
            INSERT INTO purchase_history
            SELECT student_id, course_id, id, payment_id, TG_OP = 'INSERT', clock_timestamp(), pg_current_xact_id(),
                   pg_backend_pid(), current_setting('application_name'), held, told
            FROM changed WHERE is_active;
        END IF;
        RETURN NULL;
    END $$
"""
_TRIGGERS = {
    "INSERT": "NEW TABLE AS changed",
    "UPDATE": "NEW TABLE AS changed OLD TABLE AS before",
    "DELETE": "OLD TABLE AS changed",
}

# what: two purchases of one pair whose times as active purchases overlap, by commit
_OVERLAPS = """
    WITH told AS MATERIALIZED (
        SELECT h.*, pg_xact_commit_timestamp(h.xmin) AS committed_at FROM purchase_history h
        WHERE (student_id, course_id) IN (
            SELECT student_id, course_id FROM purchase_history WHERE is_active
            GROUP BY 1, 2 HAVING count(DISTINCT purchase_id) > 1
        )
    ), span AS MATERIALIZED (
        SELECT t.*, coalesce((
            SELECT min(e.committed_at) FROM told e
            WHERE e.purchase_id = t.purchase_id AND NOT e.is_active AND e.committed_at >= t.committed_at
        ), 'infinity') AS ended_at
        FROM told t WHERE t.is_active
    )
    SELECT one.student_id, one.course_id, one.purchase_id, one.payment_id,
           one.committed_at::text, one.ended_at::text,
           one.application, one.pid, one.guard,
           hashtextextended(one.student_id || ':' || one.course_id, 0) = ANY(one.pair_locks) AS is_locked,
           other.purchase_id AS other_purchase_id, other.payment_id AS other_payment_id,
           other.committed_at::text AS other_committed_at, other.ended_at::text AS other_ended_at,
           other.application AS other_application, other.pid AS other_pid, other.guard AS other_guard,
           hashtextextended(one.student_id || ':' || one.course_id, 0) = ANY(other.pair_locks) AS other_is_locked
    FROM span one JOIN span other USING (student_id, course_id)
    WHERE (one.committed_at, one.purchase_id) < (other.committed_at, other.purchase_id)
      AND other.committed_at < one.ended_at AND one.committed_at < other.ended_at
    ORDER BY other.committed_at
"""


def keep_history(shop: Shop) -> None:
    """From now on, record when each purchase becomes active and inactive."""
    shop.rows(_TABLE)
    shop.rows("CREATE INDEX IF NOT EXISTS purchase_history_pair ON purchase_history (student_id, course_id)")
    shop.rows(_WRITE)
    for operation, rows in _TRIGGERS.items():
        name = f"keep_purchase_history_{operation.lower()}"
        shop.rows(
            f"CREATE OR REPLACE TRIGGER {name} AFTER {operation} ON purchases REFERENCING {rows}"
            " FOR EACH STATEMENT EXECUTE FUNCTION keep_purchase_history()"
        )


def find_twice_active(shop: Shop) -> list[Any]:
    """Return each two purchases of a pair that were active at the same moment, with their writers'
    locks and guards."""
    assert shop.scalar("SHOW track_commit_timestamp") == "on", "the server keeps no commit timestamps"
    assert not shop.count("purchase_history WHERE pg_xact_commit_timestamp(xmin) IS NULL"), "commit timestamps are gone"
    return shop.rows(_OVERLAPS)


def assert_never_twice_active(url: str) -> int:
    """Assert that no pair had two active purchases at any moment after ``keep_history``. Return how
    many purchases were active."""
    with psycopg.connect(libpq(url), autocommit=True) as connection:
        shop = Shop(connection)
        found = find_twice_active(shop)
        assert not found, f"{len(found)} times active twice, first:\n" + "\n".join(map(str, found[:SHOWN]))
        return shop.count("purchase_history WHERE is_active")
