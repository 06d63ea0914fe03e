"""Classifies payments. A *standing* payment has succeeded and is not refunded.

If a standing payment can be judged, it is in exactly one of seven classes. The commands ``audit``,
``backfill`` and ``why`` use the same SQL CASE as refunds. A scan has two steps. ``page_statement``
reads one page of payments, and classifies each payment whose class follows from the table
``purchases`` alone. Usually, this step classifies nearly all payments. ``portion_statement`` then
classifies the remaining payments of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    FromClause,
    Interval,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import array

from outbox_worker.database.arrays import Keys
from outbox_worker.database.expressions import is_readable, readable, seconds_since
from outbox_worker.model import CONTRADICTIONS, PURCHASE_CONFIRMED, WAIVABLE, DeadLetterState, PaymentStatus
from outbox_worker.schema.ids import PairIds
from outbox_worker.schema.tables import Tables
from outbox_worker.store import payload
from outbox_worker.store.identity import folded_pair, same_pair
from outbox_worker.store.queries import currency_code, has_status, has_type, is_claimable, is_succeeded, read_key
from outbox_worker.store.workers import set_aside_events


class PaymentClass(StrEnum):
    """The class of a standing payment. If several classes apply, the first in this list counts."""

    ACTIVE = "active"
    REVOKED = "revoked"
    DUPLICATE = "duplicate"
    IN_FLIGHT = "in_flight"
    DEAD = "dead"
    WAIVED = "waived"
    UNEXPLAINED = "unexplained"


RECENT = timedelta(hours=1)
"""The length of the last part of a scanned range. The next scan reads this part again.

A payment that was created in this part can be committed after the scan has read the part.
"""
REFUNDED_BUT_ACTIVE = "refunded_but_active"
UNKNOWN_STATUS = "unknown_status"
"""The kind of a payment whose status the worker does not know.

Payments of this kind and of ``REFUNDED_BUT_ACTIVE`` are not *standing* (succeeded and not
refunded). An operator should check the payments of both kinds.
"""
CANNOT_BE_JUDGED = "cannot_be_judged"
"""The kind of a standing payment that has no other class, and has a missing or unusable value.

Examples: the payment has no student, no currency, or a time of ``infinity``. If the amount is
negative, infinite or not a number, the payment has this kind even if it has a purchase. No sum can
include such an amount. A backfill creates no purchase for a payment of this kind until a person has
corrected the value.
"""
CURRENCY_MAX = 100
"""The largest number of characters of a currency.

A payment with a longer currency is ``CANNOT_BE_JUDGED``.
"""

READ_TO_CLASSIFY = ("id", "student_id", "course_id", "amount", "currency", "created_at")
"""The columns of payments that determine the class of a standing payment."""
_READ = (*READ_TO_CLASSIFY, "status")

MISSING = "NULL"
"""The name of a missing currency or status in the output of the audit."""

Whens = list[tuple[ColumnElement[bool], ColumnElement[str]]]


def page_statement(
    tables: Tables, order: Sequence[str], *, by_index: bool, is_first: bool, lists_duplicates: bool = False
) -> Select[Any]:
    """what: reads the next page of payments in the order of a key. Counts the payments whose class
    follows from their purchases, by class and currency. Returns the ids of all other payments, the
    length of the page and its last key. Lists each duplicate payment if ``lists_duplicates``
    lock: none · index: that on the key; those of purchases on payment_id and on the pair
    """
    keys = [tables.payments.c[key] for key in order]
    read = select(*(tables.payments.c[key] for key in _READ)).where(*span(tables, order))
    if not is_first:
        after = [cast(bindparam(f"after_{each.key}", type_=Text), each.type) for each in keys]
        read = read.where(tuple_(*keys) > tuple_(*after))
    page = _materialized(read.order_by(*keys).limit(bindparam("limit", type_=BigInteger)), "page")
    equation = case((page.c.id.is_(None), CANNOT_BE_JUDGED), *_by_purchase(page, tables, by_index))
    classed = _classed(page, equation, tables, by_index).where(_is_judged(page))
    found = _gathered(tables.ids, _materialized(classed, "classed"), literal(False), lists_duplicates).subquery("found")
    last = select(array([cast(page.c[key], Text) for key in order])).offset(func.greatest(_count(page) - 1, 0)).limit(1)
    end = select(_count(page).label("passed"), last.scalar_subquery().label("last")).subquery("end")
    return select(end, found).select_from(end.outerjoin(found, true()))


def portion_statement(tables: Tables, *, by_index: bool, lists_duplicates: bool = False) -> Select[Any]:
    """what: counts the payments with these ``ids`` by class and currency. Lists each unexplained
    payment if ``lists``
    lock: none · index: primary key of payments, dead_letters.payment_id, those of purchases on
    payment_id and on the pair; the outbox is scanned once
    """
    ids = func.unnest(bindparam("ids", type_=Keys(tables.payment_key))).table_valued("id").render_derived(name="given")
    rows = select(*(tables.payments.c[key] for key in _READ)).where(tables.payments.c.id == ids.c.id)
    row = rows.offset(literal_column("0")).lateral("row")
    page = _materialized(select(row).select_from(ids.join(row, true())), "page")
    flying = _materialized(_in_flight(page, tables), "in_flight")
    equation = _equation(page, tables, flying.c.id.is_not(None), by_index)
    classed = _classed(page, equation, tables, by_index).select_from(page.outerjoin(flying, flying.c.id == page.c.id))
    judged = _materialized(classed.where(_is_judged(page)), "classed")
    return _gathered(tables.ids, judged, bindparam("lists", type_=Boolean), lists_duplicates)


def ahead_statement(tables: Tables) -> Select[Any]:
    """what: ids of standing payments without a purchase that are dated more than ``RECENT`` in the future
    lock: none · index: that of payments on created_at, if it exists; purchases.payment_id
    """
    payments, own = tables.payments, tables.purchases
    is_ahead = payments.c.created_at > func.statement_timestamp() + literal(RECENT, Interval)
    has_none = ~select(own.c.payment_id).where(own.c.payment_id == payments.c.id).exists()
    found = select(cast(payments.c.id, Text)).where(is_ahead, is_succeeded(payments), has_none)
    return found.order_by(payments.c.created_at, payments.c.id).limit(bindparam("limit", type_=BigInteger))


def why_not_judged(payments: FromClause) -> ColumnElement[str | None]:
    """Build the reason why a payment cannot be classified, as a text for people.

    The reason is NULL if the payment can be classified.
    """
    read = payments.c
    return case(
        (read.id.is_(None), "it has no id"),
        (read.amount < 0, "its amount is negative"),
        (has_unfit_amount(payments), "its amount is not a finite number"),
        (read.student_id.is_(None), "it names no student"),
        (read.course_id.is_(None), "it names no course"),
        (read.amount.is_(None), "it has no amount"),
        (func.coalesce(func.btrim(cast(read.currency, Text)), "") == "", "it has no currency"),
        (func.length(cast(read.currency, Text)) > CURRENCY_MAX, "its currency is too long"),
        (read.created_at.is_(None), "it has no created_at"),
        (not_(is_readable(read.created_at)), "its created_at is infinite, before the year 1 or after the year 9999"),
    )


def has_unfit_amount(payments: FromClause) -> ColumnElement[bool]:
    """Build the condition that the amount is negative, infinite or not a number.

    No sum can include such an amount. PostgreSQL sorts NaN after infinity. Therefore one comparison
    finds infinity and NaN.
    """
    amount = payments.c.amount
    return or_(amount < 0, amount >= literal_column("CAST('Infinity' AS numeric)"))


def waivable(letters: FromClause) -> ColumnElement[bool]:
    """Build the condition that a dead letter waives a purchase if an operator discards it.

    If its payment is standing (succeeded, not refunded), the payment then gets no purchase.
    """
    reasons = or_(*(letters.c.reason == reason.value for reason in sorted(WAIVABLE)))
    return and_(has_type(letters, [PURCHASE_CONFIRMED]), reasons)


def class_among(few: CTE, tables: Tables) -> ColumnElement[str]:
    """Build the class of each payment in ``few``.

    ``few`` contains standing payments, with the columns ``READ_TO_CLASSIFY``. The CASE prevents the
    planner from joining the outbox. Therefore PostgreSQL reads the outbox at most once, even if the
    statistics of the outbox are wrong.
    """
    named, ids = _named(tables), select(cast(few.c.id, Text))
    told = select(named).where(*_may_be_settled(tables), case((named.in_(ids), true())))
    return _equation(few, tables, cast(few.c.id, Text).in_(told), by_index=False)


def span(tables: Tables, order: Sequence[str]) -> list[ColumnElement[bool]]:
    """Build the bounds of a scan in the order of ``created_at``. A scan in another order has no bounds."""
    if order[0] != "created_at":
        return []
    created_at = tables.payments.c.created_at
    earliest: ColumnElement[Any] = literal_column("CAST('-infinity' AS timestamptz)")
    return [created_at >= func.coalesce(_moment("since"), earliest), created_at < _moment("before")]


def _is_judged(page: CTE) -> ColumnElement[bool]:
    is_early, is_late = page.c.created_at < _moment("since"), page.c.created_at >= _moment("before")
    return and_(is_early.is_not(true()), is_late.is_not(true()))


def _moment(name: str) -> ColumnElement[Any]:
    return bindparam(name, type_=DateTime(timezone=True))


def _count(rows: CTE) -> ColumnElement[int]:
    return select(func.count()).select_from(rows).scalar_subquery()


def _materialized(rows: Select[Any], name: str) -> CTE:
    return rows.cte(name).prefix_with("MATERIALIZED")


def _classed(page: CTE, equation: ColumnElement[Any], tables: Tables, by_index: bool) -> Select[Any]:
    """Add the column ``kind`` to the page: the class of a standing payment, or why the payment is not standing."""
    is_active = _has_purchase(page, tables, by_index, tables.purchases.c.is_active)
    kind = case(
        (is_succeeded(page), equation),
        (and_(has_status(page, PaymentStatus.REFUNDED), is_active), REFUNDED_BUT_ACTIVE),
        (or_(*(has_status(page, known) for known in PaymentStatus)), "not_standing"),
        else_=UNKNOWN_STATUS,
    )
    return select(page, kind.label("kind"))


def _gathered(ids: PairIds, classed: CTE, lists: ColumnElement[bool], lists_duplicates: bool) -> Select[Any]:
    """Count and sum the payments of each kind and currency. Each payment that must be listed gets its own row."""
    kind, is_unexplained = classed.c.kind, classed.c.kind == PaymentClass.UNEXPLAINED.value
    is_recent = classed.c.created_at >= _moment("before") - literal(RECENT, Interval)
    is_duplicate = and_(literal(lists_duplicates), kind == PaymentClass.DUPLICATE.value)
    is_unjudged = kind == CANNOT_BE_JUDGED
    is_listed = or_(kind == REFUNDED_BUT_ACTIVE, is_unjudged, and_(lists, is_unexplained), is_duplicate)
    listed: dict[str, ColumnElement[Any]] = {key: classed.c[key] for key in ("id", "student_id", "course_id", "amount")}
    listed["id"] = read_key(classed.c.id)
    listed |= zip(("same_student", "same_course"), folded_pair(ids, classed), strict=True)
    listed["created_at"] = readable(classed.c.created_at)
    listed["age_seconds"] = seconds_since(classed.c.created_at)
    listed["reason"] = case((is_unjudged, why_not_judged(classed)))
    status = func.left(func.coalesce(cast(classed.c.status, Text), MISSING), CURRENCY_MAX)
    each = select(
        kind,
        func.left(func.coalesce(currency_code(classed.c.currency), MISSING), CURRENCY_MAX).label("currency"),
        case((kind == UNKNOWN_STATUS, status)).label("status"),
        and_(is_unexplained, is_recent).label("is_recent"),
        *(case((is_listed, value)).label(name) for name, value in listed.items()),
        case((not_(has_unfit_amount(classed)), classed.c.amount)).label("money"),
        case((kind.is_(None), classed.c.id)).label("unclear_id"),
    ).subquery("each")
    keys = [each.c[key] for key in ("kind", "currency", "status", "is_recent", *listed)]
    unclear = func.array_agg(each.c.unclear_id).filter(each.c.unclear_id.is_not(None))
    total = func.coalesce(func.sum(each.c.money), 0).label("money")
    sums = [func.count().label("payments"), total, cast(unclear, Text).label("ids")]
    return select(*keys, *sums).group_by(*keys)


def _equation(page: CTE, tables: Tables, is_in_flight: ColumnElement[bool], by_index: bool) -> ColumnElement[str]:
    whens = [*_by_purchase(page, tables, by_index), *_otherwise(page, tables, is_in_flight)]
    not_judged = why_not_judged(page).is_not(None), literal(CANNOT_BE_JUDGED)
    return case(*whens, not_judged, else_=literal(PaymentClass.UNEXPLAINED.value))


def _by_purchase(page: CTE, tables: Tables, by_index: bool) -> Whens:
    return [
        (has_unfit_amount(page), literal(CANNOT_BE_JUDGED)),
        (_has_purchase(page, tables, by_index, tables.purchases.c.is_active), literal(PaymentClass.ACTIVE.value)),
        (_has_purchase(page, tables, by_index), literal(PaymentClass.REVOKED.value)),
        (_pair_is_held(page, tables, by_index), literal(PaymentClass.DUPLICATE.value)),
    ]


def _otherwise(page: CTE, tables: Tables, is_in_flight: ColumnElement[bool]) -> Whens:
    letters = tables.dead_letters
    contradiction = or_(*(letters.c.reason == reason.value for reason in sorted(CONTRADICTIONS)))
    contradicts = letters.c.state == DeadLetterState.OPEN.value, contradiction
    discarded = letters.c.state == DeadLetterState.DISCARDED.value, letters.c.note.is_not(None)
    waives = *discarded, waivable(letters)
    return [
        (is_in_flight, literal(PaymentClass.IN_FLIGHT.value)),
        (_has_letter(page, tables, *contradicts), literal(PaymentClass.DEAD.value)),
        (_has_letter(page, tables, *waives), literal(PaymentClass.WAIVED.value)),
    ]


def _in_flight(page: CTE, tables: Tables) -> Select[Any]:
    """Find the payments whose ``PURCHASE_CONFIRMED`` event is in the outbox and can be settled by a worker."""
    is_named = _named(tables) == cast(page.c.id, Text)
    flying = page.join(tables.outbox, is_named)
    return select(page.c.id).select_from(flying).where(*_may_be_settled(tables)).distinct()


def _may_be_settled(tables: Tables) -> list[ColumnElement[bool]]:
    """Build the conditions that an event confirms a payment, can be claimed, and is not set aside by any worker."""
    outbox = tables.outbox
    is_other = outbox.c.id != func.all(func.array(set_aside_events(tables.workers).scalar_subquery()))
    return [has_type(outbox, [PURCHASE_CONFIRMED]), is_claimable(outbox), is_other]


def _named(tables: Tables) -> ColumnElement[Any]:
    """Read the payment's id, as text, from the payload of an event."""
    return payload.payment_id_text(tables, tables.outbox)


def _has_purchase(page: CTE, tables: Tables, by_index: bool, *more: ColumnElement[bool]) -> ColumnElement[bool]:
    own = tables.purchases
    return _exists(select(own.c.payment_id).where(own.c.payment_id == page.c.id, *more), by_index)


def _pair_is_held(page: CTE, tables: Tables, by_index: bool) -> ColumnElement[bool]:
    held = tables.purchases.alias("held")
    return _exists(select(held.c.payment_id).where(same_pair(tables.ids, held, page), held.c.is_active), by_index)


def _has_letter(page: CTE, tables: Tables, *which: ColumnElement[bool]) -> ColumnElement[bool]:
    letters = tables.dead_letters
    return _exists(select(letters.c.payment_id).where(letters.c.payment_id == page.c.id, *which), by_index=False)


def _exists(rows: Select[Any], by_index: bool) -> ColumnElement[bool]:
    """Build EXISTS. If ``by_index``, OFFSET 0 forces one index lookup per row instead of a hash of the whole table."""
    return (rows.offset(literal_column("0")) if by_index else rows).exists()
