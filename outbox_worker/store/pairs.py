"""Pairs (student, course): their locks, the facts about claimed events, and the other payments of a pair.

The pair's lock is public: ``hashtextextended(student_id::text || ':' || course_id::text, 0)``, transaction-scoped.
Every verdict but a clean insert is reached under this lock, and so is every refund, under both guards. Lock, look and
write are one statement each. ``PurchaseRepository`` runs the statements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Row,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    exists,
    false,
    func,
    literal_column,
    select,
    true,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import ARRAY, UUID

from outbox_worker.database.arrays import Keys
from outbox_worker.model import PURCHASE_REFUNDED, Batch, Facts, Mark, Repeated
from outbox_worker.schema.tables import Tables
from outbox_worker.store import payload
from outbox_worker.store.claimed import window_of
from outbox_worker.store.payment_classes import PaymentClass, class_among
from outbox_worker.store.queries import is_succeeded, same_pair


@dataclass(frozen=True, slots=True)
class PairLocks:
    """The pairs of a batch that this transaction has locked."""

    keys: frozenset[int]
    """The lock keys of these pairs."""
    locked: frozenset[int]
    """Events (``outbox.id``) whose pair is locked. An event without a pair is in neither set."""
    contended: frozenset[int]
    """Events whose pair another transaction has locked, or that exceed the capacity."""
    order: tuple[int, ...]
    """All events, in the order in which every statement writes purchases."""


@dataclass(frozen=True, slots=True)
class EventFacts:
    """The facts about one event, and the lock of its pair."""

    facts: Facts
    key: int | None
    """The lock key of its pair; None if neither a payment nor a purchase names a pair."""


class StandingPayment(NamedTuple):
    """A succeeded payment of a pair, and its class."""

    payment_id: str
    kind: PaymentClass


EventOf = Callable[[FromClause, Table], FromClause]
"""Joins keys to the rows of their events: ``queue.event_of``, or a substitute for events that were never written."""


def keys_of(batch: Batch) -> dict[str, Any]:
    """The parameters of ``claimed_keys``."""
    read = Repeated._fields if batch.repeated else ()
    texts = {f"given_{key}": [getattr(each, key) for each in batch.repeated] for key in read}
    return {"ids": batch.ids, "payment_ids": batch.payment_ids, **texts, **window_of(batch)}


def claimed_keys(outbox: Table) -> FromClause:
    """The keys of a batch as a relation (id, payment_id); of documents also what the client read of each payload."""
    ids, payments = bindparam("ids", type_=Keys("bigint")), bindparam("payment_ids", type_=Keys("uuid"))
    read = Repeated._fields if payload.is_document(outbox) else ()
    texts = [bindparam(f"given_{key}", type_=ARRAY(Text)) for key in read]
    return func.unnest(ids, payments, *texts).table_valued("id", "payment_id", *read).render_derived(name="claimed")


def payload_source(claimed: FromClause, event: FromClause) -> FromClause:
    """The relation that holds the optional keys of a payload: the event's row, or what the client read of it."""
    return claimed if "amount" in claimed.c else event


def payment_of(claimed: FromClause, payments: Table) -> FromClause:
    """The payment of a claimed event, found by its id, as ``event_of`` finds the event."""
    read = (payments.c[key] for key in ("id", "student_id", "course_id", "amount", "currency", "status"))
    row = select(*read).where(payments.c.id == claimed.c.payment_id)
    return row.offset(literal_column("0")).lateral("payment")


def _purchase_of(claimed: FromClause, purchases: Table) -> FromClause:
    """The pair of the purchase of a claimed event's payment, found in the same way."""
    row = select(purchases.c.student_id, purchases.c.course_id).where(purchases.c.payment_id == claimed.c.payment_id)
    return row.offset(literal_column("0")).lateral("purchase")


def pair_key(student_id: ColumnElement[Any], course_id: ColumnElement[Any]) -> ColumnElement[Any]:
    """The key of a pair's advisory lock, a bigint; its formula is public."""
    return func.hashtextextended(cast(student_id, Text) + ":" + cast(course_id, Text), 0, type_=BigInteger)


def holds_pair(purchases: FromClause, payments: FromClause) -> ColumnElement[bool]:
    """The purchase is active, of the payment's pair, and of another payment or of none (a gift)."""
    is_other = purchases.c.payment_id.is_distinct_from(payments.c.id)
    return and_(same_pair(purchases, payments), purchases.c.is_active, is_other)


def _pair_of(payments: FromClause, purchases: FromClause) -> list[ColumnElement[Any]]:
    """The pair of the payment, or of its purchase if the payment row is archived."""
    return [func.coalesce(payments.c[key], purchases.c[key]) for key in ("student_id", "course_id")]


def lock_statement(tables: Tables, event_of: EventOf) -> Select[Any]:
    """what: advisory locks on the pairs of claimed events, in ascending key order, tried without waiting
    lock: pg_try_advisory_xact_lock · index: primary key of payments, purchases.payment_id
    """
    claimed, payments, purchases = claimed_keys(tables.outbox), tables.payments, tables.purchases
    outbox = event_of(claimed, tables.outbox)
    student, course = _pair_of(payments, purchases)
    ordered = func.row_number().over(order_by=(student, course, outbox.c.due_at, outbox.c.id))
    pairs = (
        select(claimed.c.id, pair_key(student, course).label("key"), ordered.label("position"))
        .select_from(claimed)
        .join(outbox, true())
        .outerjoin(payments, payments.c.id == claimed.c.payment_id)
        .outerjoin(purchases, purchases.c.payment_id == claimed.c.payment_id)
        .cte("pairs")
    )
    rank = func.dense_rank().over(order_by=pairs.c.key).label("rank")
    ranked = select(pairs, rank).order_by(pairs.c.key).cte("ranked").prefix_with("MATERIALIZED")
    within = ranked.c.rank <= bindparam("capacity", type_=BigInteger)
    taken = case((within, func.pg_try_advisory_xact_lock(ranked.c.key)), else_=false())
    return select(ranked.c.id, ranked.c.key, ranked.c.position, func.coalesce(taken, false()).label("held"))


def look_statement(tables: Tables, event_of: EventOf) -> Select[Any]:
    """what: the facts about claimed events, all in one snapshot
    lock: none (the pairs' locks are held) · index: primary keys, purchases.payment_id, the pair's index
    """
    claimed, payments, purchases, marks = (
        claimed_keys(tables.outbox),
        tables.payments,
        tables.purchases,
        tables.processed_events,
    )
    outbox = event_of(claimed, tables.outbox)
    own, held = purchases.alias("own"), purchases.alias("held")
    active = select(func.bool_or(own.c.is_active)).where(own.c.payment_id == claimed.c.payment_id).scalar_subquery()
    pair = [func.coalesce(payments.c[key], _of_own(purchases, claimed, key)) for key in ("student_id", "course_id")]
    return (
        select(
            claimed.c.id,
            type_coerce(claimed.c.payment_id, UUID(as_uuid=True)).label("payment_id"),
            marks.c.event_id.is_not(None).label("is_marked"),
            marks.c.outcome.label("marked_outcome"),
            marks.c.payment_id.label("marked_payment_id"),
            active.label("purchase_active"),
            cast(payments.c.status, Text).label("payment_status"),
            payload.mismatched_keys(payload_source(claimed, outbox), payments).label("mismatches"),
            exists().where(holds_pair(held, payments)).label("pair_held"),
            pair_key(*pair).label("key"),
        )
        .select_from(claimed)
        .join(outbox, true())
        .outerjoin(payments, payments.c.id == claimed.c.payment_id)
        .outerjoin(marks, marks.c.event_id == outbox.c.event_id)
    )


def _of_own(purchases: Table, claimed: FromClause, key: str) -> ColumnElement[Any]:
    """A column of the payment's own purchase, which names the pair if the payment row is archived."""
    own = purchases.alias()
    return select(own.c[key]).where(own.c.payment_id == claimed.c.payment_id).limit(1).scalar_subquery()


def event_facts_of(row: Row[Any], event_type: str, *, last_try: bool) -> EventFacts:
    """The facts in a row of ``look_statement`` about an event of this type."""
    facts = Facts(
        is_refund=event_type == PURCHASE_REFUNDED,
        payment_id=row.payment_id,
        mark=Mark(row.marked_outcome, row.marked_payment_id) if row.is_marked else None,
        purchase_active=row.purchase_active,
        payment_status=row.payment_status,
        mismatches=tuple(row.mismatches),
        pair_held=row.pair_held,
        last_try=last_try,
    )
    return EventFacts(facts, row.key)


def standing_statement(tables: Tables) -> Select[Any]:
    """what: the succeeded payments of the pairs of claimed events, oldest first, each with its class
    lock: none (the pairs' locks are held) · index: the payments' on the pair; without one they are read once, and so is
    the outbox if a payment is found that nothing else explains
    """
    claimed, payments, purchases = claimed_keys(tables.outbox), tables.payments, tables.purchases
    refunded, own = payment_of(claimed, payments), _purchase_of(claimed, purchases)
    student, course = _pair_of(refunded, own)
    pairs = (
        select(claimed.c.id, student.label("student_id"), course.label("course_id"))
        .select_from(claimed)
        .outerjoin(refunded, true())
        .outerjoin(own, true())
        .cte("pairs")
        .prefix_with("MATERIALIZED")
    )
    read = [payments.c[key] for key in ("id", "student_id", "course_id", "created_at")]
    stands = select(pairs.c.id.label("event"), *read).join(payments, same_pair(payments, pairs))
    standing = stands.where(is_succeeded(payments)).cte("standing").prefix_with("MATERIALIZED")
    kind = class_among(standing, tables).label("kind")
    found = select(standing.c.event.label("id"), cast(standing.c.id, Text).label("payment_id"), kind)
    return found.order_by(standing.c.created_at, standing.c.id)
