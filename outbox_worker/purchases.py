"""The door to ``purchases`` and ``processed_events`` (and, to read, ``payments``).

``PurchaseRepository`` makes the purchase and marks the event. Every method takes the session first; the caller owns the
transaction. Claimed events come as keys and are joined to their rows by ``unnest``: on the happy path no row travels.

The pair's lock is public: ``hashtextextended(student_id::text || ':' || course_id::text, 0)``, transaction-scoped. Any
verdict but a clean insert is reached under it, in both guards, each step a statement of its own: lock, look, write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from uuid import UUID

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
    literal,
    literal_column,
    not_,
    null,
    or_,
    select,
    true,
    type_coerce,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, array, distinct_on
from sqlalchemy.orm import Session

from outbox_worker import payload
from outbox_worker.database import Keys, Statement, event_of, window_of, write
from outbox_worker.decision import RetryPolicy
from outbox_worker.guard import GuardState, on_active_pair
from outbox_worker.model import GRANTS, Batch, DeadLetterState, Facts, Guard, Mark, Outcome, PaymentStatus, Repeated
from outbox_worker.schema import Tables

BACKFILL_NAMESPACE = "purchase-outbox-worker:"
"""Before a payment's id, in what the id of its backfill's mark is the MD5 of."""


@dataclass(frozen=True, slots=True)
class PairLocks:
    """Which pairs of a batch this transaction has locked."""

    keys: frozenset[int]
    locked: frozenset[int]
    """Events (``outbox.id``) whose pair is locked. An event without a pair is in neither set."""
    contended: frozenset[int]
    """Events whose pair somebody else has locked, or that exceed what one transaction may lock."""
    order: tuple[int, ...]
    """All events in the order in which every statement writes purchases."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What one look found about one event."""

    facts: Facts
    key: int | None
    """The lock key of its pair; None where no payment and no purchase names a pair."""


EventOf = Callable[[FromClause, Table], FromClause]
"""The events of a relation of keys: ``database.event_of``, or ``backfill_event_of``."""


class PurchaseRepository:
    """Purchases and marks of one set of tables. Holds statements, no state.

    ``event_of``: what the keys of a batch name, rows of the outbox or payments whose event was never written.
    """

    def __init__(self, tables: Tables, event_of: EventOf = event_of) -> None:
        self._tables = tables
        self._event_of = event_of
        self._insert = lru_cache(maxsize=16)(self._build_insert)
        self._lock = Statement(_lock_statement(tables, event_of))
        self._look = Statement(_look_statement(tables, event_of))
        self._mark_first = Statement(_mark_statement(tables))
        self._mark = Statement(_remark_statement(tables))

    def insert_clean(self, session: Session, batch: Batch, guard: GuardState, *, looks_at_marks: bool) -> set[int]:
        """Insert the purchases of all events that nothing speaks against; return those events (``outbox.id``).

        The events are of different payments; under the guard ``lock`` the caller holds the locks of all their pairs.
        Without ``looks_at_marks`` a mark that is there is left to ``mark_first``.
        """
        statement = self._insert(guard.guard, guard.predicate, clean=True, looks_at_marks=looks_at_marks)
        return self._run_insert(session, batch, statement)

    def insert_granted(self, session: Session, batch: Batch, guard: GuardState) -> set[int]:
        """Insert the purchases of events that ``decide`` granted, under their pairs' locks; return those written."""
        return self._run_insert(session, batch, self._insert(guard.guard, guard.predicate))

    def lock_pairs(self, session: Session, batch: Batch, capacity: int) -> PairLocks:
        """Lock the pairs of a batch in ascending key order, without waiting, at most ``capacity`` of them.

        Not waiting is what keeps two workers that both hold fresh purchases from a deadlock; an event whose pair is
        taken stays in the outbox for the next look.
        """
        rows = self._lock.execute(session, {**_keys(batch), "capacity": capacity}).all()
        return PairLocks(
            keys=frozenset(row.key for row in rows if row.held),
            locked=frozenset(row.id for row in rows if row.held),
            contended=frozenset(row.id for row in rows if row.key is not None and not row.held),
            order=tuple(row.id for row in sorted(rows, key=lambda row: row.position)),
        )

    def look(self, session: Session, batch: Batch, policy: RetryPolicy) -> dict[int, Sight]:
        """Read the facts of every event of the batch, by a snapshot taken after the locks."""
        rows = self._look.execute(session, _keys(batch))
        return {row.id: _sight(row, last_try=policy.is_last(batch[row.id].attempts)) for row in rows}

    def mark_first(self, session: Session, batch: Batch, outcome: Outcome) -> None:
        """Mark events that have no mark yet. Raises IntegrityError (23505) where one has."""
        self._run_mark(session, batch, outcome, self._mark_first)

    def mark(self, session: Session, batch: Batch, outcome: Outcome) -> None:
        """Mark events with their final outcome. A mark is written once; only a grant rewrites it."""
        self._run_mark(session, batch, outcome, self._mark)

    def _run_mark(self, session: Session, batch: Batch, outcome: Outcome, statement: Statement) -> None:
        for event_type, events in batch.by_type().items():
            keys = {"event_ids": events.event_ids, "payment_ids": events.payment_ids}
            write(session, statement, {**keys, "event_type": event_type, "outcome": outcome.value}, len(events))

    def _run_insert(self, session: Session, batch: Batch, statement: Statement) -> set[int]:
        made: list[str] | None = statement.execute(session, {**_keys(batch), "offered": len(batch)}).scalar()
        if made is None:
            return set(batch.ids)
        by_payment = dict(zip(batch.payments(), batch.ids, strict=True))
        return {by_payment[payment_id] for payment_id in made}

    def _build_insert(
        self, guard: Guard, predicate: str, *, clean: bool = False, looks_at_marks: bool = False
    ) -> Statement:
        statement = _insert_statement(self._tables, self._event_of, guard, clean=clean, looks_at_marks=looks_at_marks)
        if guard is Guard.INDEX:
            statement = statement.on_conflict_do_nothing(**on_active_pair(self._tables.purchases, predicate))
        made = statement.returning(cast(self._tables.purchases.c.payment_id, Text).label("payment_id")).cte("made")
        none = cast(array([]), ARRAY(Text))
        written = func.coalesce(func.array_agg(made.c.payment_id), none)
        return Statement(select(case((func.count() < bindparam("offered", type_=BigInteger), written))))


def _keys(batch: Batch) -> dict[str, Any]:
    read = Repeated._fields if batch.repeated else ()
    texts = {f"given_{key}": [getattr(each, key) for each in batch.repeated] for key in read}
    return {"ids": batch.ids, "payment_ids": batch.payment_ids, **texts, **window_of(batch)}


def _claimed(outbox: Table) -> FromClause:
    """The keys of a batch as a relation (id, payment_id), with what was read of documents where payloads are such."""
    ids, payments = bindparam("ids", type_=Keys("bigint")), bindparam("payment_ids", type_=Keys("uuid"))
    read = Repeated._fields if payload.is_document(outbox) else ()
    texts = [bindparam(f"given_{key}", type_=ARRAY(Text)) for key in read]
    return func.unnest(ids, payments, *texts).table_valued("id", "payment_id", *read).render_derived(name="claimed")


def _said(claimed: FromClause, event: FromClause) -> FromClause:
    """Where the optional keys of a payload are to be read."""
    return claimed if "amount" in claimed.c else event


def _payment_of(claimed: FromClause, payments: Table) -> FromClause:
    """What is read of a claimed event's payment, found by its id for the same reason."""
    read = (payments.c[key] for key in ("id", "student_id", "course_id", "amount", "currency", "status"))
    row = select(*read).where(payments.c.id == claimed.c.payment_id)
    return row.offset(literal_column("0")).lateral("payment")


def backfill_event_id(payment_id: UUID) -> UUID:
    """The event id under which a backfill marks a payment: always the same, and computable in SQL."""
    return UUID(hashlib.md5(f"{BACKFILL_NAMESPACE}{payment_id}".encode(), usedforsecurity=False).hexdigest())


def backfill_event_of(keys: FromClause, outbox: Table) -> FromClause:
    """The event that a payment without one would have: it says nothing but the payment's id."""
    named = func.md5(literal(BACKFILL_NAMESPACE) + cast(keys.c.payment_id, Text))
    said = select(
        keys.c.id,
        cast(named, postgresql.UUID(as_uuid=True)).label("event_id"),
        literal_column("CAST('-infinity' AS timestamptz)").label("due_at"),
        cast(null(), outbox.c.payload.type).label("payload"),
    )
    return said.correlate(keys).lateral("event")


def pair_key(student_id: ColumnElement[Any], course_id: ColumnElement[Any]) -> ColumnElement[Any]:
    """The public key of a pair's advisory lock, a bigint."""
    return func.hashtextextended(cast(student_id, Text) + ":" + cast(course_id, Text), 0, type_=BigInteger)


def _insert_statement(
    tables: Tables, event_of: EventOf, guard: Guard, *, clean: bool, looks_at_marks: bool
) -> postgresql.Insert:
    """what: purchases of claimed events, from their payment rows, in the order every worker keeps
    lock: the claimed rows' (held) · index: primary keys of outbox and payments, purchases.payment_id
    guard: the caller's ON CONFLICT, or one event per pair and none where the pair is held (under its lock)
    """
    claimed, purchases = _claimed(tables.outbox), tables.purchases
    outbox, payments = event_of(claimed, tables.outbox), _payment_of(claimed, tables.payments)
    source = (
        select(*_granted_columns(payments))
        .select_from(claimed)
        .join(outbox, true())
        .join(payments, true())
        .where(~exists().where(purchases.c.payment_id == payments.c.id))
        .order_by(payments.c.student_id, payments.c.course_id, outbox.c.due_at, outbox.c.id)
    )
    if clean:
        source = source.where(*_nothing_speaks_against(tables, outbox, _said(claimed, outbox), payments))
    if looks_at_marks:
        marks = tables.processed_events
        source = source.where(~exists().where(marks.c.event_id == outbox.c.event_id))
    if guard is Guard.LOCK:
        source = source.ext(distinct_on(payments.c.student_id, payments.c.course_id))
        source = source.where(~exists().where(_holds_pair(purchases, payments)))
    columns = ["student_id", "course_id", "payment_id", "amount", "currency", "is_active", "created_at"]
    return postgresql.insert(purchases).from_select(columns, source, include_defaults=False)


def _granted_columns(payments: FromClause) -> list[ColumnElement[Any]]:
    copied = [payments.c.student_id, payments.c.course_id, payments.c.id, payments.c.amount, payments.c.currency]
    return [*copied, true(), func.clock_timestamp()]


def _nothing_speaks_against(
    tables: Tables, outbox: FromClause, said: FromClause, payments: FromClause
) -> list[ColumnElement[bool]]:
    """The predicates of a clean insert of an event that is not marked: rules 4 to 7 all pass, no dead letter is open.

    The letter's state is asked for by its event alone: an index of open letters would be read from end to end.
    """
    letters = tables.dead_letters
    state = select(letters.c.state).where(letters.c.event_id == outbox.c.event_id).scalar_subquery()
    return [
        cast(payments.c.status, Text) == PaymentStatus.SUCCEEDED.value,
        *(not_(differs) for differs in payload.mismatches(said, payments).values()),
        state.is_distinct_from(DeadLetterState.OPEN.value),
    ]


def _holds_pair(purchases: FromClause, payments: FromClause) -> ColumnElement[bool]:
    """Another purchase holds the payment's pair active; its payment may be NULL: a gift."""
    return and_(
        purchases.c.student_id == payments.c.student_id,
        purchases.c.course_id == payments.c.course_id,
        purchases.c.is_active,
        purchases.c.payment_id.is_distinct_from(payments.c.id),
    )


def _lock_statement(tables: Tables, event_of: EventOf) -> Select[Any]:
    """what: advisory locks on the pairs of claimed events, in ascending key order, tried and never waited for
    lock: pg_try_advisory_xact_lock · index: primary key of payments, purchases.payment_id
    """
    claimed, payments, purchases = _claimed(tables.outbox), tables.payments, tables.purchases
    outbox = event_of(claimed, tables.outbox)
    student = func.coalesce(payments.c.student_id, purchases.c.student_id)
    course = func.coalesce(payments.c.course_id, purchases.c.course_id)
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


def _look_statement(tables: Tables, event_of: EventOf) -> Select[Any]:
    """what: the facts about claimed events, all in one snapshot
    lock: none (the pairs' locks are held) · index: primary keys, purchases.payment_id, the pair's index
    """
    payments, purchases, marks = tables.payments, tables.purchases, tables.processed_events
    claimed = _claimed(tables.outbox)
    outbox = event_of(claimed, tables.outbox)
    own, held = purchases.alias("own"), purchases.alias("held")
    active = select(func.bool_or(own.c.is_active)).where(own.c.payment_id == claimed.c.payment_id).scalar_subquery()
    pair = [func.coalesce(payments.c[key], _of_own(purchases, claimed, key)) for key in ("student_id", "course_id")]
    return (
        select(
            claimed.c.id,
            type_coerce(claimed.c.payment_id, postgresql.UUID(as_uuid=True)).label("payment_id"),
            marks.c.event_id.is_not(None).label("is_marked"),
            marks.c.outcome.label("marked_outcome"),
            marks.c.payment_id.label("marked_payment_id"),
            active.label("purchase_active"),
            cast(payments.c.status, Text).label("payment_status"),
            payload.mismatched_keys(_said(claimed, outbox), payments).label("mismatches"),
            exists().where(_holds_pair(held, payments)).label("pair_held"),
            pair_key(*pair).label("key"),
        )
        .select_from(claimed)
        .join(outbox, true())
        .outerjoin(payments, payments.c.id == claimed.c.payment_id)
        .outerjoin(marks, marks.c.event_id == outbox.c.event_id)
    )


def _of_own(purchases: Table, claimed: FromClause, key: str) -> ColumnElement[Any]:
    """A column of the payment's own purchase: names the pair when the payment row is archived."""
    own = purchases.alias()
    return select(own.c[key]).where(own.c.payment_id == claimed.c.payment_id).limit(1).scalar_subquery()


def _sight(row: Row[Any], *, last_try: bool) -> Sight:
    facts = Facts(
        payment_id=row.payment_id,
        mark=Mark(row.marked_outcome, row.marked_payment_id) if row.is_marked else None,
        purchase_active=row.purchase_active,
        payment_status=row.payment_status,
        mismatches=tuple(row.mismatches),
        pair_held=row.pair_held,
        last_try=last_try,
    )
    return Sight(facts, row.key)


def _mark_statement(tables: Tables) -> postgresql.Insert:
    """what: marks of settled events · lock: the claimed rows' (held) · index: primary key of processed_events"""
    marks, given = tables.processed_events, bindparam("outcome", type_=Text)
    arrays = [bindparam(name, type_=Keys("uuid")) for name in ("event_ids", "payment_ids")]
    settled = func.unnest(*arrays).table_valued("event_id", "payment_id").render_derived(name="settled")
    source = select(
        *(settled.c.event_id, bindparam("event_type", type_=Text), given, settled.c.payment_id),
        func.clock_timestamp(),
        case((given == Outcome.RECOVERED.value, func.clock_timestamp())),
    )
    columns = ["event_id", "event_type", "outcome", "payment_id", "processed_at", "recovered_at"]
    return postgresql.insert(marks).from_select(columns, source, include_defaults=False)


def _remark_statement(tables: Tables) -> postgresql.Insert:
    """what: the same; an existing mark keeps its outcome unless a purchase was granted now
    lock: the claimed rows' (held) · index: primary key of processed_events
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
