"""Lists duplicates: payments for a course that another active purchase gives the student already.

The other purchase is paid or a gift. The shop must refund a duplicate only if the payment of the
other purchase is not refunded. If the shop refunded both payments, the student would lose the
course. A duplicate leaves the list if the shop refunds it, or if the other purchase becomes
inactive. No table stores the list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, and_, bindparam, false, func, select

from outbox_worker.database.arrays import Keys
from outbox_worker.database.engine import Database
from outbox_worker.database.expressions import readable
from outbox_worker.database.statements import Statement
from outbox_worker.keys import Key
from outbox_worker.model import FoundPayment, PaymentStatus
from outbox_worker.reconcile.scan import PaymentScan, ScanPaths, ScanRange, Throttle
from outbox_worker.schema.privileges import Privileges, reading
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables
from outbox_worker.store.identity import same_pair
from outbox_worker.store.queries import database_time, has_status, read_key

_NEEDED: Privileges = reading("payments", "outbox", "purchases", "dead_letters")
_TOGETHER = 10_000
"""One statement reads the other purchases of at most this many duplicates."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A payment for a course that the student already has, and the purchase that gives the
    course."""

    payment: FoundPayment
    purchase_id: Any
    held_by: Key | None
    """The payment of the other purchase. None means that the other purchase is a gift."""
    held_since: datetime | None
    """When the other purchase was made. None means that the time is missing, or that Python cannot
    represent it."""
    is_holder_refunded: bool
    """Whether the payment of the other purchase is refunded. If that payment is refunded, the shop
    must not refund the duplicate. The duplicate gets the purchase when a worker settles the refund
    event."""


def owed_back(found: Iterable[Duplicate]) -> list[Duplicate]:
    """Return the duplicates that must be refunded."""
    return [each for each in found if not each.is_holder_refunded]


class Duplicates:
    """Lists the duplicates among all payments created before the start. Changes nothing."""

    def __init__(self, database: Database, tables: Tables, scan: PaymentScan) -> None:
        self._database = database
        self._scan = scan
        self._holders = Statement(_holders(tables))

    @classmethod
    def start(cls, database: Database, tables: Tables) -> Duplicates:
        """Check tables and privileges. Raises SchemaError.

        The range of the list ends at the current time of the database.
        """
        with database.transaction() as session:
            tables = check_schema(session, tables, _NEEDED)
            began, paths = database_time(session), ScanPaths.read(session, tables)
        scan = PaymentScan(database, tables, paths, ScanRange(None, began), lists=0, lists_duplicates=True)
        return cls(database, tables, scan)

    def estimate(self) -> int:
        """Return the planner's estimate of the number of payments."""
        return self._scan.estimate()

    def list(self, throttle: Throttle = lambda *_: True) -> Sequence[Duplicate]:
        """List all duplicates, oldest first. Calls ``throttle`` after each statement."""
        self._scan.run(throttle)
        found = sorted(self._scan.totals.duplicates, key=lambda payment: payment.age)
        parts = [found[start : start + _TOGETHER] for start in range(0, len(found), _TOGETHER)]
        holders = {key: holder for part in parts for key, holder in self._look_up(part).items()}
        return [Duplicate(each, *holders[each.payment_id]) for each in found if each.payment_id in holders]

    def _look_up(self, payments: Sequence[FoundPayment]) -> Mapping[Key, Any]:
        """Map each payment to the other active purchase of its pair.

        Leave out payments whose pair has no other active purchase.
        """
        with self._database.transaction() as session:
            rows = self._holders.execute(session, {"ids": [each.payment_id for each in payments]}).all()
        return {row.id: (row.purchase_id, row.held_by, row.held_since, row.is_refunded) for row in rows}


def _holders(tables: Tables) -> Select[Any]:
    """what: the other active purchases of the pairs of payments
    lock: none · index: primary key of payments, the pair's
    """
    payments, held = tables.payments, tables.purchases.alias("held")
    holder = payments.alias("holder")
    is_refunded = func.coalesce(has_status(holder, PaymentStatus.REFUNDED), false())
    columns = [
        read_key(payments.c.id).label("id"),
        held.c.id.label("purchase_id"),
        read_key(held.c.payment_id).label("held_by"),
        readable(held.c.created_at).label("held_since"),
        is_refunded.label("is_refunded"),
    ]
    ids = bindparam("ids", type_=Keys(tables.payment_key))
    holds = and_(same_pair(tables.ids, held, payments), held.c.is_active)
    rows = payments.join(held, holds).outerjoin(holder, holder.c.id == held.c.payment_id)
    found = select(*columns).select_from(rows)
    return found.where(payments.c.id == func.any(ids), held.c.payment_id.is_distinct_from(payments.c.id))
