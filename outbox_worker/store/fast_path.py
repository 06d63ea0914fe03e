"""Defines the fast statement. The fast statement claims due events and settles the *clean* events.

A clean event confirms a payment, and none of rules 1 to 8 of docs/explanation/state-machine.md
applies to it. All other claimed events *fall out*: the statement leaves their rows unchanged. The
worker settles these events in a *careful* transaction. A careful transaction locks the pairs before
it reads the facts.

The fast statement only creates purchases. All its reads and writes have one snapshot. After this
snapshot, another transaction can commit a purchase, a refund or a mark. The unique keys on the
pair, the payment and the mark then prevent a wrong purchase. The fast statement leaves out the
event, or fails and is rolled back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from psycopg.types.numeric import Int8
from sqlalchemy import (
    Boolean,
    ColumnElement,
    Float,
    FromClause,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
    true,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, array, distinct_on

from outbox_worker.database.arrays import ArrayText, Keys
from outbox_worker.database.expressions import seconds_since
from outbox_worker.database.statements import Fetch, Statement
from outbox_worker.errors import Again
from outbox_worker.keys import KeyKind
from outbox_worker.model import (
    ALWAYS,
    NO_LATENCIES,
    PURCHASE_CONFIRMED,
    Batch,
    DeadLetterState,
    DueWindow,
    Guard,
    Latencies,
    Outcome,
    Position,
    Repeated,
)
from outbox_worker.schema.tables import Tables
from outbox_worker.store import payload
from outbox_worker.store.claimed import event_of, window_start
from outbox_worker.store.claims import counted, due_events, is_other, of_types, start_due_at, start_of
from outbox_worker.store.guard import GuardState, index_is_in_transition, on_active_pair
from outbox_worker.store.identity import pair_key, written_order
from outbox_worker.store.pairs import claimed_keys, holds_pair, keys_of, payload_source, payment_of
from outbox_worker.store.queries import is_succeeded, type_of

_COPIED = ("student_id", "course_id", "payment_id", "amount", "currency", "is_active", "created_at")
_ZERO: ColumnElement[int] = literal_column("0")
_ONE: ColumnElement[int] = literal_column("1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FastResult:
    """The result of one fast statement."""

    claimed: int = 0
    created: int = 0
    """The number of settled events.

    Each settled event got a purchase and a mark, and was deleted from the outbox.
    """
    fell_out: Sequence[int] = ()
    """The claimed events (``outbox.id``) that the statement did not settle."""
    window: DueWindow = ALWAYS
    """The range of the due times of the claimed events."""
    end: Position | None = None
    """The position of the last event of the claim."""
    transaction_id: str | None = None
    latencies: Latencies = NO_LATENCIES
    """How late the settled events are: the times from ``due_at`` to the estimated end of COMMIT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The values that a claim loop passes to a fast statement."""

    limit: int
    """The largest number of events to claim."""
    until: datetime | None
    """Only events that are due by this time are claimed; None means now."""
    set_aside: Collection[int] = ()
    """The events that the statement must not claim."""
    odd: Collection[int] = ()
    """The events that the statement can claim, but must not settle.

    The database has refused before to delete their rows.
    """
    commit_seconds: float = 0.0
    """An estimate of the duration of COMMIT. The fast statement adds this estimate to each latency.
    """

    def to_claim(self, start: Position | None) -> dict[str, Any]:
        limit = Int8(self.limit)  # an Int8 like the id in ``start_of``
        return {"limit": limit, "until": self.until, **start_of(start), "set_aside": list(self.set_aside)}

    def to_settle(self) -> dict[str, Any]:
        return {"odd": list(self.odd), "commit_seconds": self.commit_seconds}


class FastPath:
    """Builds and executes the fast statements. This class keeps the compiled statements, but no state."""

    def __init__(self, tables: Tables, event_types: Collection[str] | None, bounds: Sequence[float]) -> None:
        """``bounds`` are the upper bounds of the latency histogram, in seconds."""
        self._tables, self._bounds = tables, bounds
        self._ours = of_types(tables.outbox, event_types)
        self._statements: dict[tuple[Guard, str, bool], Statement] = {}
        self._lock_due = Statement(_lock_due_statement(tables, self._ours))
        self.claims_itself = not payload.is_document(tables.outbox)
        """Whether the fast statement can claim events itself.

        If payloads are json or text, the worker must first claim the events and parse the payloads
        in Python.
        """

    def settle_due(self, fetch: Fetch, guard: GuardState, wanted: Wanted, start: Position | None) -> FastResult:
        """Claim due events after ``start``, and settle the clean events among them.

        None of rules 1 to 8 applies to a clean event. Raises Again if the statement wrote different
        numbers of purchases, marks and deletions.
        """
        values = {**wanted.to_claim(start), **wanted.to_settle()}
        return self._run(fetch, self._statement(guard, claims=True), values)

    def settle_locked(self, fetch: Fetch, guard: GuardState, wanted: Wanted, start: Position | None) -> FastResult:
        """Claim and settle events like ``settle_due``, but in two statements.

        The first statement claims the events and locks the pairs. The second statement settles the
        events, and sees every purchase that another transaction wrote under the lock of the same
        pair.
        """
        row = fetch(self._lock_due, wanted.to_claim(start))
        if not row.claimed:
            return FastResult()
        window = DueWindow(row.first_due_at, row.end_due_at)
        result = FastResult()
        if row.ids is not None:
            batch = Batch(ids=ArrayText(row.ids), payment_ids=ArrayText(row.payment_ids), window=window)
            result = self.settle_claimed(fetch, guard, wanted, batch)
        return replace(
            result,
            claimed=row.claimed,
            fell_out=[*(row.fell_out or ()), *result.fell_out],
            window=window,
            end=Position(row.end_due_at, row.end_id),
            transaction_id=row.transaction_id,
        )

    def settle_claimed(self, fetch: Fetch, guard: GuardState, wanted: Wanted, batch: Batch) -> FastResult:
        """Settle the clean events of a claimed batch (none of rules 1 to 8 applies to them).

        Under the guard ``lock``, the caller must have locked the pairs of the batch in an earlier
        statement. Raises Again if the statement wrote different numbers of purchases, marks and
        deletions. Also raises Again if the unique index is being built or dropped.
        """
        return self._run(fetch, self._statement(guard, claims=False), {**keys_of(batch), **wanted.to_settle()})

    def _statement(self, guard: GuardState, *, claims: bool) -> Statement:
        key = guard.guard, guard.predicate, claims
        if key not in self._statements:
            claimed = _due(self._tables, self._ours) if claims else _given(self._tables)
            from_due = start_due_at() if claims else window_start()
            built = fast_statement(self._tables, claimed, from_due, guard, self._bounds)
            self._statements[key] = Statement(built)
        return self._statements[key]

    def _run(self, fetch: Fetch, statement: Statement, values: dict[str, Any]) -> FastResult:
        row = fetch(statement, values)
        if not row.claimed:
            return FastResult()
        if not row.made == row.won == row.marked == row.removed:
            raise Again("The fast statement wrote purchases, marks and deletions that do not match.")
        if row.is_unsure and row.made:
            raise Again("The unique index is built or dropped at the moment.")
        return _result_of(row)


def _result_of(row: Any) -> FastResult:
    window = DueWindow(row.first_due_at, row.end_due_at)
    return FastResult(
        claimed=row.claimed,
        created=row.removed,
        fell_out=row.fell_out or (),
        window=window,
        end=Position(row.end_due_at, row.end_id),
        transaction_id=row.transaction_id,
        latencies=Latencies(row.buckets or (), row.latency_sum or 0.0),
    )


def _due(tables: Tables, ours: list[ColumnElement[bool]]) -> Select[Any]:
    """Select the due events after a position, oldest first, and lock their rows."""
    outbox = tables.outbox
    columns = [
        *(outbox.c[key] for key in ("id", "event_id", "due_at", "payload")),
        type_of(outbox).label("event_type"),
        counted(outbox.c.crashes).label("crashes"),
        payload.fast_candidate(tables, outbox).label("candidate"),
    ]
    return due_events(outbox, columns, [*ours, is_other(outbox)])


def _given(tables: Tables) -> Select[Any]:
    """Select the events that earlier statements of the transaction have claimed."""
    keys, outbox = claimed_keys(tables), tables.outbox
    event = event_of(keys, outbox)
    source = payload_source(keys, event)
    fields = [event.c.payload] if source is event else [keys.c[key] for key in Repeated._fields]
    read = [*(event.c[key] for key in ("id", "event_id", "due_at")), type_of(event).label("event_type")]
    crashes = counted(event.c.crashes).label("crashes")
    return select(*read, keys.c.payment_id, *fields, crashes).select_from(keys).join(event, true())


def _lock_due_statement(tables: Tables, ours: list[ColumnElement[bool]]) -> Select[*tuple[Any, ...]]:
    """what: claims due events, and locks the pairs of their payments in ascending key order, without waiting
    lock: FOR UPDATE SKIP LOCKED, then pg_try_advisory_xact_lock · index: (due_at, id); primary key of payments
    """
    claimed = _due(tables, ours).cte("claimed").prefix_with("MATERIALIZED")
    usable = _usable(claimed, tables)
    payments = payment_of(usable, tables.payments)
    key = pair_key(tables.ids, payments).label("key")
    pairs = select(usable.c.id, payments.c.id.label("payment_id"), key).join(payments, true())
    pairs = pairs.where(*_names_payment(usable, payments, tables), key.is_not(None))
    ordered = pairs.order_by(key).offset(_ZERO).subquery("ordered")
    is_locked = func.pg_try_advisory_xact_lock(ordered.c.key, type_=Boolean).label("is_locked")
    tried = select(ordered.c.id, ordered.c.payment_id, is_locked).cte("tried").prefix_with("MATERIALIZED")
    locked = select(tried.c.id).where(tried.c.is_locked)
    as_text = {
        name: select(cast(func.array_agg(tried.c[key]), Text)).where(tried.c.is_locked).scalar_subquery().label(name)
        for name, key in (("ids", "id"), ("payment_ids", "payment_id"))
    }
    fell_out = claimed.c.id.in_(locked).is_not(true())
    return select(
        func.count().label("claimed"),
        *as_text.values(),
        func.array_agg(claimed.c.id).filter(fell_out).label("fell_out"),
        *_position(claimed),
    ).select_from(claimed)


def _position(claimed: FromClause) -> list[ColumnElement[Any]]:
    """Build the columns that describe the whole claim: due times, last id and transaction id."""
    last = select(claimed.c.id).order_by(claimed.c.due_at.desc(), claimed.c.id.desc()).limit(_ONE)
    return [
        cast(func.min(claimed.c.due_at), Text).label("first_due_at"),
        cast(func.max(claimed.c.due_at), Text).label("end_due_at"),
        last.scalar_subquery().label("end_id"),
        cast(func.pg_current_xact_id_if_assigned(), Text).label("transaction_id"),
    ]


def fast_statement(
    tables: Tables,
    claimed_events: Select[Any],
    from_due: ColumnElement[Any],
    state: GuardState,
    bounds: Sequence[float],
) -> Select[Any]:
    """what: settles the clean events of a claim (none of rules 1 to 8 applies); returns counts,
    and the ids of all other events
    lock: FOR UPDATE SKIP LOCKED on the claimed rows; under the guard ``lock``, the pairs are locked already
    index: (due_at, id); primary keys of payments, marks, letters and outbox; purchases.payment_id and the pair's index
    guard: ``index``: ON CONFLICT DO NOTHING; ``lock``: one event per pair, none if the pair has an active purchase
    """
    claimed = claimed_events.cte("claimed").prefix_with("MATERIALIZED")
    guard = state.guard
    clean = _clean(tables, claimed, guard).cte("clean").prefix_with("MATERIALIZED")
    made = _made(tables, clean, guard, state.predicate).cte("made")
    won = _won(clean, made).cte("won").prefix_with("MATERIALIZED")
    marked = _marked(tables, won).cte("marked")
    removed = _removed(tables.outbox, won, claimed, from_due).cte("removed")
    fell_out = claimed.c.id.in_(select(won.c.id)).is_not(true())
    late = _latencies(removed, bounds).cte("late")
    numbers = {
        each.name: select(func.count()).select_from(each).scalar_subquery() for each in (made, won, marked, removed)
    }
    is_unsure = index_is_in_transition(tables.purchases) if guard is Guard.LOCK else literal_column("false")
    return select(
        func.count().label("claimed"),
        *(number.label(name) for name, number in numbers.items()),
        func.array_agg(claimed.c.id).filter(fell_out).label("fell_out"),
        *_position(claimed),
        select(func.array_agg(array([late.c.bucket, late.c.events]))).scalar_subquery().label("buckets"),
        select(func.sum(late.c.seconds)).scalar_subquery().label("latency_sum"),
        is_unsure.label("is_unsure"),
    ).select_from(claimed)


def _clean(tables: Tables, claimed: FromClause, guard: Guard) -> Select[Any]:
    """Select the clean events: none of rules 1 to 8 of docs/explanation/state-machine.md applies.

    Each check of another table is a subquery that returns one value. For NOT EXISTS, the planner
    could hash the whole table. The query compares the state of a dead letter outside its subquery.
    Otherwise the planner could read the whole index of open dead letters.
    """
    purchases, marks, letters = tables.purchases, tables.processed_events, tables.dead_letters
    claimed = _usable(claimed, tables)
    payments = payment_of(claimed, tables.payments)
    own = select(_ONE).where(purchases.c.payment_id == payments.c.id).limit(_ONE)
    mark = select(_ONE).where(marks.c.event_id == claimed.c.event_id).limit(_ONE)
    is_open = letters.c.state == DeadLetterState.OPEN.value
    any_letter = select(_ONE).where(is_open).limit(_ONE).correlate(None)
    letter = select(letters.c.state).where(letters.c.event_id == claimed.c.event_id).limit(_ONE)
    found = (
        select(
            *(claimed.c[key] for key in ("id", "event_id", "due_at")),
            payments.c.id.label("payment_id"),
            *(payments.c[key] for key in ("student_id", "course_id", "amount", "currency")),
        )
        .select_from(claimed)
        .join(payments, true())
        .where(
            *_names_payment(claimed, payments, tables),
            claimed.c.event_type == PURCHASE_CONFIRMED,
            claimed.c.crashes == _ZERO,
            claimed.c.id != func.all(bindparam("odd", type_=Keys("bigint"))),
            is_succeeded(payments),
            payments.c.student_id.is_not(None),
            payments.c.course_id.is_not(None),
            *(not_(differs) for differs in payload.mismatches(tables, claimed, payments).values()),
            own.scalar_subquery().is_(None),
            mark.scalar_subquery().is_(None),
            or_(
                any_letter.scalar_subquery().is_(None),
                letter.scalar_subquery().is_distinct_from(DeadLetterState.OPEN.value),
            ),
        )
        .order_by(*written_order(tables.ids, payments), claimed.c.due_at, claimed.c.id)
    )
    if guard is Guard.INDEX:
        return found
    held = select(_ONE).where(holds_pair(tables.ids, purchases, payments)).limit(_ONE)
    one_per_pair = distinct_on(*written_order(tables.ids, payments))
    return found.where(held.scalar_subquery().is_(None)).ext(one_per_pair)


def _usable(claimed: FromClause, tables: Tables) -> FromClause:
    """Return the claimed events with the column ``payment_id``.

    The column is NULL if the payload's text cannot be an id.
    """
    if "payment_id" in claimed.c:
        return claimed
    payment_id = payload.as_key(claimed.c.candidate, tables.payment_key)
    return select(claimed, payment_id.label("payment_id")).subquery("usable")


def _names_payment(claimed: FromClause, payments: FromClause, tables: Tables) -> list[ColumnElement[bool]]:
    """Build the condition that the payload contains the usual form of the payment's id."""
    if "candidate" not in claimed.c or tables.payment_key is not KeyKind.UUID:
        return []
    return [payload.is_written_as(claimed.c.candidate, payments.c.id)]


def _made(tables: Tables, clean: FromClause, guard: Guard, predicate: str) -> Any:
    """Insert the purchases of the clean events, in the order that all workers use."""
    purchases = tables.purchases
    copied = (clean.c[key] for key in ("student_id", "course_id", "payment_id", "amount", "currency"))
    order = (*written_order(tables.ids, clean), clean.c.due_at, clean.c.id)
    source = select(*copied, true(), func.clock_timestamp()).order_by(*order)
    inserted = postgresql.insert(purchases).from_select(list(_COPIED), source, include_defaults=False)
    if guard is Guard.INDEX:
        inserted = inserted.on_conflict_do_nothing(**on_active_pair(purchases, predicate))
    return inserted.returning(*(purchases.c[key] for key in ("payment_id", "is_active")))


def _won(clean: FromClause, made: FromClause) -> Select[Any]:
    """Select one event per payment whose purchase was inserted and is active.

    PostgreSQL executes IN as a hashed subplan. A join of the two relations would run as a slow
    nested loop, because the planner cannot estimate the numbers of rows.
    """
    is_made = clean.c.payment_id.in_(select(made.c.payment_id).where(made.c.is_active)).is_(true())
    read = [clean.c[key] for key in ("id", "event_id", "payment_id")]
    return (
        select(*read)
        .where(is_made)
        .ext(distinct_on(clean.c.payment_id))
        .order_by(clean.c.payment_id, clean.c.due_at, clean.c.id)
    )


def _marked(tables: Tables, won: FromClause) -> Any:
    marks = tables.processed_events
    columns = ["event_id", "event_type", "outcome", "payment_id", "processed_at"]
    given = (literal(PURCHASE_CONFIRMED), literal(Outcome.CREATED.value))
    source = select(won.c.event_id, *given, won.c.payment_id, func.clock_timestamp())
    return postgresql.insert(marks).from_select(columns, source, include_defaults=False).returning(_ONE)


def _removed(outbox: Table, won: FromClause, claimed: FromClause, from_due: ColumnElement[Any]) -> Any:
    """Delete the settled events by their primary key.

    The statement does not compare the exact due time of each event. Otherwise an event that was
    postponed after the snapshot would be settled, but not deleted. The statement only checks that
    the due time lies between the start and the end of the claim. If the planner believes that the
    outbox is empty, it can search for the ids in the index ``(due_at, id)``. Without this check,
    PostgreSQL would then read the whole index. The ids are passed as one array. The planner could
    start a join at the outbox.
    """
    ids = func.array(select(won.c.id).scalar_subquery())
    last = select(func.max(claimed.c.due_at)).scalar_subquery()
    is_claimed = (outbox.c.id == func.any(ids), outbox.c.due_at.between(from_due, last))
    return delete(outbox).where(*is_claimed).returning(outbox.c.due_at)


def _latencies(removed: FromClause, bounds: Sequence[float]) -> Select[*tuple[Any, ...]]:
    """Count the settled events per bucket of the latency histogram.

    The number of a bucket is the number of bounds that are equal to the latency or greater.
    ``width_bucket`` puts a value that equals a threshold above the threshold. A bucket of
    Prometheus contains its upper bound. Therefore the function compares the bounds and the
    latencies as negative numbers.
    """
    latency = seconds_since(removed.c.due_at) + bindparam("commit_seconds", type_=Float)
    each = select(latency.label("latency")).select_from(removed).offset(_ZERO).subquery("each")
    thresholds = cast(array([literal_column(repr(-float(bound))) for bound in reversed(bounds)]), ARRAY(Float))
    bucket = func.width_bucket(-each.c.latency, thresholds, type_=Integer)
    counted_events = func.count().label("events")
    return select(bucket.label("bucket"), counted_events, func.sum(each.c.latency).label("seconds")).group_by(_ONE)
