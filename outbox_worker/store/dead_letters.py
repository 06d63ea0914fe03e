"""Lists dead letters, and requeues or discards them when an operator decides this.

A dead letter is an event that the worker has given up until a person decides. The module ``outbox``
writes dead letters. If the event of a dead letter is settled later, ``outbox`` also closes the dead
letter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Interval,
    Select,
    Text,
    Update,
    and_,
    cast,
    exists,
    func,
    literal,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.arrays import ids_as
from outbox_worker.database.engine import savepoint
from outbox_worker.database.expressions import readable
from outbox_worker.database.failures import Failure, classify, describe
from outbox_worker.errors import NothingWritten, Refused, WrongUsage
from outbox_worker.keys import Key, KeyKind
from outbox_worker.model import PURCHASE_CONFIRMED, DeadLetterState, halves
from outbox_worker.schema.tables import Tables
from outbox_worker.store import payload
from outbox_worker.store.payment_classes import has_unfit_amount, waivable
from outbox_worker.store.queries import currency_code, has_type, is_claimable, is_succeeded

CONTENT_MAX = 10_000
"""The largest number of characters of a payload that is shown. Headers have the same limit."""
_NAMED_AT_MOST = 3
_NEVER = datetime.max.replace(tzinfo=UTC)
"""A cursor contains this time if Python cannot represent the time of the dead letter."""
_DECIDED = re.compile(r"(\w+) by (.*?), (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.]\d{3}Z): (.*)")
"""The pattern of a line in a dead letter's note: state, actor, time, reason.

The function ``_resolve`` adds these lines.
"""


class Decision(StrEnum):
    """A decision that an operator can make about dead letters."""

    REQUEUE = "requeue"
    """Put the event back into the outbox as a new event."""
    DISCARD = "discard"
    """Close the dead letter and create no purchase. The dead letter keeps the operator's reason."""


_RESULTS = {Decision.REQUEUE: DeadLetterState.REQUEUED, Decision.DISCARD: DeadLetterState.DISCARDED}
DECIDABLE = {
    Decision.REQUEUE: (DeadLetterState.OPEN, DeadLetterState.DISCARDED),
    Decision.DISCARD: (DeadLetterState.OPEN,),
}
"""The states of a dead letter in which each decision is allowed."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    event_id: Key
    event_type: str
    payment_id: Key | None
    attempts: int
    reason: str
    detail: str
    created_at: datetime | None
    """``created_at`` and ``dead_at`` are None if Python cannot represent the time, for example
    ``-infinity``.
    """
    dead_at: datetime | None
    state: str
    resolved_at: datetime | None
    actor: str | None
    note: str | None
    """The history of the dead letter: one line per decision, with state, actor, time and reason."""


class Content(NamedTuple):
    """The payload and headers of a dead letter's event, as text.

    Each text is cut to ``CONTENT_MAX`` characters.
    """

    payload: str
    headers: str | None


@dataclass(frozen=True, slots=True)
class Selection:
    """Selects the dead letters of the events ``event_ids``.

    If ``event_ids`` is empty, this selects all dead letters that match the other fields.
    """

    event_ids: Sequence[Key] = ()
    """The ids of events. Before ``parsed`` is called, these are the texts that a person typed."""
    state: DeadLetterState = DeadLetterState.OPEN
    reason: str | None = None
    event_type: str | None = None
    older_than: timedelta | None = None

    def parsed(self, tables: Tables) -> Selection:
        """Return this selection with parsed event ids. Raises WrongUsage if a text cannot be the id of an event."""
        return replace(self, event_ids=[parse_event_id(tables, str(each)) for each in self.event_ids])

    def conditions(self, letters: FromClause) -> list[ColumnElement[bool]]:
        if self.event_ids:
            return [_among(letters, self.event_ids)]
        found: list[ColumnElement[bool]] = [letters.c.state == self.state.value]
        if self.reason is not None:
            found.append(letters.c.reason == self.reason)
        if self.event_type is not None:
            found.append(letters.c.event_type == self.event_type)
        if self.older_than is not None:
            found.append(letters.c.dead_at <= func.statement_timestamp() - cast(self.older_than, Interval))
        return found


@dataclass(frozen=True, slots=True)
class Preview:
    """The dead letters and the money that a decision would affect."""

    count: int
    reasons: Mapping[str, int]
    money: Mapping[str, Decimal]
    """The sum of the dead letters' payments in each currency.

    A payment with several dead letters is counted once.
    """
    waived: Mapping[str, Decimal]
    """The part of ``money`` whose payments get no purchase if the dead letters are discarded.

    These payments have succeeded, are not refunded and have no purchase. Their dead letters meet
    the condition ``waivable``.
    """
    token: str
    """A digest of the dead letters and their payments.

    The token changes if any of these rows changes.
    """


class Decided(NamedTuple):
    """A decision in the history of a dead letter."""

    at: datetime
    state: str
    actor: str
    why: str


class RefusedLetter(NamedTuple):
    """A dead letter that could not be requeued or discarded, and the reason."""

    event_id: Key
    reason: str


class DecidedLetters(NamedTuple):
    """The result of one decision about several dead letters."""

    done: int
    refused: Sequence[RefusedLetter]


_TAKEN = "the outbox has another event with this id: its type or payment differs, or no worker can claim it"
_NOT_INSERTED = "the outbox did not take the event, and raised no error; a trigger or rule of the table may prevent it"
_NOT_CLOSED = "the letter was not updated, and the table raised no error; a trigger, rule or policy may prevent it"


class LetterCursor(NamedTuple):
    """The position of the last dead letter on a page. The next page begins after this position."""

    dead_at: datetime
    event_id: Key

    def __str__(self) -> str:
        return f"{self.dead_at.isoformat()}/{self.event_id}"

    @classmethod
    def parse(cls, text: str, kind: KeyKind) -> LetterCursor:
        """Parse the text that ``str(cursor)`` returns. Raises WrongUsage for any other text."""
        dead_at, _, typed = text.partition("/")
        try:
            if (event_id := kind.parse(typed)) is not None:
                return cls(datetime.fromisoformat(dead_at), event_id)
        except ValueError:
            pass
        raise WrongUsage("--after: give the value that was printed below the previous page.")


@dataclass(frozen=True, slots=True)
class Page:
    letters: Sequence[DeadLetter]
    end: LetterCursor | None
    """The cursor for the next page; None if this is the last page."""


def parse_event_id(tables: Tables, typed: str) -> Key:
    """Parse the id of an event that a person typed.

    Raises WrongUsage if the text cannot be the id of an event.
    """
    found = tables.event_key.parse(typed)
    if found is None:
        raise WrongUsage(f"EVENT_ID: '{typed}' cannot be the id of an event, because these ids are {tables.event_key}.")
    return found


def history(note: str | None) -> list[Decided]:
    """Read the decisions from the note of a dead letter, oldest first. Skip all other lines."""
    found = (_DECIDED.fullmatch(line) for line in (note or "").splitlines())
    return [Decided(datetime.fromisoformat(each[3]), each[1], each[2], each[4]) for each in found if each]


def count_open(session: Session, tables: Tables) -> int:
    """Count the open dead letters."""
    letters = tables.dead_letters
    counted = select(func.count()).select_from(letters).where(letters.c.state == DeadLetterState.OPEN.value)
    return session.scalars(counted).one()


def open_confirmations(session: Session, tables: Tables, payment_ids: Collection[str]) -> Sequence[Key]:
    """Return the ids of events that confirm one of these payments and have an open dead letter."""
    letters = tables.dead_letters
    of_them = letters.c.payment_id == func.any(ids_as(letters.c.payment_id.type, payment_ids))
    is_open = letters.c.state == DeadLetterState.OPEN.value
    found = select(letters.c.event_id).where(of_them, is_open, has_type(letters, [PURCHASE_CONFIRMED]))
    return session.scalars(found).all()


def list_letters(
    session: Session,
    tables: Tables,
    selection: Selection,
    *,
    after: LetterCursor | None = None,
    limit: int = 100,
) -> Page:
    """Read one page of the selected dead letters, oldest first.

    ``after`` is the end of the previous page.

    what: one page of dead letters · lock: none
    index: that of open dead letters, on (dead_at, event_id)
    """
    letters = tables.dead_letters
    conditions = selection.conditions(letters)
    if after is not None:
        conditions.append(tuple_(letters.c.dead_at, letters.c.event_id) > after)
    found = read_letters(session, tables, *conditions, limit=limit + 1)
    page = found[:limit]
    last = page[-1] if len(found) > limit else None
    return Page(page, LetterCursor(last.dead_at or _NEVER, last.event_id) if last else None)


def read_letters(
    session: Session, tables: Tables, *conditions: ColumnElement[bool], limit: int | None = None
) -> list[DeadLetter]:
    """Read the dead letters that meet all conditions, oldest first."""
    letters = tables.dead_letters
    times = ("created_at", "dead_at", "resolved_at")
    keys = DeadLetter.__dataclass_fields__
    columns = [readable(letters.c[key]) if key in times else letters.c[key] for key in keys]
    rows = session.execute(
        select(*columns).where(*conditions).order_by(letters.c.dead_at, letters.c.event_id).limit(limit)
    )
    return [DeadLetter(*row) for row in rows]


def read_letter(session: Session, tables: Tables, event_id: Key) -> tuple[DeadLetter, Content]:
    """Read one dead letter, with the payload and the headers of its event.

    Raises Refused if the event has no dead letter.
    """
    letters = tables.dead_letters
    found = read_letters(session, tables, letters.c.event_id == event_id)
    if not found:
        raise Refused(f"There is no dead letter for the event {event_id}.")
    texts = (payload.from_dead_letter(letters.c.payload, tables.outbox), letters.c.headers)
    content = select(*(func.left(cast(each, Text), CONTENT_MAX) for each in texts)).where(
        letters.c.event_id == event_id
    )
    return found[0], Content(*session.execute(content).one())


def preview(session: Session, tables: Tables, selection: Selection) -> Preview:
    """Count the selected dead letters and sum their payments.

    This function runs several queries. Call ``preview`` in ``Database.snapshot``. All queries then
    see the same state of the database.
    """
    letters, payments = tables.dead_letters, tables.payments
    chosen = [letters.c[key] for key in ("event_id", "payment_id", "reason")]
    found = select(*chosen, waivable(letters).label("waivable")).where(*selection.conditions(letters)).cte("found")
    reasons = session.execute(
        select(found.c.reason, func.count()).group_by(found.c.reason).order_by(func.count().desc())
    )
    by_reason = {reason: count for reason, count in reasons}  # noqa: C416 - unpacks rows
    named = select(found.c.payment_id).where(found.c.payment_id.is_not(None))
    own = tables.purchases
    is_given = exists().where(own.c.payment_id == payments.c.id)
    is_owed = is_succeeded(payments), ~is_given
    money = _money(session, payments, payments.c.id.in_(named))
    waived = _money(session, payments, payments.c.id.in_(named.where(found.c.waivable)), *is_owed)
    token = session.scalars(_token(tables, selection)).one()
    return Preview(sum(by_reason.values()), by_reason, money, waived, token)


def _money(session: Session, payments: FromClause, *which: ColumnElement[bool]) -> dict[str, Decimal]:
    currency = func.coalesce(currency_code(payments.c.currency), "NULL")
    summed = func.coalesce(func.sum(payments.c.amount), 0)
    is_fit = has_unfit_amount(payments).is_not(true())
    rows = session.execute(select(currency, summed).where(*which, is_fit).group_by(currency))
    return {name: amount for name, amount in rows}  # noqa: C416 - unpacks rows


def decide_letters(
    session: Session, tables: Tables, selection: Selection, decision: Decision, *, token: str, actor: str, why: str
) -> DecidedLetters:
    """Requeue or discard the dead letters of a preview, and add a line to each note.

    If the database refuses the decision about one dead letter, this dead letter does not change.
    All other dead letters are still decided. Raises Refused if a dead letter or its payment has
    changed since the preview.
    """
    ids = session.scalars(_lock(tables, selection)).all()
    if session.scalars(_token(tables, selection)).one() != token:
        raise Refused(
            "The dead letters or their payments have changed since the preview. Nothing was done; repeat the command."
        )
    refused = _taken_ids(session, tables, ids) if decision is Decision.REQUEUE else {}
    parts: list[Sequence[Key]] = [[each for each in ids if each not in refused]]
    done = 0
    while parts:
        part = parts.pop()
        try:
            with savepoint(session):
                _carry_out(session, tables, part, decision, actor, why)
            done += len(part)
        except (DBAPIError, NothingWritten) as error:
            if not _is_letters_fault(error):
                raise
            if len(part) == 1:
                refused[part[0]] = str(error) if isinstance(error, NothingWritten) else describe(error)
            else:
                parts += reversed(halves(part))
    return DecidedLetters(done, [RefusedLetter(each, refused[each]) for each in ids if each in refused])


def _is_letters_fault(error: DBAPIError | NothingWritten) -> bool:
    """Return whether a single dead letter can be the cause of the error."""
    return isinstance(error, NothingWritten) or classify(error) in (Failure.EVENT, Failure.GUARD)


def _carry_out(session: Session, tables: Tables, ids: Sequence[Key], decision: Decision, actor: str, why: str) -> None:
    """Write the decision about these dead letters.

    Raises NothingWritten if the database did not write every row.
    """
    if not ids:
        return
    if decision is Decision.REQUEUE:
        session.execute(_requeue(tables, ids))
        if session.scalars(_count_waiting(tables, ids)).one() != len(ids):
            raise NothingWritten(_NOT_INSERTED)
    updated = session.execute(_resolve(tables, ids, decision, actor, why)).rowcount  # type: ignore[attr-defined]
    if updated != len(ids):
        raise NothingWritten(_NOT_CLOSED)


def _taken_ids(session: Session, tables: Tables, ids: Sequence[Key]) -> dict[Key, str]:
    """what: the dead letters whose event id belongs to another event in the outbox, with a reason
    lock: none · index: outbox.event_id
    """
    kept = _events_of(tables, ids)
    taken = select(kept.c.event_id).join(tables.outbox, tables.outbox.c.event_id == kept.c.event_id)
    return dict.fromkeys(session.scalars(taken.where(_is_the_same(kept, tables).is_not(true()))), _TAKEN)


def _count_waiting(tables: Tables, ids: Sequence[Key]) -> Select[Any]:
    """what: counts the dead letters whose event is in the outbox
    lock: none · index: outbox.event_id
    """
    kept = _events_of(tables, ids)
    waiting = select(func.count(kept.c.event_id.distinct()))
    waiting = waiting.join_from(kept, tables.outbox, tables.outbox.c.event_id == kept.c.event_id)
    return waiting.where(_is_the_same(kept, tables))


def _events_of(tables: Tables, ids: Sequence[Key]) -> FromClause:
    """Build a relation with the events of these dead letters, in the form that the outbox uses."""
    letters = tables.dead_letters
    content = payload.from_dead_letter(letters.c.payload, tables.outbox).label("payload")
    return select(letters.c.event_id, letters.c.event_type, content).where(_among(letters, ids)).subquery("kept")


def _is_the_same(kept: FromClause, tables: Tables) -> ColumnElement[bool]:
    """Build the condition that an outbox row is the dead letter's event and can be claimed."""
    outbox = tables.outbox
    named, kept_id = (payload.payment_id_text(tables, each) for each in (outbox, kept))
    return and_(outbox.c.event_type == kept.c.event_type, named.is_not_distinct_from(kept_id), is_claimable(outbox))


def check_decidable(session: Session, tables: Tables, selection: Selection, decision: Decision) -> None:
    """Raise Refused if a dead letter does not exist, or if its state forbids the decision."""
    if not selection.event_ids:
        return
    letters = tables.dead_letters
    rows = session.execute(select(letters.c.event_id, letters.c.state).where(*selection.conditions(letters)))
    states = {event_id: state for event_id, state in rows}  # noqa: C416 - unpacks rows
    if unknown := [str(each) for each in selection.event_ids if each not in states]:
        raise Refused(f"There is no dead letter for these events: {_listed(unknown)}.")
    if closed := [f"{key} is {state}" for key, state in states.items() if state not in DECIDABLE[decision]]:
        raise Refused(f"Cannot {decision} these dead letters: {_listed(closed)}.")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _lock(tables: Tables, selection: Selection) -> Select[Any]:
    """what: ids of the selected dead letters · lock: FOR UPDATE, ordered by event id
    index: that of open dead letters
    """
    letters = tables.dead_letters
    chosen = select(letters.c.event_id).where(*selection.conditions(letters))
    return chosen.order_by(letters.c.event_id).with_for_update()


def _token(tables: Tables, selection: Selection) -> Select[Any]:
    """what: a digest of the dead letters and their payments · lock: none
    index: that of open dead letters, primary keys
    """
    letters, payments = tables.dead_letters, tables.payments
    of_letter = [letters.c[key] for key in ("event_id", "state", "dead_at", "reason", "attempts")]
    of_payment = [payments.c[key] for key in ("student_id", "course_id", "amount", "currency", "status")]
    parts = [func.coalesce(cast(part, Text), "") for part in (*of_letter, *of_payment)]
    line = func.concat_ws("|", *parts)
    digest = func.md5(func.string_agg(line, aggregate_order_by(literal("\n"), letters.c.event_id)))
    read = letters.outerjoin(payments, payments.c.id == letters.c.payment_id)
    return select(func.coalesce(func.left(digest, 12), "")).select_from(read).where(*selection.conditions(letters))


def _requeue(tables: Tables, ids: Sequence[Key]) -> postgresql.Insert:
    """what: copies the events of dead letters into the outbox, due now
    lock: the rows of the dead letters (already locked) · index: primary key of dead_letters

    If the producer has written an event again, the outbox already contains this event. The
    statement then does not change the event in the outbox.
    """
    letters, outbox = tables.dead_letters, tables.outbox
    columns = ["event_id", "event_type", "payload", "headers", "created_at", "due_at"]
    again = select(
        letters.c.event_id,
        letters.c.event_type,
        payload.from_dead_letter(letters.c.payload, outbox),
        letters.c.headers,
        letters.c.created_at,
        func.clock_timestamp(),
    ).where(_among(letters, ids), ~exists().where(outbox.c.event_id == letters.c.event_id))
    return postgresql.insert(outbox).from_select(columns, again, include_defaults=False).on_conflict_do_nothing()


def _resolve(tables: Tables, ids: Sequence[Key], decision: Decision, actor: str, why: str) -> Update:
    """what: closes dead letters, and adds a line to their notes
    lock: already held · index: primary key
    """
    letters, state = tables.dead_letters, _RESULTS[decision].value
    now = func.to_char(func.timezone("UTC", func.clock_timestamp()), "YYYY-MM-DD HH24:MI:SS.MSZ")
    line = literal(f"{state} by {_one_line(actor)}, ") + now + literal(f": {_one_line(why)}")
    return (
        update(letters)
        .where(_among(letters, ids))
        .values(
            state=state,
            resolved_at=func.clock_timestamp(),
            actor=_one_line(actor),
            note=func.concat_ws("\n", letters.c.note, line),
        )
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _among(letters: FromClause, ids: Sequence[Key]) -> ColumnElement[bool]:
    return letters.c.event_id == func.any(ids_as(letters.c.event_id.type, ids))
