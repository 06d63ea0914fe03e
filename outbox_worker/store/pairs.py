"""Builds statements that lock pairs, read the facts about events, and read the payments of a pair.

A pair is a student and a course. The lock of a pair is an advisory lock that ends with the
transaction. ``identity.pair_key`` computes the key of this lock. The key is public: other programs
can use the same lock. Under both guards, the worker locks the pair before it judges an event or
writes a refund. Only the fast statement under the guard ``index`` needs no lock. The module
``identity`` defines which pairs are the same.

``PurchaseRepository`` uses one statement for each step: lock pairs, read facts, write purchases.
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
from sqlalchemy.dialects.postgresql import ARRAY

from outbox_worker.database.arrays import Keys
from outbox_worker.model import PURCHASE_REFUNDED, Batch, Facts, Mark, Repeated
from outbox_worker.schema.ids import PairIds
from outbox_worker.schema.tables import Tables
from outbox_worker.store import payload
from outbox_worker.store.claimed import window_of
from outbox_worker.store.identity import comparable_pair, has_pair, pair_key, same_pair, written_order
from outbox_worker.store.payment_classes import READ_TO_CLASSIFY, class_among
from outbox_worker.store.queries import is_succeeded, read_key, status_of


@dataclass(frozen=True, slots=True)
class PairLocks:
    """The pairs of a batch that this transaction has locked."""

    keys: frozenset[int]
    """The lock keys of these pairs."""
    locked: frozenset[int]
    """The events (``outbox.id``) whose pair is locked.

    An event without a pair is neither in ``locked`` nor in ``contended``.
    """
    contended: frozenset[int]
    """The events whose pair is not locked.

    Another transaction has locked the pair, or the capacity was used up.
    """
    order: tuple[int, ...]
    """All events of the batch, in the order in which every statement writes purchases."""


@dataclass(frozen=True, slots=True)
class EventFacts:
    """The facts about one event, and the lock key of its pair."""

    facts: Facts
    key: int | None
    """The lock key of the event's pair; None if the event has neither a payment row nor a purchase."""


class StandingPayment(NamedTuple):
    """A succeeded payment of a pair, with its class."""

    payment_id: str
    kind: str
    """The class: a value of ``PaymentClass``, or ``payment_classes.CANNOT_BE_JUDGED``."""


EventOf = Callable[[FromClause, Table], FromClause]
"""A function that joins keys to event rows, for example ``claimed.event_of``.

A backfill uses ``purchases.backfill_event_of``.
"""


def keys_of(batch: Batch) -> dict[str, Any]:
    """Return the parameters of ``claimed_keys`` and ``within``."""
    read = Repeated._fields if batch.repeated else ()
    texts = {f"given_{key}": [getattr(each, key) for each in batch.repeated] for key in read}
    return {"ids": batch.ids, "payment_ids": batch.payment_ids, **texts, **window_of(batch)}


def claimed_keys(tables: Tables) -> FromClause:
    """Build a relation (id, payment_id) with the keys of a batch.

    If the payload column is json or text, the relation also has the payload fields that the worker parsed in Python.
    """
    ids, payments = bindparam("ids", type_=Keys("bigint")), bindparam("payment_ids", type_=Keys(tables.payment_key))
    read = Repeated._fields if payload.is_document(tables.outbox) else ()
    texts = [bindparam(f"given_{key}", type_=ARRAY(Text)) for key in read]
    return func.unnest(ids, payments, *texts).table_valued("id", "payment_id", *read).render_derived(name="claimed")


def payload_source(claimed: FromClause, event: FromClause) -> FromClause:
    """Return the relation that has the optional payload fields.

    If the worker parsed the payloads in Python, return ``claimed``, because the parameters contain the fields.
    Otherwise return ``event``.
    """
    return claimed if "amount" in claimed.c else event


def payment_of(claimed: FromClause, payments: Table) -> FromClause:
    """Build a lateral subquery that finds the payment of each claimed event by id.

    ``event_of`` explains OFFSET 0.
    """
    read = (payments.c[key] for key in ("id", "student_id", "course_id", "amount", "currency", "status"))
    row = select(*read).where(payments.c.id == claimed.c.payment_id)
    return row.offset(literal_column("0")).lateral("payment")


def purchase_of(claimed: FromClause, purchases: Table) -> FromClause:
    """Build a lateral subquery that finds the purchase of a claimed event's payment."""
    read = (purchases.c[key] for key in ("student_id", "course_id", "amount", "currency"))
    row = select(*read).where(purchases.c.payment_id == claimed.c.payment_id)
    return row.limit(literal_column("1")).lateral("purchase")


def holds_pair(ids: PairIds, purchases: FromClause, payments: FromClause) -> ColumnElement[bool]:
    """Build the condition that another purchase is active and has the same pair as the payment."""
    is_other = purchases.c.payment_id.is_distinct_from(payments.c.id)
    return and_(same_pair(ids, purchases, payments), purchases.c.is_active, is_other)


def lock_statement(tables: Tables, event_of: EventOf) -> Select[Any]:
    """what: locks the pairs of claimed events in ascending key order, without waiting
    lock: pg_try_advisory_xact_lock · index: primary key of payments, purchases.payment_id
    """
    claimed, payments, purchases = claimed_keys(tables), tables.payments, tables.purchases
    outbox = event_of(claimed, tables.outbox)
    order = written_order(tables.ids, payments)
    ordered = func.row_number().over(order_by=(*order, outbox.c.due_at, outbox.c.id))
    key = pair_key(tables.ids, payments, purchases)
    pairs = (
        select(claimed.c.id, key.label("key"), ordered.label("position"))
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
    """what: reads the facts about claimed events in one snapshot
    lock: none (the pairs are already locked) · index: primary keys, purchases.payment_id, the pair's index
    """
    claimed, payments, purchases, marks = (
        claimed_keys(tables),
        tables.payments,
        tables.purchases,
        tables.processed_events,
    )
    outbox = event_of(claimed, tables.outbox)
    own, held = purchases.alias("own"), purchases.alias("held")
    is_active = func.bool_or(own.c.is_active.is_(true()))  # a purchase whose is_active is NULL is not active
    active = select(is_active).where(own.c.payment_id == claimed.c.payment_id).scalar_subquery()
    status = func.coalesce(status_of(payments), "")  # NULL would mean that no payment row exists
    bought = purchase_of(claimed, purchases)
    return (
        select(
            claimed.c.id,
            read_key(type_coerce(claimed.c.payment_id, payments.c.id.type)).label("payment_id"),
            marks.c.event_id.is_not(None).label("is_marked"),
            marks.c.outcome.label("marked_outcome"),
            read_key(marks.c.payment_id).label("marked_payment_id"),
            active.label("purchase_active"),
            case((payments.c.id.is_not(None), status)).label("payment_status"),
            and_(*(payments.c[key].is_not(None) for key in ("student_id", "course_id"))).label("has_pair"),
            payload.mismatched_keys(tables, payload_source(claimed, outbox), payments).label("mismatches"),
            exists().where(holds_pair(tables.ids, held, payments)).label("pair_held"),
            pair_key(tables.ids, payments, bought).label("key"),
        )
        .select_from(claimed)
        .join(outbox, true())
        .outerjoin(payments, payments.c.id == claimed.c.payment_id)
        .outerjoin(bought, true())
        .outerjoin(marks, marks.c.event_id == outbox.c.event_id)
    )


def event_facts_of(row: Row[Any], event_type: str, *, last_try: bool) -> EventFacts:
    """Convert a row of ``look_statement`` into the facts about an event of this type."""
    facts = Facts(
        is_refund=event_type == PURCHASE_REFUNDED,
        payment_id=row.payment_id,
        mark=Mark(row.marked_outcome, row.marked_payment_id) if row.is_marked else None,
        purchase_active=row.purchase_active,
        payment_status=row.payment_status,
        mismatches=tuple(row.mismatches),
        pair_held=row.pair_held,
        has_pair=row.has_pair,
        last_try=last_try,
    )
    return EventFacts(facts, row.key)


def standing_statement(tables: Tables) -> Select[Any]:
    """what: reads the succeeded payments of the events' pairs, oldest first, each with its class
    lock: none (the pairs are already locked) · index: the pair's index of payments; without it,
    payments is scanned once; the outbox is scanned once if purchases do not determine each class
    """
    claimed, payments, purchases = claimed_keys(tables), tables.payments, tables.purchases
    refunded, own = payment_of(claimed, payments), purchase_of(claimed, purchases)
    pairs = (
        select(claimed.c.id, *comparable_pair(tables.ids, refunded, own))
        .select_from(claimed)
        .outerjoin(refunded, true())
        .outerjoin(own, true())
        .cte("pairs")
        .prefix_with("MATERIALIZED")
    )
    read = [payments.c[key] for key in READ_TO_CLASSIFY]
    stands = select(pairs.c.id.label("event"), *read)
    stands = stands.select_from(pairs.join(payments, has_pair(tables.ids, payments, pairs)))
    standing = stands.where(is_succeeded(payments)).cte("standing").prefix_with("MATERIALIZED")
    kind = class_among(standing, tables).label("kind")
    found = select(standing.c.event.label("id"), cast(standing.c.id, Text).label("payment_id"), kind)
    return found.order_by(standing.c.created_at, standing.c.id)
