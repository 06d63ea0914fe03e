"""Checks whether a purchase is owed.

The audit classifies every succeeded payment and counts the payments of each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import Select, func, literal, select
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import QUERY_CANCELED, sqlstate
from outbox_worker.model import FoundPayment, UnjudgedPayment
from outbox_worker.reconcile.scan import PaymentScan, ScanPaths, ScanRange, Throttle
from outbox_worker.schema.privileges import EXPLAINING
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables
from outbox_worker.store.doubled import DoubledPair, doubled_pairs
from outbox_worker.store.payment_classes import PaymentClass
from outbox_worker.store.queries import database_time, is_succeeded

_PATIENCE_SECONDS = 3600.0
"""The deadline for the second try of the statement that groups all purchases. The first try has the usual deadline."""
_SOON = literal(timedelta(hours=1))


@dataclass(frozen=True, slots=True)
class AuditReport:
    counts: dict[PaymentClass, int]
    money: dict[PaymentClass, dict[str, Decimal]]
    unexplained: Sequence[FoundPayment]
    refunded_but_active: Sequence[FoundPayment]
    pairs_twice_active: Sequence[DoubledPair]
    """Pairs of student and course that have more than one active purchase."""
    cannot_be_judged: Sequence[UnjudgedPayment]
    """Succeeded payments that fit no class because of a value, for example because their student is NULL."""
    unknown_statuses: Mapping[str, int]
    """Maps each status that the worker does not know to its number of payments. The audit does not
    classify these payments."""
    dated_ahead: int
    """The number of succeeded payments that are dated more than an hour in the future. The audit
    does not classify these payments."""

    @property
    def ok(self) -> bool:
        return not (
            self.unexplained
            or self.refunded_but_active
            or self.pairs_twice_active
            or self.cannot_be_judged
            or self.unknown_statuses
        )


class Audit:
    """Classifies every succeeded payment that was created before the audit began. Changes nothing.

    Also finds pairs of student and course that have more than one active purchase.
    """

    def __init__(self, database: Database, tables: Tables, scan: PaymentScan, dated_ahead: int) -> None:
        self._database, self._tables = database, tables
        self._scan = scan
        self._dated_ahead = dated_ahead

    @classmethod
    def start(cls, database: Database, tables: Tables) -> Audit:
        """Check tables and privileges. Raises SchemaError.

        The range of the audit ends at the current time of the database.
        """
        with database.transaction() as session:
            tables = check_schema(session, tables, EXPLAINING)
            began, paths = database_time(session), ScanPaths.read(session, tables)
            dated_ahead = session.scalars(_count_dated_ahead(tables)).one()
        scan = PaymentScan(database, tables, paths, ScanRange(None, began), looks_ahead=True)
        return cls(database, tables, scan, dated_ahead)

    def estimate(self) -> int:
        """Return the planner's estimate of the number of payments."""
        return self._scan.estimate()

    def run(self, throttle: Throttle = lambda *_: True) -> AuditReport:
        """Classify all payments, and find pairs that have more than one active purchase.

        Calls ``throttle`` after each statement.
        """
        self._scan.run(throttle)
        totals = self._scan.totals
        return AuditReport(
            counts=totals.counts,
            money=totals.money,
            unexplained=sorted(totals.unexplained, key=lambda payment: payment.age),
            refunded_but_active=sorted(totals.refunded_but_active, key=lambda payment: payment.age),
            pairs_twice_active=self._doubled_pairs(),
            cannot_be_judged=sorted(totals.cannot_be_judged, key=lambda payment: payment.age),
            unknown_statuses=dict(sorted(totals.unknown_statuses.items())),
            dated_ahead=self._dated_ahead,
        )

    def _doubled_pairs(self) -> Sequence[DoubledPair]:
        """Find pairs that have more than one active purchase.

        The statement groups all active purchases, and cannot be divided into shorter statements.
        Without an index on the pair, PostgreSQL must sort all active purchases. If the statement
        exceeds its deadline, repeat it with a longer deadline.
        """
        try:
            return _doubled_pairs(self._database, self._tables)
        except DBAPIError as error:
            if sqlstate(error) != QUERY_CANCELED:
                raise
        patient = self._database.with_deadline(_PATIENCE_SECONDS)
        try:
            return _doubled_pairs(patient, self._tables)
        finally:
            patient.close()


def _doubled_pairs(database: Database, tables: Tables) -> Sequence[DoubledPair]:
    with database.transaction() as session:
        return doubled_pairs(session, tables)


def _count_dated_ahead(tables: Tables) -> Select[Any]:
    """what: how many succeeded payments are dated more than an hour in the future
    lock: none · index: the shop's index on created_at; if there is none, the statement reads all payments
    """
    payments = tables.payments
    is_ahead = payments.c.created_at > func.statement_timestamp() + _SOON
    return select(func.count()).select_from(payments).where(is_succeeded(payments), is_ahead)
