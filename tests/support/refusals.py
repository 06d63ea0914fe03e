"""Reasons for which a database can refuse a purchase.

In every case, the schema refuses purchases of one course, ``BAD``. The cases differ in how it
refuses them.
"""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

from outbox_worker.model import PURCHASE_CONFIRMED
from tests.support.factories import Payment, Shop

GOOD, BAD = UUID(int=1), UUID(int=2)


class Refusal(NamedTuple):
    sqlstate: str
    schema: str
    """SQL that makes the schema refuse purchases of ``BAD``."""
    cure: str
    also: str = ""
    """SQL to run for each payment of ``BAD``, with the parameters (student, course)."""
    is_arbiter: bool = False
    """Whether the refusing index is also the arbiter of ON CONFLICT under the guard ``index``. The
    INSERT then skips the row without an error."""


def trigger(body: str, kind: str = "TRIGGER refuse BEFORE") -> str:
    timing = "DEFERRABLE INITIALLY DEFERRED " if "CONSTRAINT" in kind else ""
    return (
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$;"
        f"CREATE {kind} INSERT ON purchases {timing}FOR EACH ROW EXECUTE FUNCTION refuse()"
    )


def raising(state: str, only_bad: bool = True, kind: str = "TRIGGER refuse BEFORE") -> str:
    when = f"NEW.course_id = '{BAD}'" if only_bad else "true"
    return trigger(f"IF {when} THEN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END IF;", kind)


CATALOGUE = f"CREATE TABLE courses (id uuid PRIMARY KEY); INSERT INTO courses VALUES ('{GOOD}');"
REFERENCE = "ALTER TABLE purchases ADD CONSTRAINT fk FOREIGN KEY (course_id) REFERENCES courses"
NO_TRIGGER = "DROP TRIGGER refuse ON purchases"
REFUSALS = {
    "foreign key": Refusal("23503", CATALOGUE + REFERENCE, f"INSERT INTO courses VALUES ('{BAD}')"),
    "check": Refusal(
        "23514",
        f"ALTER TABLE purchases ADD CONSTRAINT ck CHECK (course_id <> '{BAD}')",
        "ALTER TABLE purchases DROP CONSTRAINT ck",
    ),
    "trigger": Refusal("P0001", raising("P0001"), NO_TRIGGER),
    "overflow": Refusal(
        "22003",
        "ALTER TABLE purchases ALTER amount TYPE numeric(4, 2)",
        "ALTER TABLE purchases ALTER amount TYPE numeric",
    ),
    "not null": Refusal("23502", trigger(f"IF NEW.course_id = '{BAD}' THEN NEW.currency = NULL; END IF;"), NO_TRIGGER),
    "inactive row in a full unique index": Refusal(
        "23505",
        "CREATE UNIQUE INDEX whole ON purchases (student_id, course_id)",
        "DROP INDEX whole",
        "INSERT INTO purchases (student_id, course_id, amount, currency, is_active) VALUES (%s, %s, 0, 'EUR', false)",
        is_arbiter=True,
    ),
    "exclusion": Refusal(
        "23P01",
        f"ALTER TABLE purchases ADD CONSTRAINT ex EXCLUDE USING btree (course_id WITH =) WHERE (course_id = '{BAD}');"
        f"INSERT INTO purchases (student_id, course_id, amount, currency) VALUES ('{GOOD}', '{BAD}', 0, 'EUR')",
        "ALTER TABLE purchases DROP CONSTRAINT ex",
    ),
    "trigger at COMMIT": Refusal("P0001", raising("P0001", kind="CONSTRAINT TRIGGER refuse AFTER"), NO_TRIGGER),
    "foreign key at COMMIT": Refusal(
        "23503",
        f"{CATALOGUE}{REFERENCE} DEFERRABLE INITIALLY DEFERRED",
        f"INSERT INTO courses VALUES ('{BAD}')",
    ),
    "unclear class": Refusal("42501", raising("42501"), NO_TRIGGER),
    "unclear class at COMMIT": Refusal("42P01", raising("42P01", kind="CONSTRAINT TRIGGER refuse AFTER"), NO_TRIGGER),
    "a limit": Refusal("54000", raising("54000"), NO_TRIGGER),
}


def run(shop: Shop, statements: str) -> None:
    """Run several SQL statements that are separated by semicolons."""
    shop.connection.execute(statements, prepare=False)


def pay(shop: Shop, course: UUID, attempts: int = 0) -> tuple[Payment, UUID]:
    """Write a payment and its event. The amount of a ``BAD`` payment does not fit into numeric(4,
    2)."""
    return shop.paid(course=course, amount="100.00" if course == BAD else "49.90", attempts=attempts)


def pay_many(shop: Shop, n: int, course: UUID) -> None:
    """Write payments of ``n`` students for one course. The student ids, and so the order of the
    pairs, are the same in every run."""
    shop.rows(
        """
        WITH paid AS (
            INSERT INTO payments (student_id, course_id, amount, currency, status)
            SELECT CAST(md5(CAST(i + (SELECT count(*) FROM payments) AS text)) AS uuid), %s, 49.90, 'EUR', 'succeeded'
            FROM generate_series(1, %s) AS i RETURNING id
        )
        INSERT INTO outbox (event_id, event_type, payload)
        SELECT gen_random_uuid(), %s, jsonb_build_object('payment_id', id) FROM paid
        """,
        *(course, n, PURCHASE_CONFIRMED),
    )
