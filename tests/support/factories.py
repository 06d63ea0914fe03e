"""Writes and reads rows for tests: payments, events, purchases, marks and dead letters.

``Shop`` runs plain SQL on the tables with their default names, on one autocommit connection. So a
test does not read and write through the code that it tests.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple, TypeVar
from uuid import UUID, uuid4

import psycopg
from psycopg import sql
from psycopg.rows import namedtuple_row
from sqlalchemy import make_url
from sqlalchemy.schema import CreateSchema

from outbox_worker.database.engine import Database
from outbox_worker.keys import Key, KeyKind
from outbox_worker.model import PURCHASE_CONFIRMED, PURCHASE_REFUNDED, Outcome, Verdict
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import load_settings
from outbox_worker.settle.isolation import Isolation
from outbox_worker.settle.processor import Processor
from outbox_worker.store.claims import Claim
from outbox_worker.store.fast_path import FastPath
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.outbox import Outbox
from outbox_worker.store.purchases import PurchaseRepository
from outbox_worker.telemetry.reporter import BatchReport, Telemetry

ABSENT = object()
"""As a value of ``payload``, it leaves the key out. None writes a JSON null."""


_Id = TypeVar("_Id", bound=Key)


class Payment(NamedTuple):
    id: UUID
    student_id: UUID
    course_id: UUID
    amount: str
    currency: str

    @property
    def pair(self) -> tuple[UUID, UUID]:
        return self.student_id, self.course_id


class ProbedProcessor(Processor):
    """A processor whose parts a test can use. If ``meeting`` is set, it waits there after its next
    claim."""

    database: Database
    telemetry: Telemetry
    watch: GuardWatch
    path: FastPath
    outbox: Outbox
    repository: PurchaseRepository
    isolation: Isolation
    meeting: threading.Barrier | None = None
    is_careful = False
    """Whether the next batches are settled in careful transactions only."""
    judged: dict[Any, Verdict]
    """The verdicts of the careful transactions, by event."""

    def isolate_next(self, events: int) -> None:
        self.isolation.isolate_next(events)

    def set_target(self, seconds: float) -> None:
        self._pacing.limits = replace(self._pacing.limits, target_seconds=seconds)

    def note_verdicts(self) -> None:
        """Keep the verdicts that each careful transaction reports."""
        self.judged, tell = {}, self.telemetry.batch_committed

        def note(report: BatchReport) -> None:
            self.judged |= {_read_id(report.batch[key].event_id): verdict for key, verdict in report.verdicts.items()}
            tell(report)

        self.telemetry.batch_committed = note  # type: ignore[method-assign]

    def _process(self, until: datetime | None) -> BatchReport:
        return self._process_carefully(until) if self.is_careful else super()._process(until)

    def _claim(self, *arguments: Any) -> Claim:
        claim, meeting, self.meeting = super()._claim(*arguments), self.meeting, None
        if meeting is not None:
            meeting.wait()
        return claim


def _read_id(text: str) -> Key:
    """Return the id in the type that rows contain."""
    return KeyKind.UUID.parse(text) or text


def drain_all(processor: Processor, *, batches_max: int = 1000) -> Counter[Outcome]:
    """Settle until a claim is empty. Return the count of each outcome, including ``retried``."""
    outcomes: Counter[Outcome] = Counter()
    for _ in range(batches_max):
        report = processor.process_batch()
        if not report.claimed:
            return outcomes
        outcomes += report.outcomes()
    raise AssertionError(f"still claiming after {batches_max} batches: {outcomes}")


def make_payments(database: Database, tables: Tables) -> None:
    """Create the payments table under the name from the settings, because migrations do not create
    it."""
    with database.engine.begin() as connection:
        connection.execute(CreateSchema(tables.payments.schema or "public", if_not_exists=True))
        tables.payments.create(connection)


def hold_pair(connection: psycopg.Connection[Any], payment: Payment) -> None:
    """Take the pair's lock by the formula that the documentation gives to other programs."""
    connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended(CAST(student_id AS text) || ':' || CAST(course_id AS text), 0))"
        " FROM payments WHERE id = %s",
        [payment.id],
    )


def open_payment(connection: psycopg.Connection[Any]) -> UUID:
    """Write a payment and its event without COMMIT, and return the event's id. The caller must
    commit."""
    event_id = uuid4()
    connection.execute(
        "WITH paid AS (INSERT INTO payments (student_id, course_id, amount, currency, status)"
        " VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'EUR', 'succeeded') RETURNING id)"
        " INSERT INTO outbox (event_id, event_type, payload)"
        " SELECT %s, %s, jsonb_build_object('payment_id', id) FROM paid",
        (event_id, PURCHASE_CONFIRMED),
    )
    return event_id


class Shop:
    """Writes and reads the tables of one database. Every call commits before it returns."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        assert connection.autocommit, "a shop commits every call"
        self.connection = connection
        self.payment_ids: Iterator[Any] = iter(uuid4, None)
        """Gives the ids of new payments."""
        self.event_ids: Iterator[Any] = iter(uuid4, None)

    def rows(self, query: str, *values: Any) -> list[Any]:
        """Return rows as named tuples. ``values`` replace %s, or one mapping replaces %(name)s."""
        given = values[0] if len(values) == 1 and isinstance(values[0], Mapping) else values or None
        with self.connection.cursor(row_factory=namedtuple_row) as cursor:
            cursor.execute(sql.SQL(query), given)
            return cursor.fetchall() if cursor.description else []

    def scalar(self, query: str, *values: Any) -> Any:
        """Return the first column of the first row, or None if no row exists."""
        found = self.rows(query, *values)
        return found[0][0] if found else None

    # --- writers

    def payment(
        self,
        status: str = "succeeded",
        student: UUID | None = None,
        course: UUID | None = None,
        amount: str = "49.90",
        currency: str = "EUR",
        id: UUID | None = None,  # noqa: A002 - the column's name
        ago: str = "0 seconds",
    ) -> Payment:
        made = Payment(id or next(self.payment_ids), student or uuid4(), course or uuid4(), amount, currency)
        self.rows(
            "INSERT INTO payments (id, student_id, course_id, amount, currency, status, created_at)"
            " VALUES (%s, %s, %s, %s, %s, %s, clock_timestamp() - CAST(%s AS interval))",
            *(*made, status, ago),
        )
        return made

    def confirm(
        self,
        payment: Payment | None,
        event_id: UUID | None = None,
        event_type: str = PURCHASE_CONFIRMED,
        payload: Mapping[str, Any] | str | None = None,
        due_in: str = "0 seconds",
        attempts: int = 0,
    ) -> UUID:
        """Put an event into the outbox.

        If ``payload`` is a mapping, its keys override the keys of the payment (ABSENT leaves a key
        out). If ``payload`` is a str, it is the raw JSON.
        """
        event_id = event_id or next(self.event_ids)
        self.rows(
            "INSERT INTO outbox (event_id, event_type, payload, due_at, attempts)"
            " VALUES (%s, %s, CAST(%s AS jsonb), clock_timestamp() + CAST(%s AS interval), %s)",
            *(event_id, event_type, payload_text(payment, payload), due_in, attempts),
        )
        return event_id

    def refund(self, payment: Payment, event_id: UUID | None = None, **of_event: Any) -> UUID:
        """Refund a payment and write the refund event. Pass other keywords to ``confirm``."""
        self.set_status(payment, "refunded")
        return self.confirm(payment, event_id, PURCHASE_REFUNDED, **of_event)

    def paid(
        self,
        *,
        event_id: UUID | None = None,
        event_type: str = PURCHASE_CONFIRMED,
        payload: Mapping[str, Any] | str | None = None,
        due_in: str = "0 seconds",
        attempts: int = 0,
        **of_payment: Any,
    ) -> tuple[Payment, UUID]:
        """Write a payment and its event. Pass other keywords to ``payment``."""
        made = self.payment(**of_payment)
        return made, self.confirm(made, event_id, event_type, payload, due_in, attempts)

    def pay_many(
        self,
        n: int,
        *,
        pairs: int | None = None,
        status: str = "succeeded",
        amount: str = "49.90",
        currency: str = "EUR",
        event_type: str = PURCHASE_CONFIRMED,
        events: int = 1,
        due_in: str = "0 seconds",
    ) -> None:
        """Write ``n`` payments over ``pairs`` distinct pairs, with ``events`` events per
        payment."""
        self.rows(
            """
            WITH pair AS MATERIALIZED (
                SELECT k, gen_random_uuid() AS student_id, gen_random_uuid() AS course_id
                FROM generate_series(0, %(pairs)s - 1) AS k
            ), paid AS (
                INSERT INTO payments (student_id, course_id, amount, currency, status)
                SELECT student_id, course_id, CAST(%(amount)s AS numeric), %(currency)s, %(status)s
                FROM generate_series(0, %(n)s - 1) AS i JOIN pair ON pair.k = i %% %(pairs)s
                RETURNING *
            )
            INSERT INTO outbox (event_id, event_type, payload, due_at)
            SELECT gen_random_uuid(), %(event_type)s,
                   jsonb_build_object('payment_id', id, 'student_id', student_id, 'course_id', course_id,
                                      'amount', CAST(amount AS text), 'currency', currency),
                   clock_timestamp() + CAST(%(due_in)s AS interval)
            FROM paid, generate_series(1, %(events)s)
            """,
            {
                "n": n,
                "pairs": pairs or max(n, 1),
                "events": events,
                "amount": amount,
                "currency": currency,
                "status": status,
                "event_type": event_type,
                "due_in": due_in,
            },
        )

    def purchase(
        self,
        payment: Payment | None = None,
        student: UUID | None = None,
        course: UUID | None = None,
        active: bool = True,
    ) -> UUID:
        """Write a purchase of a payment. Without a payment, it is a gift to a pair (student,
        course)."""
        like = payment or Payment(uuid4(), student or uuid4(), course or uuid4(), "0.00", "EUR")
        made: UUID = self.scalar(
            "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency, is_active, deactivated_at)"
            " VALUES (%s, %s, %s, %s, %s, %s, CASE WHEN %s THEN NULL ELSE clock_timestamp() END) RETURNING id",
            *(*like.pair, payment and payment.id, like.amount, like.currency, active, active),
        )
        return made

    def mark(
        self,
        event_id: _Id,
        outcome: str = "created",
        payment_id: UUID | None = None,
        event_type: str = PURCHASE_CONFIRMED,
    ) -> _Id:
        self.rows(
            "INSERT INTO processed_events (event_id, event_type, outcome, payment_id) VALUES (%s, %s, %s, %s)",
            *(event_id, event_type, outcome, payment_id),
        )
        return event_id

    def dead_letter(
        self,
        payment: Payment | None = None,
        event_id: UUID | None = None,
        reason: str = "payment_not_found",
        state: str = "open",
        event_type: str = PURCHASE_CONFIRMED,
        payload: Mapping[str, Any] | str | None = None,
        attempts: int = 10,
        detail: str = "",
    ) -> UUID:
        event_id = event_id or next(self.event_ids)
        self.rows(
            "INSERT INTO dead_letters"
            " (event_id, event_type, payload, created_at, payment_id, attempts, reason, detail, state, resolved_at)"
            " VALUES (%s, %s, CAST(%s AS jsonb), clock_timestamp(), %s, %s, %s, %s, %s,"
            " CASE WHEN %s = 'open' THEN NULL ELSE clock_timestamp() END)",
            *(event_id, event_type, payload_text(payment, payload), payment and payment.id),
            *(attempts, reason, detail, state, state),
        )
        return event_id

    def set_status(self, payment: Payment, status: str) -> None:
        self.rows("UPDATE payments SET status = %s, updated_at = clock_timestamp() WHERE id = %s", status, payment.id)

    def make_due(self) -> None:
        """Make every postponed event due now."""
        self.rows("UPDATE outbox SET due_at = clock_timestamp() WHERE due_at > clock_timestamp()")

    # --- readers

    def outcome_of(self, event_id: UUID) -> str | None:
        """Return the outcome in the event's mark (row of ``processed_events``)."""
        outcome: str | None = self.scalar("SELECT outcome FROM processed_events WHERE event_id = %s", event_id)
        return outcome

    def mark_of(self, event_id: Key) -> Any:
        return _one(self.rows("SELECT * FROM processed_events WHERE event_id = %s", event_id))

    def event(self, event_id: UUID) -> Any:
        """Return the event's row in the outbox, or None if the outbox no longer has the event."""
        return _one(self.rows("SELECT * FROM outbox WHERE event_id = %s", event_id))

    def letter_of(self, event_id: Key) -> Any:
        return _one(self.rows("SELECT * FROM dead_letters WHERE event_id = %s", event_id))

    def purchases(self, of: Payment | tuple[UUID, UUID] | None = None) -> list[Any]:
        """Return all purchases, or only those of a payment or of a pair (student, course), oldest
        first."""
        match of:
            case None:
                return self.rows("SELECT * FROM purchases ORDER BY created_at")
            case Payment():
                return self.rows("SELECT * FROM purchases WHERE payment_id = %s ORDER BY created_at", of.id)
            case (student, course):
                return self.rows(
                    "SELECT * FROM purchases WHERE student_id = %s AND course_id = %s ORDER BY created_at",
                    student,
                    course,
                )

    def active_pairs(self) -> Counter[tuple[UUID, UUID]]:
        """Count the active purchases per (student, course). Every count should be 1."""
        return Counter(
            (row[0], row[1]) for row in self.rows("SELECT student_id, course_id FROM purchases WHERE is_active")
        )

    def owed(self) -> int:
        """Count succeeded payments without a purchase whose pair has no active purchase."""
        return int(
            self.scalar(
                "SELECT count(*) FROM payments p WHERE p.status = 'succeeded'"
                " AND NOT EXISTS (SELECT FROM purchases o WHERE o.payment_id = p.id)"
                " AND NOT EXISTS (SELECT FROM purchases h WHERE h.is_active"
                " AND h.student_id = p.student_id AND h.course_id = p.course_id)"
            )
        )

    def doubled(self) -> int:
        """Count the pairs that have more than one active purchase."""
        return sum(count > 1 for count in self.active_pairs().values())

    def sessions(self, which: str = "true") -> int:
        """Count the worker's sessions in this database. ``which`` is a condition on
        pg_stat_activity."""
        ours = "datname = current_database() AND application_name = 'outbox-worker'"
        return int(self.scalar(f"SELECT count(*) FROM pg_stat_activity WHERE {ours} AND {which}"))

    def waiting(self) -> int:
        """Count the worker's sessions that wait for a lock."""
        return self.sessions("wait_event_type = 'Lock'")

    def counted(self, series: str) -> float:
        """Return the sum of all metrics in ``workers`` whose name begins with ``series``."""
        told: list[dict[str, float]] = [metrics for (metrics,) in self.rows("SELECT metrics FROM workers")]
        return sum(value for metrics in told for name, value in metrics.items() if name.startswith(series))

    def count(self, table: str) -> int:
        return int(self.scalar(f"SELECT count(*) FROM {table}"))


class Clerk:
    """A role with the worker's privileges that is not a superuser, and a Database that connects
    with it."""

    TABLES = ("payments", "outbox", "purchases", "processed_events", "dead_letters", "workers")

    def __init__(self, shop: Shop, database_url: str) -> None:
        self.role, self._shop = f"clerk_{uuid4().hex}", shop
        self.shop_rows("CREATE ROLE {role}")
        for table in self.TABLES:
            self.grant("SELECT, INSERT, UPDATE, DELETE", table)
        url = make_url(database_url).update_query_dict({"options": f"-crole={self.role}"})
        settings = load_settings(database_url=url.render_as_string(hide_password=False))
        self.database = Database(settings, connections=2, deadline_seconds=10)

    def shop_rows(self, statement: str) -> None:
        self._shop.connection.execute(sql.SQL(statement).format(role=sql.Identifier(self.role)))

    def grant(self, privilege: str, table: str) -> None:
        self.shop_rows(f"GRANT {privilege} ON {table} TO {{role}}")

    def revoke(self, privilege: str, table: str) -> None:
        self.shop_rows(f"REVOKE {privilege} ON {table} FROM {{role}}")

    def close(self) -> None:
        self.database.close()
        self.shop_rows("DROP OWNED BY {role}")
        self.shop_rows("DROP ROLE {role}")


def payload_text(payment: Payment | None, payload: Mapping[str, Any] | str | None = None) -> str:
    """Return the JSON of an event: the payment's five keys, overridden by ``payload``. If
    ``payload`` is a str, return it unchanged."""
    if isinstance(payload, str):
        return payload
    own: dict[str, Any] = {}
    if payment is not None:
        own = {
            "payment_id": payment.id,
            "student_id": payment.student_id,
            "course_id": payment.course_id,
            "amount": payment.amount,
            "currency": payment.currency,
        }
    merged = {key: value for key, value in (own | dict(payload or {})).items() if value is not ABSENT}
    return json.dumps(merged, default=str)


def _one(rows: list[Any]) -> Any:
    assert len(rows) <= 1, rows
    return rows[0] if rows else None
