"""Claims and settles the rows of ``outbox``, and writes and closes the dead letters of events.

A claim locks the rows of due events until its transaction ends. During this time, no other worker
can claim these events. The transaction that settles an event also deletes its row. Therefore the
outbox contains only events that are not settled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Delete,
    FromClause,
    Interval,
    Row,
    Select,
    Table,
    Text,
    Update,
    bindparam,
    delete,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from outbox_worker.database.arrays import Keys
from outbox_worker.database.expressions import seconds_since
from outbox_worker.database.failures import describe, violated
from outbox_worker.database.statements import Fetch, Statement, write
from outbox_worker.errors import Swallowed
from outbox_worker.keys import Key
from outbox_worker.model import Batch, DeadLetterState, DueWindow, Position, Reason
from outbox_worker.schema.interference import likely_cause
from outbox_worker.schema.tables import Tables
from outbox_worker.store import payload
from outbox_worker.store.claimed import event_of, window_of, windows_of, within
from outbox_worker.store.claims import (
    Claim,
    IsolatedEvent,
    claim_isolated_statement,
    claim_of,
    claim_statement,
    claim_these_statement,
    complete,
    counted,
    due_statement,
    is_other,
    isolate_statement,
    next_due_statement,
    of_types,
    start_of,
)
from outbox_worker.store.queries import NEVER, is_claimable

_IDS = bindparam("ids", type_=Keys("bigint"))
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
"""The pattern of a traceparent, by the standard W3C Trace Context. All other texts are ignored."""
_TRACEPARENT_LENGTH = 55


@dataclass(frozen=True, slots=True)
class Postponement:
    """The delay until an event is tried again."""

    delay: timedelta
    charged: bool
    """Whether the failed try counts towards the maximum number of tries."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Backlog:
    """The length of the queue. Each count stops at ``Outbox.BACKLOG_BOUND``."""

    due: int
    waiting: int
    """The number of events that become due later."""
    oldest_due_seconds: float


class Outbox:
    """Reads and writes the queue. This class keeps the compiled statements, but no state.

    ``event_types`` are the types of events to claim, if other consumers share the outbox. None
    means all types.
    """

    BACKLOG_BOUND = 100_000

    def __init__(self, tables: Tables, event_types: Collection[str] | None) -> None:
        self._tables = tables
        self._event_types = None if event_types is None else sorted(event_types)
        self._claim = Statement(claim_statement(tables, ours=self._ours()))
        self._claim_others = Statement(claim_statement(tables, ours=[*self._ours(), is_other(tables.outbox)]))
        self._claim_isolated = Statement(claim_isolated_statement(tables))
        self._claim_these = Statement(claim_these_statement(tables))
        self._isolate_first = Statement(isolate_statement(tables.outbox, [*self._ours(), is_other(tables.outbox)]))
        self._isolate = Statement(isolate_statement(tables.outbox, [tables.outbox.c.id == bindparam("id", BigInteger)]))
        self._due = Statement(due_statement(tables.outbox, ours=[*self._ours(), is_other(tables.outbox)]))
        self._next_due = Statement(next_due_statement(tables.outbox, ours=[*self._ours(), is_other(tables.outbox)]))
        self._left = Statement(_left_statement(tables.outbox))
        self._remove = Statement(_remove_statement(tables.outbox))
        self._postpone = Statement(_postpone_statement(tables.outbox))
        self._bury = Statement(_bury_statement(tables))
        self._letters = Statement(_open_letters_statement(tables))
        self._traceparents = Statement(_traceparents_statement(tables.outbox))
        self._close_letters = Statement(_close_letters_statement(tables))
        self._backlog = Statement(
            _backlog_statement(tables.outbox, [*self._ours(), is_other(tables.outbox)], self.BACKLOG_BOUND)
        )

    @property
    def event_types(self) -> Sequence[str] | None:
        """The types of events to claim; None if all types are claimed."""
        return self._event_types

    def _claim_of(self, row: Row[Any]) -> Claim:
        return claim_of(self._tables, row)

    def _ours(self) -> list[ColumnElement[bool]]:
        return of_types(self._tables.outbox, self._event_types)

    def claim(
        self,
        session: Session,
        limit: int,
        until: datetime | None = None,
        start: Position | None = None,
        *,
        set_aside: Collection[int] = (),
    ) -> Claim:
        """Lock up to ``limit`` due events in the order ``(due_at, id)``.

        Skip events that another transaction has locked, and the events in ``set_aside``. Claim only
        events that are due by ``until``, or by now if ``until`` is None. If ``start`` is given,
        claim only events after this position.
        """
        values = {"limit": limit, "until": until, **start_of(start)}
        if set_aside:
            return self._claim_of(self._claim_others.execute(session, {**values, "set_aside": list(set_aside)}).one())
        return self._claim_of(self._claim.execute(session, values).one())

    def isolate(
        self, session: Session, key: int | None, until: datetime | None, *, set_aside: Collection[int] = ()
    ) -> IsolatedEvent | None:
        """Choose one due event to process alone, and lock it until this transaction ends.

        ``key`` is the id of the event. If ``key`` is None, choose the first event that is not
        locked and not in ``set_aside``. Return None if the event is not due, does not exist or is
        locked.
        """
        values = {"until": until} | ({"set_aside": list(set_aside)} if key is None else {"id": key})
        statement = self._isolate_first if key is None else self._isolate
        row = statement.execute(session, values).one_or_none()
        return None if row is None else IsolatedEvent(row.id, row.crashes)

    def claim_isolated(self, session: Session, isolated: IsolatedEvent, until: datetime | None) -> Claim:
        """Lock the event that ``isolate`` chose, in the transaction that settles the event.

        The claim is empty if another worker has locked, settled or postponed the event since
        ``isolate``.
        """
        return self._claim_of(self._claim_isolated.execute(session, {"id": isolated.id, "until": until}).one())

    def claim_these(
        self, session: Session, ids: Sequence[int], windows: Sequence[DueWindow], until: datetime | None
    ) -> Claim:
        """Lock the events with these ids, if they are still due.

        Skip events that another transaction has locked. The due times of the events lie in
        ``windows``.
        """
        values = {"ids": ids, "until": until, **windows_of(windows)}
        return self._claim_of(self._claim_these.execute(session, values).one())

    def has_due(self, session: Session, until: datetime, *, set_aside: Collection[int] = ()) -> bool:
        """Return whether any event is due by ``until``.

        Events that another worker has locked count, too. Events in ``set_aside`` do not count.
        """
        return bool(self._due.execute(session, {"until": until, "set_aside": list(set_aside)}).scalar())

    def seconds_until_due(self, fetch: Fetch, start: Position | None, *, set_aside: Collection[int] = ()) -> float:
        """Return the seconds until the first event after ``start`` is due.

        Return 0 or less if the event is due now, and infinity if no event exists. Events that
        another worker has locked count, too. Events in ``set_aside`` do not count.
        """
        values = {**start_of(start), "set_aside": list(set_aside)}
        late: float | None = fetch(self._next_due, values).late_seconds
        return math.inf if late is None else -late

    def remove(self, session: Session, batch: Batch, ids: Collection[int]) -> None:
        """Delete events from the outbox. Raises Swallowed if an event is still there afterwards.

        The caller must have written a mark or a dead letter for each event in the same transaction.
        It is no error if an event no longer exists. For example, a trigger on ``purchases`` can
        have deleted the event.
        """
        values = {"ids": list(ids), **window_of(batch)}
        try:
            write(session, self._remove, values, len(ids))
        except Swallowed as error:
            if left := self._left.execute(session, values).scalar():
                raise Swallowed(error.command, error.relation, len(ids) - left, len(ids)) from None

    def postpone(self, session: Session, batch: Batch, postponements: Mapping[int, Postponement]) -> None:
        """Make events due later, by the database's clock. If a postponement is ``charged``, also count a failed try."""
        given = postponements.values()
        values = {
            "ids": list(postponements),
            "delays": [postponement.delay for postponement in given],
            "charges": [int(postponement.charged) for postponement in given],
            "errors": [postponement.error for postponement in given],
            **window_of(batch),
        }
        write(session, self._postpone, values, len(postponements))

    def bury(self, session: Session, batch: Batch, letters: Mapping[int, tuple[Reason, str]]) -> None:
        """Write the dead letters of events.

        If an event already has a dead letter, reopen that dead letter. In the same transaction, the
        caller should delete the events from the outbox.
        """
        values = {
            "ids": list(letters),
            "payment_ids": [batch[key].payment_id for key in letters],
            "reasons": [reason.value for reason, _ in letters.values()],
            "details": [detail for _, detail in letters.values()],
            **window_of(batch),
        }
        write(session, self._bury, values, len(letters))

    def read_letters_back(self, session: Session, event_ids: Sequence[str], reasons: Collection[Reason]) -> None:
        """Check that each event has an open dead letter with one of these reasons.

        Raises Swallowed if a dead letter is missing or was changed. The cause is then a trigger,
        because ``bury`` has written the dead letters.
        """
        values = {"event_ids": event_ids, "reasons": [reason.value for reason in reasons]}
        found = self._letters.execute(session, values).scalar_one()
        if found < len(event_ids):
            raise Swallowed("INSERT", str(self._tables.dead_letters), found, len(event_ids))

    def traceparents(self, session: Session, batch: Batch, ids: Collection[int]) -> dict[int, str]:
        """Read the traceparents from the headers of these events. The worker reads no other header."""
        rows = self._traceparents.execute(session, {"ids": list(ids), **window_of(batch)})
        return {row.id: row.traceparent for row in rows if _TRACEPARENT.fullmatch(row.traceparent)}

    def close_letters(self, session: Session, event_ids: Sequence[Key]) -> None:
        """Close the open dead letters of events that are settled now."""
        self._close_letters.execute(session, {"event_ids": event_ids})

    def explain(self, session: Session, command: str, error: Exception) -> str:
        """Return a text that explains why the database refused to change a row of the outbox.

        The text names the command, the table and the likely cause, but no value of the row.
        """
        outbox, is_swallowed = self._tables.outbox, isinstance(error, Swallowed)
        told = describe(error) if is_swallowed else f"{command} on {outbox}: {describe(error)}"
        if violated(error)[2]:
            return told  # this text already names the constraint
        cause = likely_cause(session, outbox, command, swallowed=is_swallowed)
        return f"{told}; the likely cause is {cause}" if cause else told

    def backlog(self, session: Session, *, set_aside: Collection[int] = ()) -> Backlog:
        """Count due and later events, and measure how late the oldest event is.

        Events in ``set_aside`` do not count. Each of the two counts stops at ``BACKLOG_BOUND``.
        """
        due, waiting, oldest = tuple(self._backlog.execute(session, {"set_aside": list(set_aside)}).one())
        return Backlog(due, waiting, oldest or 0.0)

    def never_claimed(self, session: Session, nullable: Collection[str]) -> int:
        """Count the events that no worker can ever claim.

        Such an event has no due time, no id or no type, or it is due at ``infinity``. ``nullable``
        contains the keys of the columns that can be NULL. The count stops at ``BACKLOG_BOUND``.
        """
        outbox = self._tables.outbox
        lacks: list[ColumnElement[bool]] = [
            outbox.c[key].is_(None) for key in ("due_at", "event_id", "event_type") if key in nullable
        ]
        never = _never_claimed_statement(outbox, lacks, self._ours(), self.BACKLOG_BOUND)
        found: int = session.scalars(never).one()
        return found


def _backlog_statement(outbox: Table, ours: list[ColumnElement[bool]], bound: int) -> Select[Any]:
    """what: counts due and later events up to a bound; returns the lateness of the oldest due event
    lock: none · index: (due_at, id)
    """
    now = func.statement_timestamp()
    ours = [*complete(outbox), *ours]
    due = select(outbox.c.due_at).where(outbox.c.due_at <= now, *ours).order_by(outbox.c.due_at).limit(bound).subquery()
    later = select(outbox.c.id).where(outbox.c.due_at > now, is_claimable(outbox), *ours).limit(bound).subquery()
    waiting = select(func.count()).select_from(later).scalar_subquery()
    return select(func.count(), waiting, seconds_since(func.min(due.c.due_at))).select_from(due)


def _never_claimed_statement(
    outbox: Table, lacks: list[ColumnElement[bool]], ours: list[ColumnElement[bool]], bound: int
) -> Select[Any]:
    """what: counts events that can never be claimed, up to a bound
    lock: none · index: (due_at, id) and event_id; if the type can be NULL, the outbox is read once
    """
    found = select(outbox.c.id).where(or_(outbox.c.due_at >= NEVER, *lacks), *ours).limit(bound).subquery()
    return select(func.count()).select_from(found)


def _remove_statement(outbox: Table) -> Delete:
    """what: deletes settled and dead events · lock: held since the claim · index: primary key or (due_at, id)"""
    return delete(outbox).where(outbox.c.id == func.any(_IDS), within(outbox.c.due_at))


def _left_statement(outbox: Table) -> Select[Any]:
    """what: counts the events that a DELETE has not removed · lock: none · index: primary key or (due_at, id)"""
    return select(func.count()).select_from(outbox).where(outbox.c.id == func.any(_IDS), within(outbox.c.due_at))


def _postpone_statement(outbox: Table) -> Update:
    """what: makes events due later, counts charged tries · lock: held since the claim · index: primary key"""
    given = _arrays(delay=Interval(), charge=BigInteger(), error=Text())
    return (
        update(outbox)
        .where(outbox.c.id == given.c.id, outbox.c.id == func.any(_IDS), within(outbox.c.due_at))
        .values(
            due_at=func.clock_timestamp() + type_coerce(given.c.delay, Interval()),
            attempts=counted(outbox.c.attempts) + given.c.charge,
            last_error=func.coalesce(given.c.error, outbox.c.last_error),
        )
    )


def _bury_statement(tables: Tables) -> postgresql.Insert:
    """what: writes dead letters of claimed events; an existing letter is overwritten and reopened, but keeps its note
    lock: held since the claim · index: primary keys
    """
    letters = tables.dead_letters
    given = _arrays(payment_id=letters.c.payment_id.type, reason=Text(), detail=Text())
    outbox = event_of(given, tables.outbox)
    copied = {key: outbox.c[key] for key in ("event_id", "event_type", "headers")}
    written = copied | {
        "created_at": func.coalesce(outbox.c.created_at, func.clock_timestamp()),
        "payload": payload.to_dead_letter(outbox),
        "payment_id": given.c.payment_id,
        "attempts": counted(outbox.c.attempts) + 1,
        "reason": given.c.reason,
        "detail": given.c.detail,
        "dead_at": func.clock_timestamp(),
        "state": literal(DeadLetterState.OPEN.value),
    }
    source = select(*written.values()).select_from(given).join(outbox, true())
    statement = postgresql.insert(letters).from_select(list(written), source, include_defaults=False)
    reopened = {letters.c[key]: statement.excluded[key] for key in written if key != "event_id"}
    cleared = {letters.c.resolved_at: None}
    return statement.on_conflict_do_update(index_elements=[letters.c.event_id], set_=reopened | cleared)


def _open_letters_statement(tables: Tables) -> Select[Any]:
    """what: counts open dead letters of events with given reasons · lock: none · index: primary key

    The statement compares the state outside the subquery. Otherwise the planner could read the
    whole index of open dead letters.
    """
    letters = tables.dead_letters
    is_of = letters.c.event_id == func.any(bindparam("event_ids", type_=Keys(tables.event_key)))
    written = select(letters.c.state, letters.c.reason).where(is_of).offset(literal_column("0")).subquery("written")
    has_reason = written.c.reason == func.any(bindparam("reasons", type_=ARRAY(Text)))
    is_open = written.c.state == DeadLetterState.OPEN.value
    return select(func.count()).select_from(written).where(is_open, has_reason)


def _traceparents_statement(outbox: Table) -> Select[Any]:
    """what: reads traceparents of claimed events · lock: none (rows are already locked) · index: primary key"""
    traceparent = func.left(outbox.c.headers["traceparent"].astext, _TRACEPARENT_LENGTH + 1)
    named = select(outbox.c.id, traceparent.label("traceparent")).where(traceparent.is_not(None))
    return named.where(outbox.c.id == func.any(_IDS), within(outbox.c.due_at))


def _close_letters_statement(tables: Tables) -> Update:
    """what: closes open dead letters of settled events · lock: FOR UPDATE, ordered by event id · index: primary key"""
    letters, event_ids = tables.dead_letters, bindparam("event_ids", type_=Keys(tables.event_key))
    found = (
        select(letters.c.event_id, letters.c.state)
        .where(letters.c.event_id == func.any(event_ids))
        .order_by(letters.c.event_id)
        .with_for_update()
        .cte("found")
        .prefix_with("MATERIALIZED")
    )
    is_open = found.c.state == DeadLetterState.OPEN.value
    settled = {"state": DeadLetterState.SETTLED.value, "resolved_at": func.clock_timestamp()}
    return update(letters).where(letters.c.event_id == found.c.event_id, is_open).values(settled)


def _arrays(**columns: TypeEngine[Any]) -> FromClause:
    """Build a relation (id, …) from one array parameter per column.

    The name of a parameter is the name of its column and an s: ``delays`` for the column ``delay``.
    """
    parameters = [bindparam(f"{name}s", type_=ARRAY(kind)) for name, kind in columns.items()]
    return func.unnest(_IDS, *parameters).table_valued("id", *columns).render_derived(name="given")
