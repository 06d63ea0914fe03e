"""A scan reads the payments page by page, in the order of a key, and classifies each payment.

Most payments have a purchase. The first statement reads one page, and uses indexes to classify the
payments that have a purchase. The scan collects all other payments into portions. The second
statement classifies one portion. It also checks dead letters and marks, and reads the outbox once.
If a statement exceeds its deadline, the scan repeats it with half as many payments.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Row, bindparam, func, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.arrays import ArrayText, Keys
from outbox_worker.database.engine import Database
from outbox_worker.database.failures import QUERY_CANCELED, sqlstate
from outbox_worker.database.statements import Statement
from outbox_worker.keys import Key
from outbox_worker.model import FoundPayment, PaymentTotals, UnjudgedPayment, halves
from outbox_worker.money import add
from outbox_worker.schema.catalogue import has_index_paths
from outbox_worker.schema.tables import Tables, relation_name
from outbox_worker.store.payment_classes import (
    CANNOT_BE_JUDGED,
    REFUNDED_BUT_ACTIVE,
    UNKNOWN_STATUS,
    PaymentClass,
    ahead_statement,
    page_statement,
    portion_statement,
    span,
)

STATEMENT_SECONDS = 30.0
"""The deadline for each statement of a command that scans all payments. Such statements can read
many rows."""

PAGE_FIRST = 1_000
"""The number of payments in the first page. The duration of each page determines the size of the next page."""

PAGE_MAX = 50_000

PORTION = 100_000
"""One statement classifies at most this many payments without a purchase.

Each statement reads the outbox once. For a million payments without a purchase, the scan reads the
outbox ten times.
"""

AHEAD_MAX = 10_000
"""A scan lists at most this many payments that are dated in the future."""

LEAST = 50
"""A scan does not halve a page or portion of at most this many payments. If the statement is still
too slow, the scan fails."""

_BY_INDEX: Mapping[str, str] = {
    "enable_sort": "off",
    "enable_nestloop": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "max_parallel_workers_per_gather": "0",
}
"""Planner settings that make PostgreSQL read a page in index order, and read the outbox once into a hash table."""

_BY_HASH: Mapping[str, str] = {"work_mem": "256MB"}
"""Planner settings that give PostgreSQL memory for a hash table of all purchases. PostgreSQL builds
this table if no index finds purchases by payment and by pair."""


_CLASSES = {each.value: each for each in PaymentClass}

# what: whether an index starts with this column, and the column is NOT NULL · lock: none
# index: the catalogue's indexes
_LEADS_AN_INDEX = text(
    """
    SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
                   JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
                   WHERE i.indrelid = to_regclass(:relation) AND i.indisvalid AND i.indpred IS NULL
                   AND m.amname = 'btree' AND a.attname = :column AND a.attnotnull)
    """
)

ScanCursor = Sequence[str]
"""The key of the last payment that a scan has read, as text."""


class ScanRange(NamedTuple):
    """Payments created at or after ``since``, and before ``before``. If ``since`` is None, the range has no start."""

    since: datetime | None
    before: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanLimits:
    """Limits for one statement of a scan."""

    target_seconds: float = 1.0
    """How many seconds the statement of a page should take. The scan adjusts the page size to reach this time."""
    page_max: int = PAGE_MAX
    """The largest number of payments in a page."""
    portion: int = PORTION
    """The largest number of payments without a purchase that one statement classifies."""


@dataclass(frozen=True, slots=True)
class ScanPaths:
    """The indexes of this database that a scan can use."""

    order: tuple[str, ...]
    """The columns by which the scan orders the payments: ``created_at`` and ``id``, or ``id`` alone."""
    by_index: bool
    """Whether indexes find a purchase by its payment and by its pair. Otherwise PostgreSQL reads
    all purchases into a hash table."""

    @classmethod
    def read(cls, session: Session, tables: Tables) -> ScanPaths:
        """Read from the catalogue which indexes a scan can use."""
        return cls(order_of(session, tables), tables.ids.is_indexable and has_index_paths(session, tables.purchases))


class Throttle(Protocol):
    """A function that a scan calls after each statement. The function is allowed to sleep."""

    def __call__(self, passed: int, seconds: float, /) -> bool:
        """Return whether the scan must continue.

        ``passed``: the number of payments read so far. ``seconds``: the duration of the statement.
        """
        ...


@dataclass
class ScanTotals:
    """The counts, sums and payments that a scan has found so far."""

    passed: int = 0
    counts: dict[PaymentClass, int] = field(default_factory=lambda: dict.fromkeys(PaymentClass, 0))
    money: dict[PaymentClass, dict[str, Decimal]] = field(default_factory=lambda: {each: {} for each in PaymentClass})
    recent: PaymentTotals = field(default_factory=PaymentTotals)
    """The count and sums of the unexplained payments that were created in the last hour of the range."""
    unexplained: list[FoundPayment] = field(default_factory=list)
    """The unexplained payments, one by one. If the list is longer than the limit ``lists``, later
    statements add no payment."""
    duplicates: list[FoundPayment] = field(default_factory=list)
    """The duplicates, one by one. The list is empty if the scan does not list duplicates."""
    refunded_but_active: list[FoundPayment] = field(default_factory=list)
    cannot_be_judged: list[UnjudgedPayment] = field(default_factory=list)
    unknown_statuses: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row[Any]) -> None:
        """Add one row of a result: the totals of one class and currency, or one listed payment."""
        if row.kind == UNKNOWN_STATUS:
            self.unknown_statuses[row.status] += row.payments
        elif row.kind == REFUNDED_BUT_ACTIVE:
            self.refunded_but_active.append(_found(row))
        elif row.kind == CANNOT_BE_JUDGED:
            self.cannot_be_judged.append(_unjudged(row, row.reason))
        elif row.kind in _CLASSES:
            money = self.money[_CLASSES[row.kind]]
            self.counts[_CLASSES[row.kind]] += row.payments
            money[row.currency] = add(money.get(row.currency, Decimal(0)), row.money)
            if row.is_recent:
                self.recent = self.recent + PaymentTotals(row.payments, {row.currency: row.money})
            if row.id is not None:
                listed = self.duplicates if row.kind == PaymentClass.DUPLICATE else self.unexplained
                listed.append(_found(row))

    def add_ahead(self, row: Row[Any]) -> None:
        """Add a payment that is dated in the future, if it is unexplained or cannot be judged."""
        if row.kind == CANNOT_BE_JUDGED:
            self.cannot_be_judged.append(_unjudged(row, row.reason))
        elif row.kind == PaymentClass.UNEXPLAINED:
            self.cannot_be_judged.append(_unjudged(row, "its created_at is in the future"))

    def value(self, kind: PaymentClass) -> PaymentTotals:
        return PaymentTotals(self.counts[kind], self.money[kind])


class PaymentScan:
    """One pass over the payments of a range. Each statement runs in a separate transaction.

    Counts and sums include every payment of the range, even payments that are not listed one by
    one. ``lists``: about how many unexplained payments to list (None: all). ``lists_duplicates``:
    whether to list duplicates, too. ``looks_ahead``: whether to list unexplained payments that are
    dated in the future, after the end of the range. Without ``looks_ahead``, no scan reads a
    payment before its date, perhaps for years.
    """

    def __init__(
        self,
        database: Database,
        tables: Tables,
        paths: ScanPaths,
        judged: ScanRange,
        *,
        limits: ScanLimits = ScanLimits(),
        lists: int | None = None,
        lists_duplicates: bool = False,
        looks_ahead: bool = False,
    ) -> None:
        self.totals = ScanTotals()
        self._database, self._tables, self._span = database, tables, judged
        self._limits, self._lists = limits, lists
        self._size = min(PAGE_FIRST, limits.page_max)
        self._seconds = 0.0
        self.order, by_index = paths.order, paths.by_index
        self._plans = plans(by_index)
        pages = partial(page_statement, tables, self.order, by_index=by_index, lists_duplicates=lists_duplicates)
        self._first, self._next = (Statement(pages(is_first=is_first)) for is_first in (True, False))
        self._again = Statement(portion_statement(tables, by_index=by_index, lists_duplicates=lists_duplicates))
        self._ahead = Statement(ahead_statement(tables)) if looks_ahead else None

    def cursor_of(self, payment: FoundPayment) -> ScanCursor:
        """Return the cursor of a scan that has read all payments up to and including ``payment``."""
        created_at = payment.created_at.isoformat() if payment.created_at else "-infinity"
        return [{"id": str(payment.payment_id), "created_at": created_at}[key] for key in self.order]

    def in_order(self, payments: list[FoundPayment]) -> list[FoundPayment]:
        """Sort payments into the order in which this scan reads them. The input is sorted by age.

        PostgreSQL sorts the ids, because Python does not know the collation of the column.
        """
        if self.order != ("id",) or not payments:
            return payments
        paid = self._tables.payments
        ids = bindparam("ids", type_=Keys(self._tables.payment_key))
        ordered = Statement(select(paid.c.id).where(paid.c.id == func.any(ids)).order_by(paid.c.id))
        by_id = {str(each.payment_id): each for each in payments}
        with self._database.transaction() as session:
            return [by_id[str(key)] for key in ordered.execute(session, {"ids": list(by_id)}).scalars()]

    def estimate(self) -> int:
        """Return the planner's estimate of the number of payments in the range."""
        asked = select(self._tables.payments.c.id).where(*span(self._tables, self.order))
        values = dict(zip(ScanRange._fields, self._span, strict=True))
        sql = str(asked.params(values).compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))  # type: ignore[no-untyped-call]
        with self._database.transaction() as session:
            plan = session.scalar(text(f"EXPLAIN (FORMAT JSON) {sql}"))
        return int(plan[0]["Plan"]["Plan Rows"]) if plan else 0

    def run(self, throttle: Throttle, after: ScanCursor | None = None) -> bool:
        """Scan all payments after the cursor ``after``. Return False if ``throttle`` ended the scan."""
        waiting: list[str] = []
        for unexplained in self._pages(after):
            waiting += unexplained
            if not throttle(self.totals.passed, self._seconds):
                return False
            portion = self._limits.portion
            while len(waiting) >= portion:
                if not self._look_again(waiting[:portion], throttle):
                    return False
                del waiting[:portion]
        return self._look_again(waiting, throttle) and self._look_ahead(throttle)

    def _pages(self, after: ScanCursor | None) -> Iterator[list[str]]:
        """Read all pages. Yield the ids of the payments without a purchase, page by page."""
        while True:
            size, statement = self._size, self._first if after is None else self._next
            values = {} if after is None else {f"after_{key}": at for key, at in zip(self.order, after, strict=True)}
            try:
                rows = self._execute(statement, values | {"limit": size})
            except DBAPIError as error:
                _raise_unless_too_slow(error, size)
                self._size = size // 2
                continue
            self.totals.passed += rows[0].passed
            self._size = _fitting(size, self._limits.target_seconds / self._seconds, self._limits.page_max)
            yield [key for row in rows if row.ids for key in ArrayText(row.ids) if key]
            if rows[0].passed < size:
                return
            after = rows[0].last

    def _look_again(self, ids: Sequence[str], throttle: Throttle) -> bool:
        """Classify payments without a purchase. If a statement is too slow, run it again for each half of its payments.

        Return False if ``throttle`` ended the scan.
        """
        parts = [ids] if ids else []
        while parts:
            part = parts.pop()
            lists = self._lists is None or len(self.totals.unexplained) <= self._lists
            try:
                self._execute(self._again, {"ids": part, "lists": lists})
            except DBAPIError as error:
                _raise_unless_too_slow(error, len(part))
                parts += reversed(halves(part))
                continue
            if not throttle(self.totals.passed, self._seconds):
                return False
        return True

    def _look_ahead(self, throttle: Throttle) -> bool:
        """List unexplained payments that are dated in the future. Return False if ``throttle`` ended the scan."""
        if self._ahead is None:
            return True
        began = time.monotonic()
        with self._database.transaction(**self._plans) as session:
            ids = self._ahead.execute(session, {"limit": AHEAD_MAX}).scalars().all()
            every = {"ids": ids, "lists": True, "since": None, "before": None}
            for row in self._again.execute(session, every) if ids else ():
                self.totals.add_ahead(row)
        return throttle(self.totals.passed, time.monotonic() - began)

    def _execute(self, statement: Statement, values: Mapping[str, Any]) -> Sequence[Row[Any]]:
        began = time.monotonic()
        with self._database.transaction(**self._plans) as session:
            rows = statement.execute(session, {"since": self._span.since, "before": self._span.before, **values}).all()
        self._seconds = max(time.monotonic() - began, 1e-6)
        for row in rows:
            self.totals.add(row)
        return rows


def plans(by_index: bool) -> Mapping[str, str]:
    """Return the planner settings for statements that classify payments."""
    return _BY_INDEX if by_index else _BY_HASH


def order_of(session: Session, tables: Tables) -> tuple[str, ...]:
    """Return the columns by which a scan orders payments.

    Return ``created_at`` and ``id`` if an index starts with ``created_at``. Otherwise return only
    ``id``. A scan in the order of ``created_at`` reads only the payments of its range. A scan in
    the order of ``id`` reads all payments.
    """
    asked = {"relation": relation_name(tables.payments), "column": tables.payments.c.created_at.name}
    return ("created_at", "id") if session.scalar(_LEADS_AN_INDEX, asked) else ("id",)


def _raise_unless_too_slow(error: DBAPIError, size: int) -> None:
    """Raise ``error`` if the statement did not time out, or if ``size`` is at most ``LEAST``."""
    if sqlstate(error) != QUERY_CANCELED or size <= LEAST:
        raise error


def _fitting(size: int, ratio: float, most: int) -> int:
    """Return the size of the next page: as many payments as the target time allows.

    The size is at most twice ``size``.
    """
    return max(min(LEAST, most), min(size * 2, int(size * ratio), most))


def _found(row: Row[Any]) -> FoundPayment:
    return FoundPayment(*_described(row))


def _unjudged(row: Row[Any], reason: str) -> UnjudgedPayment:
    return UnjudgedPayment(*_described(row), reason)


def _described(
    row: Row[Any],
) -> tuple[Key, Any, Any, Decimal | None, str, datetime | None, float | None, tuple[str, str]]:
    who = row.id, row.student_id, row.course_id
    same = row.same_student, row.same_course
    return *who, row.amount, row.currency, row.created_at, row.age_seconds, same
