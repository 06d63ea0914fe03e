"""The proof that nothing is owed: every standing payment classed and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import Select, Text, cast, func, literal, select

from outbox_worker.database.engine import Database
from outbox_worker.model import FoundPayment, PaymentStatus
from outbox_worker.reconcile.scan import PaymentScan, ScanRange, Throttle
from outbox_worker.schema.privileges import READING
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables
from outbox_worker.store.payment_classes import PaymentClass

_SOON = literal(timedelta(hours=1))
_READ = ("payments", "outbox", "purchases", "processed_events", "dead_letters")


@dataclass(frozen=True, slots=True)
class AuditReport:
    counts: dict[PaymentClass, int]
    money: dict[PaymentClass, dict[str, Decimal]]
    unexplained: Sequence[FoundPayment]
    refunded_but_active: Sequence[FoundPayment]
    unknown_statuses: Mapping[str, int]
    """Payments whose status is none that we know: neither standing nor not, and so not judged."""
    dated_ahead: int
    """Standing payments that will be created in more than an hour, if one believes them; not judged."""

    @property
    def ok(self) -> bool:
        return not self.unexplained and not self.refunded_but_active


class Audit:
    """Classes every standing payment that was created before the audit began. Reads only."""

    def __init__(self, database: Database, tables: Tables) -> None:
        with database.transaction() as session:
            tables = check_schema(session, tables, {role: READING[role] for role in _READ})
            began, self._ahead = session.execute(_begin(tables)).one()
        self._scan = PaymentScan(database, tables, ScanRange(None, began))

    def estimate(self) -> int:
        """About how many payments there are."""
        return self._scan.estimate()

    def run(self, throttle: Throttle = lambda *_: True) -> AuditReport:
        """Look at all of them; ``throttle`` is told after each statement."""
        self._scan.run(throttle)
        totals = self._scan.totals
        return AuditReport(
            counts=totals.counts,
            money=totals.money,
            unexplained=sorted(totals.unexplained, key=lambda payment: payment.age),
            refunded_but_active=sorted(totals.refunded_but_active, key=lambda payment: payment.age),
            unknown_statuses=dict(sorted(totals.unknown_statuses.items())),
            dated_ahead=self._ahead,
        )


def _begin(tables: Tables) -> Select[Any]:
    """what: the moment up to which is judged, and how many payments lie far behind it
    lock: none · index: the shop's on created_at; where there is none, all are read once
    """
    payments, now = tables.payments, func.clock_timestamp()
    is_standing = cast(payments.c.status, Text) == PaymentStatus.SUCCEEDED.value
    ahead = select(func.count()).where(is_standing, payments.c.created_at > func.statement_timestamp() + _SOON)
    return select(now, ahead.scalar_subquery())
