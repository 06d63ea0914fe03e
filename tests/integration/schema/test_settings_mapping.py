"""Other names for tables and columns change nothing: the same past leads to the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import delete, insert, select, text

from outbox_worker.database.engine import Database
from outbox_worker.decision import Limits
from outbox_worker.diagnose.explanation import Explanation, explain
from outbox_worker.model import COLUMNS, Guard, Outcome
from outbox_worker.reconcile.audit import Audit
from outbox_worker.reconcile.backfill import Backfill, Request
from outbox_worker.schema import migrate as migration
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import load_settings
from outbox_worker.settle.isolation import Isolation
from outbox_worker.settle.pacing import Pacing
from outbox_worker.settle.processor import Processor
from outbox_worker.store.doors import Doors
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.payment_classes import PaymentClass
from outbox_worker.store.workers import Workers
from outbox_worker.telemetry.reporter import Telemetry
from tests.support.factories import ABSENT, Shop, drain_all, make_payments

MAPPINGS: dict[str, dict[str, Any]] = {
    "sample": {
        "tables": {
            "payments": "billing.payment",
            "outbox": "Order",
            "purchases": "user",
            "processed_events": "Processed Events",
            "dead_letters": "dead-letters",
            "workers": "select",
            "backfill_runs": "Full",
        },
        "columns": {
            "payments.student_id": "user_id",
            "payments.status": "State",
            "outbox.event_type": "type",
            "outbox.payload": "order",
            "outbox.due_at": "dueAt",
            "purchases.is_active": "Active",
            "purchases.student_id": "user",
            "processed_events.outcome": "Result",
            "dead_letters.state": "State",
            "dead_letters.event_id": "event",
            "workers.id": "Worker",
            "payments.created_at": "paidAt",
            "backfill_runs.cursor": "limit",
            "backfill_runs.counts": "Counts",
        },
    },
    "all": {
        "schema": "Work",
        "tables": {role: f'Our "{role}"' for role in COLUMNS},
        "columns": {f"{role}.{key}": f'The "{key}"' for role, keys in COLUMNS.items() for key in keys},
    },
    "swapped": {
        "columns": {
            "payments.student_id": "course_id",
            "payments.course_id": "student_id",
            "purchases.payment_id": "id",
            "purchases.id": "payment_id",
            "outbox.created_at": "due_at",
            "outbox.due_at": "created_at",
        },
    },
}
"""Other names: likely names of a shop, names that need quotes, and names of other columns."""

EACH = ["all", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sample", "swapped"))]
"""Every run uses names that need quotes everywhere. The slow run uses the other mappings, too."""

TIMES = {
    "purchases": ("id", "created_at", "deactivated_at"),
    "processed_events": ("processed_at", "recovered_at"),
    "dead_letters": ("dead_at", "resolved_at"),
    "outbox": ("due_at",),
}
"""Columns with times or random values."""


class Site:
    """A migrated database under some names, and a processor on it."""

    def __init__(self, url: str, options: tuple[str, ...], named: dict[str, Any]) -> None:
        self.settings = load_settings(database_url=url, **named)
        self.tables: Tables = build_tables(self.settings)
        self.database = Database(self.settings, deadline_seconds=10)
        self.watch = GuardWatch(self.tables.purchases, lambda _: None)
        self._options = options

    def migrate(self) -> None:
        if "payments" in self.settings.tables:
            make_payments(self.database, self.tables)
        migration.upgrade(self.database, self.settings, self.tables, self._options)
        with self.database.transaction() as session:
            self.watch.probe(session)

    def processor(self, batch_size: int = 1000) -> Processor:
        doors, pacing = Doors.of(self.tables, None), Pacing(Limits(self.settings.retry_policy, batch_size, 60))
        isolation = Isolation(self.database, Workers(self.tables, uuid4()))
        return Processor(self.database, doors, self.watch, Telemetry(), pacing, isolation, lambda: None)

    def audit(self) -> dict[PaymentClass, int]:
        return Audit.start(self.database, self.tables).run().counts

    def why(self, asked: object) -> Explanation:
        with self.database.snapshot() as session:
            return explain(session, self.tables, self.settings.retry_policy, None, str(asked))

    def backfill(self) -> Backfill:
        request = Request(actor="somebody", older_than=timedelta(0))
        return Backfill.start(self.database, self.tables, self.settings.retry_policy, request)

    def take_over(self, other: Site) -> None:
        """Copy every row of another site."""
        for role, table in self.tables.by_role().items():
            rows = other.rows(role)
            if rows:
                with self.database.transaction() as session:
                    session.execute(insert(table).values([{table.c[key]: row[key] for key in row} for row in rows]))

    def forget(self) -> None:
        """Delete every row."""
        for table in self.tables.by_role().values():
            with self.database.transaction() as session:
                session.execute(delete(table))

    def rows(self, role: str) -> list[dict[str, Any]]:
        table = self.tables.by_role()[role]
        columns = [table.c[key].label(f"_{position}") for position, key in enumerate(COLUMNS[role])]
        with self.database.transaction() as session:
            return [dict(zip(COLUMNS[role], row, strict=True)) for row in session.execute(select(*columns))]

    def present(self) -> dict[str, Counter[str]]:
        """Return the rows of all tables, without times and random values."""
        return {role: Counter(self._plain(role)) for role in COLUMNS}

    def _plain(self, role: str) -> Iterator[str]:
        for row in self.rows(role):
            kept = {key: value for key, value in row.items() if key not in TIMES.get(role, ())}
            given = {f"{key}?": row[key] is not None for key in TIMES.get(role, ())}
            yield repr(kept | given)


Sites = Callable[..., Site]


@pytest.fixture
def make_site(make_url: Callable[[str | None], str], both_guards: str) -> Iterator[Sites]:
    with ExitStack() as stack:

        def make(**named: Any) -> Site:
            options = ("unique_index",) if both_guards == "index" else ()
            site = Site(make_url(None), options, named)
            stack.callback(site.database.close)
            site.migrate()
            assert site.watch.state.guard is Guard(both_guards)
            return site

        yield make


def write_the_past(shop: Shop) -> None:
    """Write every outcome at least once, and dead letters to be settled, reopened or left."""
    shop.pay_many(20)
    shop.pay_many(6, pairs=2, events=2)
    recovered, event = shop.paid()
    shop.mark(event, "created")
    marked_duplicate, event = shop.paid()
    shop.mark(event, "duplicate_payment", marked_duplicate.id)
    active, _ = shop.paid()
    shop.purchase(active)
    revoked, _ = shop.paid()
    shop.purchase(revoked, active=False)
    second, _ = shop.paid()
    shop.purchase(student=second.student_id, course=second.course_id)
    shop.paid(status="refunded")
    shop.paid(status="pending")
    shop.paid(status="failed", attempts=9)
    shop.confirm(None, payload={"payment_id": uuid4()})
    shop.paid(payload={"amount": "1.00"})
    shop.paid(payload={"student_id": uuid4(), "currency": "USD"})
    shop.paid(payload={"amount": ABSENT, "currency": None, "student_id": str(recovered.student_id).upper()})
    shop.paid(event_type="PURCHASE_UNHEARD_OF")
    shop.confirm(None, payload="[]")
    _, event = shop.paid()
    shop.mark(event, "created", uuid4())
    payment = shop.payment()
    shop.confirm(payment, shop.dead_letter(payment))
    reopened = shop.payment(status="pending")
    shop.confirm(reopened, shop.dead_letter(reopened, state="discarded"), attempts=9)
    shop.dead_letter(shop.payment())
    shop.paid(due_in="1 hour")
    refunded, _ = shop.paid()
    shop.purchase(refunded)
    shop.payment("succeeded", *refunded.pair)
    shop.refund(refunded)
    shop.refund(shop.payment())


@pytest.fixture
def settled(make_site: Sites, request: pytest.FixtureRequest) -> tuple[Site, Site, Counter[Outcome], Counter[Outcome]]:
    """Settle the same past under the default names and under other names."""
    plain = make_site()
    with psycopg.connect(plain.settings.conninfo, autocommit=True) as connection:
        write_the_past(Shop(connection))
    mapped = make_site(**MAPPINGS[request.param])
    mapped.take_over(plain)
    assert mapped.present() == plain.present()
    return plain, mapped, drain_all(plain.processor()), drain_all(mapped.processor())


@pytest.mark.parametrize("settled", EACH, indirect=True)
def test_other_names_same_results(settled: tuple[Site, Site, Counter[Outcome], Counter[Outcome]]) -> None:
    plain, mapped, expected, outcomes = settled
    assert set(expected) == set(Outcome)
    assert outcomes == expected
    before, after = plain.present(), mapped.present()
    for role in COLUMNS:
        assert after[role] == before[role], role
    assert sum(after["purchases"].values()) > 25


@pytest.mark.parametrize("name", EACH)
def test_the_same_stories_under_other_names(name: str, make_site: Sites) -> None:
    """Explain events in the outbox, dead letters and marks."""
    plain, mapped = make_site(), make_site(**MAPPINGS[name])
    with psycopg.connect(plain.settings.conninfo, autocommit=True) as connection:
        write_the_past(Shop(connection))
    asked = [row["event_id"] for row in plain.rows("outbox")[::3]]
    for _ in range(2):
        mapped.take_over(plain)
        for event in asked:
            assert mapped.why(event) == plain.why(event)
        drain_all(plain.processor())
        mapped.forget()


@pytest.mark.parametrize("name", EACH)
def test_audit_and_backfill_under_other_names(name: str, make_site: Sites) -> None:
    """Compare what is found, what is made, and how a killed backfill goes on."""
    plain, mapped = make_site(), make_site(**MAPPINGS[name])
    with psycopg.connect(plain.settings.conninfo, autocommit=True) as connection:
        write_the_past(Shop(connection))
        Shop(connection).rows("DELETE FROM outbox WHERE id % 3 = 0")
    mapped.take_over(plain)
    assert mapped.audit() == plain.audit()
    for site in (plain, mapped):
        work = site.backfill()
        work.look(lambda *_: True)  # it never writes a sign of life again
    reports = [site.backfill() for site in (plain, mapped)]
    owed = [report.look(lambda *_: True) for report in reports]
    made = [report.make(lambda *_: True) for report in reports]
    assert all(each.continued for each in made)
    assert owed[0] == owed[1] == made[1].counts.made.count > 5
    assert made[0].counts == made[1].counts
    assert mapped.audit() == plain.audit()
    assert mapped.present()["processed_events"] == plain.present()["processed_events"]


def test_a_fallback_in_the_middle_works_under_other_names(make_site: Sites, both_guards: str) -> None:
    """The index is gone and the worker has not noticed.

    It meets 42P10 while it uses the other names.
    """
    plain, mapped = make_site(), make_site(**MAPPINGS["sample"])
    with psycopg.connect(plain.settings.conninfo, autocommit=True) as connection:
        Shop(connection).pay_many(30, pairs=10)
    mapped.take_over(plain)
    if both_guards == "index":
        with mapped.database.transaction() as session:
            session.execute(text("DROP INDEX purchases_active_student_course_key"))
    assert drain_all(mapped.processor(7)) == {Outcome.CREATED: 10, Outcome.DUPLICATE_PAYMENT: 20}
    assert mapped.watch.state.guard is Guard.LOCK
