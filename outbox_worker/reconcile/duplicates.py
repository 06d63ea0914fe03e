"""Who paid twice for what: standing payments whose pair another purchase holds. All of it is looked up.

Owed back is a payment only while the other one stands: who gave both back would have taken the course away.

An entry is gone as soon as its payment is refunded, or the other purchase is taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Select, Text, and_, bindparam, cast, false, func, select

from outbox_worker.database.arrays import Keys
from outbox_worker.database.engine import Database
from outbox_worker.database.statements import Statement
from outbox_worker.model import FoundPayment, PaymentStatus
from outbox_worker.reconcile.scan import PaymentScan, ScanRange, Throttle
from outbox_worker.schema.privileges import READING
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables

_READ = ("payments", "outbox", "purchases", "dead_letters")
_TOGETHER = 10_000


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A payment that is owed back, and the purchase for which it was one too many."""

    payment: FoundPayment
    purchase_id: Any
    held_by: UUID | None
    """The payment of that purchase; None: a gift."""
    held_since: datetime
    is_holder_refunded: bool
    """The payment of that purchase was refunded. Once that is settled, this one gets the pair."""


def owed_back(found: Iterable[Duplicate]) -> list[Duplicate]:
    """Those to be refunded."""
    return [each for each in found if not each.is_holder_refunded]


class Duplicates:
    """Lists the duplicates among the payments that were created before the look began. Reads only."""

    def __init__(self, database: Database, tables: Tables) -> None:
        with database.transaction() as session:
            tables = check_schema(session, tables, {role: READING[role] for role in _READ})
            began = session.scalars(select(func.clock_timestamp())).one()
        self._database = database
        self._scan = PaymentScan(database, tables, ScanRange(None, began), lists=0, lists_duplicates=True)
        self._holders = Statement(_holders(tables))

    def estimate(self) -> int:
        """About how many payments there are."""
        return self._scan.estimate()

    def list(self, throttle: Throttle = lambda *_: True) -> Sequence[Duplicate]:
        """All of them, the oldest first; ``throttle`` is told after each statement."""
        self._scan.run(throttle)
        found = sorted(self._scan.totals.duplicates, key=lambda payment: payment.age)
        parts = [found[start : start + _TOGETHER] for start in range(0, len(found), _TOGETHER)]
        holders = {key: holder for part in parts for key, holder in self._look_up(part).items()}
        return [Duplicate(each, *holders[each.payment_id]) for each in found if each.payment_id in holders]

    def _look_up(self, payments: Sequence[FoundPayment]) -> Mapping[UUID, Any]:
        """What holds the pair of each payment now; nothing for one whose pair has come free since."""
        with self._database.transaction() as session:
            rows = self._holders.execute(session, {"ids": [each.payment_id for each in payments]}).all()
        return {row.id: (row.purchase_id, row.held_by, row.held_since, row.is_refunded) for row in rows}


def _holders(tables: Tables) -> Select[Any]:
    """what: the purchases that hold the pairs of payments · lock: none · index: primary key of payments, the pair's"""
    payments, held = tables.payments, tables.purchases.alias("held")
    is_same = [held.c[key] == payments.c[key] for key in ("student_id", "course_id")]
    holder = payments.alias("holder")
    is_refunded = func.coalesce(cast(holder.c.status, Text) == PaymentStatus.REFUNDED.value, false())
    columns = [
        payments.c.id,
        held.c.id.label("purchase_id"),
        held.c.payment_id.label("held_by"),
        held.c.created_at.label("held_since"),
        is_refunded.label("is_refunded"),
    ]
    ids = bindparam("ids", type_=Keys("uuid"))
    rows = payments.join(held, and_(*is_same, held.c.is_active)).outerjoin(holder, holder.c.id == held.c.payment_id)
    found = select(*columns).select_from(rows)
    return found.where(payments.c.id == func.any(ids), held.c.payment_id.is_distinct_from(payments.c.id))
