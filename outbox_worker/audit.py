"""The proof that nothing is owed: every standing payment classed and counted, in one snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Select, Text, cast, func, select

from outbox_worker.conservation import PaymentClass, is_standing, payment_class
from outbox_worker.database import Database, seconds_since
from outbox_worker.health import READING, check_schema
from outbox_worker.model import PaymentStatus
from outbox_worker.schema import Tables


@dataclass(frozen=True, slots=True)
class FoundPayment:
    """A payment that a person should look at."""

    payment_id: UUID
    student_id: Any
    course_id: Any
    amount: Decimal
    currency: str
    created_at: datetime
    age_seconds: float


@dataclass(frozen=True, slots=True)
class AuditReport:
    counts: dict[PaymentClass, int]
    money: dict[PaymentClass, dict[str, Decimal]]
    unexplained: Sequence[FoundPayment]
    refunded_but_active: Sequence[FoundPayment]
    unknown_statuses: Mapping[str, int]
    """Payments whose status is none that we know: neither standing nor not, and so not judged."""

    @property
    def ok(self) -> bool:
        return not self.unexplained and not self.refunded_but_active


def run_audit(database: Database, tables: Tables) -> AuditReport:
    """Class every standing payment. Reads only, and sees one moment."""
    counts = dict.fromkeys(PaymentClass, 0)
    money: dict[PaymentClass, dict[str, Decimal]] = {each: {} for each in PaymentClass}
    with database.snapshot() as session:
        needed = {role: privileges for role, privileges in READING.items() if role != "workers"}
        tables = check_schema(session, tables, needed)
        for name, currency, count, amount in session.execute(_totals(tables)):
            counts[PaymentClass(name)] += count
            money[PaymentClass(name)][currency] = amount
        unexplained = [FoundPayment(*row) for row in session.execute(_unexplained(tables))]
        refunded = [FoundPayment(*row) for row in session.execute(_refunded_but_active(tables))]
        unknown = {name: count for name, count in session.execute(_unknown_statuses(tables))}  # noqa: C416 - rows
    return AuditReport(counts, money, unexplained, refunded, unknown)


def _totals(tables: Tables) -> Select[Any]:
    """what: count and money per class and currency · lock: none · index: whole tables are read, as an audit must"""
    payments = tables.payments
    classed = (
        select(
            payment_class(tables).label("class"), cast(payments.c.currency, Text).label("currency"), payments.c.amount
        )
        .where(is_standing(tables))
        .subquery()
    )
    keys = [classed.c["class"], classed.c.currency]
    return select(*keys, func.count(), func.sum(classed.c.amount)).group_by(*keys).order_by(*keys)


def _unexplained(tables: Tables) -> Select[Any]:
    """what: the payments that nothing explains, oldest first · lock: none"""
    is_unexplained = payment_class(tables) == PaymentClass.UNEXPLAINED.value
    return _found(tables).where(is_standing(tables), is_unexplained)


def _refunded_but_active(tables: Tables) -> Select[Any]:
    """what: refunded payments whose purchase still is active · lock: none · index: purchases.payment_id"""
    payments, purchases = tables.payments, tables.purchases
    of_it = purchases.c.payment_id == payments.c.id
    is_refunded = cast(payments.c.status, Text) == PaymentStatus.REFUNDED.value
    return _found(tables).where(
        is_refunded, select(purchases.c.payment_id).where(of_it, purchases.c.is_active).exists()
    )


def _unknown_statuses(tables: Tables) -> Select[Any]:
    """what: how many payments are of each status that we do not know · lock: none"""
    status: ColumnElement[Any] = cast(tables.payments.c.status, Text)
    unknown = status.not_in([known.value for known in PaymentStatus])
    return select(status, func.count()).where(unknown).group_by(status).order_by(status)


def _found(tables: Tables) -> Select[Any]:
    payments = tables.payments
    age = seconds_since(payments.c.created_at)
    columns = [payments.c[key] for key in ("id", "student_id", "course_id", "amount", "currency", "created_at")]
    return select(*columns, age).order_by(payments.c.created_at, payments.c.id)
