"""Writes ``purchases`` and ``processed_events``, and reads ``payments``.

Use ``PurchaseRepository``. Each statement receives the keys of claimed events as arrays, and joins
the keys to the rows of the tables. If every event gets its purchase, the INSERT returns NULL
instead of a list of payments.

Every statement writes purchases in the order (student_id, course_id, due_at, id). Otherwise two
workers could deadlock. ``identity.written_order`` defines how the ids are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    FromClause,
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
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    true,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, BIT, array, distinct_on
from sqlalchemy.orm import Session

from outbox_worker.database.arrays import Keys
from outbox_worker.database.failures import WrittenOtherwise, violated
from outbox_worker.database.planner import FREE_PLANS, planned
from outbox_worker.database.statements import Statement, relying_on_a_key, write
from outbox_worker.decision import RetryPolicy
from outbox_worker.errors import DefaultTaken, PairTaken
from outbox_worker.keys import Key, KeyKind
from outbox_worker.model import GRANTS, Batch, Guard, Outcome
from outbox_worker.schema.interference import last_and_largest, sequences, set_sequence, unique_key
from outbox_worker.schema.tables import Tables, relation_name
from outbox_worker.store.claimed import event_of
from outbox_worker.store.guard import GuardState, index_is_in_transition, on_active_pair
from outbox_worker.store.identity import comparable_pair, written_order
from outbox_worker.store.pairs import (
    EventFacts,
    EventOf,
    PairLocks,
    StandingPayment,
    claimed_keys,
    event_facts_of,
    holds_pair,
    keys_of,
    lock_statement,
    look_statement,
    payment_of,
    purchase_of,
    standing_statement,
)

_COPIED = ("student_id", "course_id", "payment_id", "amount", "currency", "is_active", "created_at")
"""The columns of a purchase that the worker inserts."""

_DIGITS = 15
"""The number of hexadecimal MD5 digits in an integer event id of a backfill.

This number of digits fits into a bigint.
"""

BACKFILL_NAMESPACE = "purchase-outbox-worker:"
"""A backfill writes this text before a payment's id, and computes the MD5 of both.

The MD5 is the event id of the payment's mark.
"""


class PurchaseRepository:
    """Reads and writes purchases and marks. This class keeps the compiled statements, but no state.

    ``event_of`` joins the keys of a batch to rows of the outbox. A backfill passes another
    function, because its payments have no events in the outbox.
    """

    def __init__(self, tables: Tables, event_of: EventOf = event_of) -> None:
        self._tables = tables
        self._event_of = event_of
        self._insert = lru_cache(maxsize=16)(self._build_insert)
        self._lock = Statement(lock_statement(tables, event_of))
        self._look = Statement(look_statement(tables, event_of))
        self._standing = Statement(standing_statement(tables))
        self._revoke = Statement(_offered(_revoke_statement(tables), tables))
        self._changed = Statement(_changed_statement(tables))
        self._mark = Statement(_remark_statement(tables))

    def insert_granted(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:
        """Insert the purchases that ``decide`` allowed. The caller must have locked the pairs.

        Return the ids of the events whose purchase was inserted.
        """
        return self._run_insert(session, batch, self._insert(guard.guard, guard.predicate))

    def lock_pairs(self, session: Session, batch: Batch, capacity: int) -> PairLocks:
        """Lock up to ``capacity`` pairs of a batch in ascending key order.

        Do not wait for other transactions. Waiting could deadlock, because both transactions can
        have written purchases already. If another transaction has locked a pair, the events of this
        pair stay in the outbox until the next claim.
        """
        rows = self._lock.execute(session, {**keys_of(batch), "capacity": capacity}).all()
        return PairLocks(
            keys=frozenset(row.key for row in rows if row.held),
            locked=frozenset(row.id for row in rows if row.held),
            contended=frozenset(row.id for row in rows if row.key is not None and not row.held),
            order=tuple(row.id for row in sorted(rows, key=lambda row: row.position)),
        )

    def look(self, session: Session, batch: Batch, policy: RetryPolicy) -> dict[int, EventFacts]:
        """Read the facts about every event of the batch. Call this method after the pairs are locked."""
        rows = self._look.execute(session, keys_of(batch))
        events = ((row, batch[row.id]) for row in rows)
        return {
            row.id: event_facts_of(row, event.event_type, last_try=policy.is_last(event.attempts))
            for row, event in events
        }

    def revoke(self, session: Session, batch: Batch) -> set[int]:
        """Make the purchases of refunded payments inactive.

        Return the ids of the events whose refund was written. The caller must have locked the
        pairs. Each payment must occur in one event only. If a payment has no purchase, the
        statement inserts an inactive purchase. A later confirmation then creates no active
        purchase.
        """
        with relying_on_a_key():
            return self._run_insert(session, batch, self._revoke)

    def standing_payments(self, session: Session, batch: Batch) -> dict[int, list[StandingPayment]]:
        """Read the succeeded payments of the events' pairs, oldest first.

        The planner is allowed to scan the whole table here. ``payments`` does not always have an
        index on the pair.
        """
        found: dict[int, list[StandingPayment]] = {}
        with planned(session, **FREE_PLANS):
            for row in self._standing.execute(session, keys_of(batch)):
                found.setdefault(row.id, []).append(StandingPayment(row.payment_id, row.kind))
        return found

    def mark(self, session: Session, batch: Batch, outcome: Outcome) -> None:
        """Mark events with their final outcome.

        An existing mark gets the new outcome only if the event has just created a purchase
        (``GRANTS``). Otherwise the mark keeps its outcome. If an existing mark has no payment id,
        it gets the payment id of the event.
        """
        for event_type, events in batch.by_type().items():
            keys = {"event_ids": events.event_ids, "payment_ids": events.payment_ids}
            write(session, self._mark, {**keys, "event_type": event_type, "outcome": outcome.value}, len(events))

    def is_own_key(self, session: Session, error: Exception) -> bool:
        """Return whether an error 23505 names the unique key of a pair, of a payment, or of an
        event's mark.

        If it does, the event is the cause of the error. If the error names another unique key,
        every purchase can violate that key. Raises DefaultTaken if a sequence gave the row a key
        that another row has. The sequence is then behind its column.
        """
        purchases, marks = self._tables.purchases, self._tables.processed_events
        written = {purchases: {*_COPIED, "deactivated_at"}, marks: {column.key for column in marks.c}}
        for table, keys in written.items():
            names = unique_key(session, table, violated(error))
            if names is None:
                continue
            if not names & {table.c[key].name for key in keys}:
                _raise_if_behind(session, table, names, error)
            pair = {purchases.c.student_id.name, purchases.c.course_id.name}
            own = (pair, {purchases.c.payment_id.name}) if table is purchases else ({marks.c.event_id.name},)
            return names in own
        return False

    def _run_insert(self, session: Session, batch: Batch, statement: Statement) -> set[int]:
        row = statement.execute(session, {**keys_of(batch), "offered": len(batch)}).one()
        written = set(batch.ids) if row.payments is None else self._keys_of_payments(batch, row.payments)
        if row.is_unsure and written:
            self._check_alone(session, batch.among(written))
        return written

    def _keys_of_payments(self, batch: Batch, payment_ids: Sequence[str]) -> set[int]:
        """Return the events of these payments.

        Raises WrittenOtherwise if a trigger changed the payment id of a purchase.
        """
        by_payment = dict(zip(batch.payment_ids, batch.ids, strict=True))
        if not by_payment.keys() >= {*payment_ids}:
            raise self._written_otherwise(["payment_id"])
        return {by_payment[payment_id] for payment_id in payment_ids}

    def _check_alone(self, session: Session, batch: Batch) -> None:
        """Raise PairTaken if a pair whose purchase was just written has a second active purchase.

        This check is a new statement with a newer snapshot than the INSERT. If the unique index is
        dropped concurrently, the INSERT can miss a purchase of another transaction. That
        transaction wrote the purchase under the guard ``index``, and committed after the INSERT
        began.
        """
        if any(row.pair_held for row in self._look.execute(session, keys_of(batch))):
            raise PairTaken("Another transaction has just created an active purchase of the same pair.")

    def read_back(self, session: Session, payment_ids: Sequence[str | None], *, is_active: bool) -> None:
        """Raise WrittenOtherwise if a trigger changed a purchase that this transaction has written.

        Call this method at the end, after the deferred triggers have run. If the triggers ran
        earlier, a deferred trigger that reads the mark would not find the mark.
        """
        if not payment_ids:
            return
        values = {"payment_ids": payment_ids, "is_active": is_active}
        changed = sorted({key for row in self._changed.execute(session, values) for key in row.changed})
        if changed:
            raise self._written_otherwise(changed)

    def _written_otherwise(self, changed: Iterable[str]) -> WrittenOtherwise:
        relation = relation_name(self._tables.purchases)
        return WrittenOtherwise(f"a trigger on {relation} changed the purchase: {', '.join(changed)}")

    def _build_insert(self, guard: Guard, predicate: str) -> Statement:
        statement = _insert_statement(self._tables, self._event_of, guard)
        if guard is Guard.INDEX:
            statement = statement.on_conflict_do_nothing(**on_active_pair(self._tables.purchases, predicate))
            return Statement(_offered(statement, self._tables))
        return Statement(_offered(statement, self._tables, index_is_in_transition(self._tables.purchases)))


def _raise_if_behind(session: Session, table: Table, names: set[str], error: Exception) -> None:
    """Raise DefaultTaken if a sequence that fills one of these columns is behind.

    Also raise DefaultTaken if the value of the sequence or of the column is unknown.
    """
    remedies = []
    for column, sequence in sequences(session, table).items():
        if column in names:
            last, largest = last_and_largest(session, table, column, sequence)
            if last is None or largest is None or largest > last:
                remedies.append(set_sequence(table, column, sequence))
    if remedies:
        raise DefaultTaken(
            f"a default of {relation_name(table)} gives new rows a key that another row has (constraint "
            f"{violated(error)[2]}); its sequence is behind, so run this: {' '.join(remedies)}"
        )


def backfill_event_id(payment_id: Key, kind: KeyKind) -> Key:
    """Compute the event id of the mark that a backfill writes for a payment.

    ``kind`` is the kind of event ids. An integer id is negative, because the ids of a producer are
    usually positive. ``backfill_event_of`` computes the same id in SQL.
    """
    digest = hashlib.md5(f"{BACKFILL_NAMESPACE}{payment_id}".encode(), usedforsecurity=False).hexdigest()
    return kind.key(str(-1 - int(digest[:_DIGITS], 16) if kind is KeyKind.INTEGER else UUID(digest)))


def backfill_event_of(kind: KeyKind, keys: FromClause, outbox: Table) -> FromClause:
    """Build a row that replaces the missing event of a payment. ``kind`` is the kind of event ids.

    The payload of the row is NULL. Therefore the row cannot contradict the payment.
    """
    digest = func.md5(literal(BACKFILL_NAMESPACE) + cast(keys.c.payment_id, Text), type_=Text)
    number = cast(literal("x") + func.left(digest, _DIGITS), BIT(4 * _DIGITS))
    as_uuid: ColumnElement[Any] = cast(digest, postgresql.UUID(as_uuid=True))
    event_id = {
        KeyKind.UUID: as_uuid,
        KeyKind.INTEGER: literal_column("-1") - cast(number, BigInteger),
        KeyKind.TEXT: cast(as_uuid, Text),
    }
    event: Select[Any] = select(
        keys.c.id,
        event_id[kind].label("event_id"),
        literal_column("CAST('-infinity' AS timestamptz)").label("due_at"),
        cast(null(), outbox.c.payload.type).label("payload"),
    )
    return event.correlate(keys).lateral("event")


def _offered(statement: postgresql.Insert, tables: Tables, is_unsure: ColumnElement[bool] | None = None) -> Select[Any]:
    """Build a query that returns the payments whose purchases the statement wrote.

    The result is NULL if the statement wrote the purchases of all ``offered`` events. The query
    also returns ``is_unsure``: whether the caller must check that no pair has a second active
    purchase.
    """
    made = statement.returning(cast(tables.purchases.c.payment_id, Text).label("payment_id")).cte("made")
    none = cast(array([]), ARRAY(Text))
    written = func.coalesce(func.array_agg(made.c.payment_id), none)
    payments = case((func.count() < bindparam("offered", type_=BigInteger), written))
    return select(payments.label("payments"), (false() if is_unsure is None else is_unsure).label("is_unsure"))


def _insert_statement(tables: Tables, event_of: EventOf, guard: Guard) -> postgresql.Insert:
    """what: inserts the purchases of claimed events, copied from payment rows, in the order in which all workers write
    lock: the claimed rows (already locked) · index: primary keys of outbox and payments, purchases.payment_id
    guard: ``index``: the caller adds ON CONFLICT; ``lock``: one event per pair, none if the pair has an active purchase
    """
    claimed, purchases = claimed_keys(tables), tables.purchases
    outbox, payments = event_of(claimed, tables.outbox), payment_of(claimed, tables.payments)
    source = (
        select(*_copied_columns(payments), true(), func.clock_timestamp())
        .select_from(claimed)
        .join(outbox, true())
        .join(payments, true())
        .where(~exists().where(purchases.c.payment_id == payments.c.id))
        .where(payments.c.student_id.is_not(None), payments.c.course_id.is_not(None))
        .order_by(*written_order(tables.ids, payments), outbox.c.due_at, outbox.c.id)
    )
    if guard is Guard.LOCK:
        source = source.ext(distinct_on(*written_order(tables.ids, payments)))
        source = source.where(~exists().where(holds_pair(tables.ids, purchases, payments)))
    return postgresql.insert(purchases).from_select(list(_COPIED), source, include_defaults=False)


def _copied_columns(payments: FromClause) -> list[ColumnElement[Any]]:
    return [payments.c.student_id, payments.c.course_id, payments.c.id, payments.c.amount, payments.c.currency]


def _revoke_statement(tables: Tables) -> postgresql.Insert:
    """what: makes purchases of refunded payments inactive, or inserts inactive ones, in the order that all workers use
    lock: pairs (already locked), then the purchases' rows · index: primary keys, purchases.payment_id (ON CONFLICT)

    PostgreSQL checks NOT NULL before ON CONFLICT. If the shop has erased a value from the payment,
    the statement reads the value from the purchase.
    """
    claimed, purchases, now = claimed_keys(tables), tables.purchases, func.clock_timestamp()
    outbox, payments = event_of(claimed, tables.outbox), payment_of(claimed, tables.payments)
    own = purchase_of(claimed, purchases)
    read = ("student_id", "course_id", "amount", "currency")
    student, course, amount, currency = (func.coalesce(payments.c[key], own.c[key]) for key in read)
    source = (
        select(student, course, payments.c.id, amount, currency, false(), now, now)
        .select_from(claimed)
        .join(outbox, true())
        .join(payments, true())
        .outerjoin(own, true())
        .order_by(*comparable_pair(tables.ids, payments, own), outbox.c.due_at, outbox.c.id)
    )
    columns = [*_COPIED, "deactivated_at"]
    statement = postgresql.insert(purchases).from_select(columns, source, include_defaults=False)
    return statement.on_conflict_do_update(
        index_elements=[purchases.c.payment_id],
        index_where=purchases.c.payment_id.is_not(None),
        set_={
            purchases.c.is_active: false(),
            purchases.c.deactivated_at: case((purchases.c.is_active, now), else_=purchases.c.deactivated_at),
        },
    )


def _changed_statement(tables: Tables) -> Select[Any]:
    """what: finds purchases that differ from what the worker wrote; returns the names of the columns that differ
    lock: none · index: primary key of payments, purchases.payment_id
    """
    purchases, is_active = tables.purchases, bindparam("is_active", type_=Boolean)
    ids = bindparam("payment_ids", type_=Keys(tables.payment_key))
    written = func.unnest(ids).table_valued("payment_id").render_derived(name="written")
    payments = payment_of(written, tables.payments)
    is_there = purchases.c.payment_id.is_not(None)
    differs = {
        "payment_id": not_(is_there),
        "is_active": and_(is_there, purchases.c.is_active.is_distinct_from(is_active)),
        **{
            key: and_(is_there, is_active, purchases.c[key].is_distinct_from(payments.c[key]))
            for key in ("student_id", "course_id")
        },
    }
    changed = func.array_remove(array([case((differs[key], literal(key, Text))) for key in differs]), None)
    return (
        select(changed.label("changed"))
        .select_from(written)
        .join(payments, true())
        .outerjoin(purchases, purchases.c.payment_id == payments.c.id)
        .where(or_(*differs.values()))
    )


def _mark_statement(tables: Tables) -> postgresql.Insert:
    """what: marks settled events · lock: claimed rows (already locked) · index: primary key of processed_events"""
    marks, given = tables.processed_events, bindparam("outcome", type_=Text)
    kinds = {"event_ids": tables.event_key, "payment_ids": tables.payment_key}
    arrays = [bindparam(name, type_=Keys(kind)) for name, kind in kinds.items()]
    settled = func.unnest(*arrays).table_valued("event_id", "payment_id").render_derived(name="settled")
    source = select(
        *(settled.c.event_id, bindparam("event_type", type_=Text), given, settled.c.payment_id),
        func.clock_timestamp(),
        case((given == Outcome.RECOVERED.value, func.clock_timestamp())),
    )
    columns = ["event_id", "event_type", "outcome", "payment_id", "processed_at", "recovered_at"]
    return postgresql.insert(marks).from_select(columns, source, include_defaults=False)


def _remark_statement(tables: Tables) -> postgresql.Insert:
    """what: marks settled events; an existing mark gets the new outcome only if the event created a
    purchase
    lock: the claimed rows (already locked) · index: primary key of processed_events
    """
    marks, statement = tables.processed_events, _mark_statement(tables)
    new = statement.excluded
    granted = or_(*(new.outcome == outcome.value for outcome in sorted(GRANTS)))
    return statement.on_conflict_do_update(
        index_elements=[marks.c.event_id],
        set_={
            marks.c.outcome: case((granted, new.outcome), else_=marks.c.outcome),
            marks.c.recovered_at: func.coalesce(new.recovered_at, marks.c.recovered_at),
            marks.c.payment_id: func.coalesce(marks.c.payment_id, new.payment_id),
        },
    )
