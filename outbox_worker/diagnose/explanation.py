"""Explains why a payment has a purchase, or why it has none.

An explanation contains the records of the payment, the rules that applied, and a prediction for
each event. A prediction uses the worker's statement that reads the facts, and the worker's function
``decide``. All reads use one READ ONLY snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any, assert_never

from sqlalchemy import CTE, ColumnElement, FromClause, Table, case, column, func, literal, or_, select
from sqlalchemy.orm import Session

from outbox_worker.database.arrays import ids_as
from outbox_worker.decision import RULES_BEHIND, RetryPolicy, decide
from outbox_worker.diagnose.records import MarkRow, PaymentRow, PurchaseRow, Records, WaitingEvent, look_up
from outbox_worker.durations import count_of
from outbox_worker.errors import Refused
from outbox_worker.keys import Key
from outbox_worker.model import (
    PURCHASE_BACKFILLED,
    PURCHASE_CONFIRMED,
    Batch,
    DeadLetterState,
    Facts,
    PaymentStatus,
    Repeated,
    Verdict,
)
from outbox_worker.money import amount_of
from outbox_worker.schema.tables import Tables
from outbox_worker.settle.handlers import HANDLED_TYPES
from outbox_worker.store import payload
from outbox_worker.store.dead_letters import DECIDABLE, DeadLetter, Decision, history
from outbox_worker.store.payment_classes import (
    CANNOT_BE_JUDGED,
    READ_TO_CLASSIFY,
    REFUNDED_BUT_ACTIVE,
    PaymentClass,
    class_among,
    why_not_judged,
)
from outbox_worker.store.purchases import PurchaseRepository, backfill_event_id
from outbox_worker.store.queries import is_succeeded, type_of

SHOWN = 100
"""An error message shows at most this many characters of an unknown id."""
_NULL = "NULL"
_GIVES = "already gives the student this course"


class Occasion(StrEnum):
    """The occasion on which a worker or a backfill decides the outcome of an event."""

    DUE = "due"
    POSTPONED = "postponed"
    REQUEUED = "requeued"
    DELIVERED = "delivered_again"
    BACKFILL = "backfill"
    NEVER = "never"
    """No worker ever claims the event. Workers do not claim its type, or it has no due time, id or
    type."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The outcome of an event if a worker or a backfill handles it now."""

    event_id: Key
    event_type: str
    occasion: Occasion
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """Something that happened to a payment, event or purchase.

    ``at`` is the time. ``subject`` is the id of the payment, event or purchase.
    """

    at: datetime | None
    what: str
    subject: Any
    detail: str = ""
    rules: tuple[int, ...] = ()
    """The numbers of the rules (docs/explanation/state-machine.md) that can be the reason for this entry."""


@dataclass(frozen=True, slots=True)
class PaymentStory:
    """The history of one payment, or the history of events that name no payment."""

    payment_id: Key | None
    payment: PaymentRow | None
    """The row of the payment. None means that the row does not exist, or that the role cannot see
    it."""
    kind: str | None
    """The class of the payment, or ``refunded_but_active``. None means that the payment has no row,
    did not succeed, or was refunded."""
    not_judged: str | None
    """If the payment cannot be judged (no class fits), this text names the reason. Otherwise
    None."""
    timeline: Sequence[TimelineEntry]
    traces: Sequence[WaitingEvent | DeadLetter | MarkRow]
    predictions: Sequence[Prediction]


@dataclass(frozen=True, slots=True)
class Explanation:
    asked: str
    kinds: Sequence[str]
    """The kinds of things that have the id: ``event``, ``payment``, ``purchase``, ``student``."""
    stories: Sequence[PaymentStory]
    gifts: Sequence[PurchaseRow]
    """Gifts (purchases without a payment) that belong to the student or have the given id."""
    has_more: bool
    """Whether the student has more payments than those in ``stories``."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An event whose outcome the command ``why`` predicts."""

    occasion: Occasion
    payment_id: Key | None = None
    """The payment of an event that has no payload. Either only the mark of the event is left, or a
    backfill creates the event."""
    first: Key | None = None
    """The payment of the pair (student and course) for which a backfill makes the purchase. Only
    events of a backfill have this value."""

    @property
    def is_behind(self) -> bool:
        """Whether a backfill creates the purchase for another payment of the same pair."""
        return self.first != self.payment_id and self.first is not None


def explain(
    session: Session, tables: Tables, policy: RetryPolicy, claimed_types: Sequence[str] | None, asked: str
) -> Explanation:
    """Explain the event, payment, purchase or student with this id. Raises Refused if nothing has this id.

    ``claimed_types``: the event types that workers claim (None: all types).
    """
    found = look_up(session, tables, asked)
    if not found.kinds:
        raise Refused(f"No event, payment, purchase or student has the id {asked[:SHOWN]}.")
    classes, unfit = _classes(session, tables, [each.id for each in found.records.payments])
    owed = [payment_id for payment_id, kind in classes.items() if kind == PaymentClass.UNEXPLAINED]
    candidates = _candidates(tables, found.records, _firsts(session, tables, owed), claimed_types)
    predictions = _judge(session, tables, policy, candidates) if candidates else []
    named: list[Key | None] = list(found.payment_ids)
    if found.records.nameless:
        named.append(None)
    told = {key: _story(tables, found.records, key, classes, predictions) for key in named}
    stories = [replace(story, not_judged=unfit.get(key)) for key, story in told.items()]
    return Explanation(asked, found.kinds, stories, found.gifts, found.has_more)


def _classes(
    session: Session, tables: Tables, ids: Sequence[Key]
) -> tuple[Mapping[Key, str], Mapping[Key | None, str]]:
    """what: the classes of the succeeded payments, and why some payments cannot be judged
    lock: none · index: primary keys; see ``class_among``
    """
    payments = tables.payments
    columns = [payments.c[key] for key in READ_TO_CLASSIFY]
    few = select(*columns).where(payments.c.id.in_(ids), is_succeeded(payments)).cte("few")
    rows = session.execute(select(few.c.id, class_among(few, tables), why_not_judged(few))).all()
    return {key: kind for key, kind, _ in rows}, {key: why for key, kind, why in rows if kind == CANNOT_BE_JUDGED}


def _firsts(session: Session, tables: Tables, owed: Sequence[Key]) -> dict[Key, Key]:
    """Map each payment in ``owed`` to the oldest unexplained payment of the same pair.

    A backfill makes the purchase for this oldest payment.
    """
    batch = Batch(ids=range(len(owed)), payment_ids=[str(each) for each in owed])
    standing = PurchaseRepository(tables).standing_payments(session, batch) if owed else {}
    unexplained = {
        owed[key]: [each.payment_id for each in found if each.kind == PaymentClass.UNEXPLAINED]
        for key, found in standing.items()
    }
    return {payment_id: tables.payment_key.key(first) for payment_id, (first, *_) in unexplained.items()}


def _candidates(
    tables: Tables, records: Records, owed: Mapping[Key, Key], claimed_types: Sequence[str] | None
) -> dict[Key, _Candidate]:
    """Return all events that have a record.

    For each payment that is owed a purchase, also return the substitute event of a backfill.
    """
    events = [mark for mark in records.marks if mark.event_type != PURCHASE_BACKFILLED]
    return {
        **{key: _Candidate(Occasion.DELIVERED, mark.payment_id) for mark in events if (key := mark.event_id)},
        **{letter.event_id: _Candidate(_occasion_of_letter(letter)) for letter in records.letters},
        **{
            key: _Candidate(_occasion_of_event(each, claimed_types))
            for each in records.waiting
            if (key := each.event_id)
        },
        **{
            backfill_event_id(key, tables.event_key): _Candidate(Occasion.BACKFILL, key, first)
            for key, first in owed.items()
        },
    }


def _occasion_of_letter(letter: DeadLetter) -> Occasion:
    return Occasion.REQUEUED if letter.state in DECIDABLE[Decision.REQUEUE] else Occasion.DELIVERED


def _occasion_of_event(event: WaitingEvent, claimed_types: Sequence[str] | None) -> Occasion:
    if not event.is_claimable or (claimed_types is not None and event.event_type not in claimed_types):
        return Occasion.NEVER
    return Occasion.DUE if event.is_due else Occasion.POSTPONED


def _judge(
    session: Session, tables: Tables, policy: RetryPolicy, candidates: Mapping[Key, _Candidate]
) -> list[Prediction]:
    """Read the facts with the worker's statement, but without locks.

    Return the outcomes that ``decide`` predicts.
    """
    known = _known(tables, list(candidates))
    read_of: list[ColumnElement[Any]] = [
        known.c[key] for key in ("id", "event_id", "event_type", "has_payload", "attempts", "crashes")
    ]
    rows = session.execute(select(*read_of, payload.claim_columns(tables, known)).order_by(known.c.id)).all()
    read = [
        payload.read_claim_columns(tables, known, row[-1])
        if row.has_payload
        else _only(candidates[row.event_id].payment_id)
        for row in rows
    ]
    batch = Batch(
        ids=[row.id for row in rows],
        event_ids=[str(row.event_id) for row in rows],
        event_types=[row.event_type for row in rows],
        payment_ids=[payment_id for payment_id, _ in read],
        attempts=[row.attempts for row in rows],
        lateness=[0.0] * len(rows),
        repeated=[repeated for _, repeated in read],
    )
    seen = PurchaseRepository(tables, partial(_row_of, known)).look(session, batch, policy)
    return [_predict(row, candidates[row.event_id], seen[row.id].facts) for row in rows]


def _predict(row: Any, candidate: _Candidate, facts: Facts) -> Prediction:
    is_handled = row.event_type in HANDLED_TYPES
    pair_held = facts.pair_held or candidate.is_behind
    verdict = decide(replace(facts, crashes=row.crashes, handled=is_handled, pair_held=pair_held))
    if candidate.is_behind:
        verdict = replace(verdict, detail=f"the older payment {candidate.first} for this course gets the purchase")
    event_type = PURCHASE_BACKFILLED if candidate.occasion is Occasion.BACKFILL else row.event_type
    return Prediction(row.event_id, event_type, candidate.occasion, verdict)


def _only(payment_id: Key | None) -> tuple[str | None, Repeated]:
    return None if payment_id is None else str(payment_id), Repeated()


def _known(tables: Tables, events: Sequence[Key]) -> CTE:
    """what: each event, from the first place that has it: outbox, dead letter (as requeue writes
    it), mark
    lock: none · index: event ids
    """
    outbox, letters, marks = tables.outbox, tables.dead_letters, tables.processed_events
    event_id = column("event_id", marks.c.event_id.type)
    ids = func.unnest(ids_as(event_id.type, events))
    given = ids.table_valued(event_id, with_ordinality="position").render_derived(name="given")
    is_waiting = outbox.c.event_id.is_not(None)
    marked = func.nullif(marks.c.event_type, PURCHASE_BACKFILLED)
    types = [type_of(outbox), type_of(letters), marked, literal(PURCHASE_CONFIRMED)]
    requeued = payload.from_dead_letter(letters.c.payload, outbox)
    written = case((is_waiting, outbox.c.payload), else_=requeued)
    return (
        select(
            given.c.position.label("id"),
            given.c.event_id,
            func.coalesce(*types).label("event_type"),
            written.label("payload"),
            or_(is_waiting, letters.c.event_id.is_not(None)).label("has_payload"),
            outbox.c.due_at,
            func.coalesce(outbox.c.attempts, 0).label("attempts"),
            func.coalesce(outbox.c.crashes, 0).label("crashes"),
        )
        .select_from(given)
        .outerjoin(outbox, outbox.c.event_id == given.c.event_id)
        .outerjoin(letters, letters.c.event_id == given.c.event_id)
        .outerjoin(marks, marks.c.event_id == given.c.event_id)
        .cte("known")
    )


def _row_of(known: CTE, keys: FromClause, _: Table) -> FromClause:
    """Return the event's row in the relation ``known``.

    This row replaces the event's row in the outbox.
    """
    return select(known).where(known.c.id == keys.c.id).lateral("event")


def _story(
    tables: Tables,
    records: Records,
    payment_id: Key | None,
    classes: Mapping[Key, str],
    predictions: Sequence[Prediction],
) -> PaymentStory:
    """Return the story of one payment. If ``payment_id`` is None, return the story of events that name no payment."""
    payment = next((each for each in records.payments if each.id == payment_id), None)
    of_payment = [each for each in records.traces if each.payment_id == payment_id]
    named = records.nameless if payment_id is None else of_payment
    events = {each.event_id for each in named if each.event_id is not None}
    traces = [each for each in records.traces if each in named or each.event_id in events]
    if payment_id is not None:
        events.add(backfill_event_id(payment_id, tables.event_key))
    purchases = _purchases(records, payment_id, payment)
    timeline = [
        *_of_payment(payment),
        *(entry for each in traces for entry in _of_trace(each)),
        *(entry for each in purchases for entry in _of_purchase(each, payment_id)),
    ]
    return PaymentStory(
        payment_id,
        payment,
        _kind(payment, classes, purchases),
        None,
        sorted(dict.fromkeys(timeline), key=lambda entry: entry.at or datetime.min.replace(tzinfo=UTC)),
        traces,
        [each for each in predictions if each.event_id in events],
    )


def _kind(payment: PaymentRow | None, classes: Mapping[Key, str], purchases: Sequence[PurchaseRow]) -> str | None:
    if payment is None:
        return None
    is_active = any(each.is_active and each.payment_id == payment.id for each in purchases)
    if payment.status == PaymentStatus.REFUNDED and is_active:
        return REFUNDED_BUT_ACTIVE
    return classes.get(payment.id)


def _purchases(records: Records, payment_id: Key | None, payment: PaymentRow | None) -> list[PurchaseRow]:
    """Return the payment's purchases, and the active purchase of the same student and course."""
    pair = payment and payment.pair
    return [
        each
        for each in records.purchases
        if payment_id is not None and (each.payment_id == payment_id or (each.is_active and each.pair == pair))
    ]


def _of_payment(payment: PaymentRow | None) -> Iterator[TimelineEntry]:
    if payment is not None:
        yield TimelineEntry(payment.created_at, "paid", payment.id, amount_of(payment.amount, payment.currency))


def _of_trace(trace: WaitingEvent | DeadLetter | MarkRow) -> Iterator[TimelineEntry]:
    match trace:
        case WaitingEvent():
            return _of_event(trace)
        case DeadLetter():
            return _of_letter(trace)
        case MarkRow():
            return _of_mark(trace)
        case _:
            assert_never(trace)


def _of_event(event: WaitingEvent) -> Iterator[TimelineEntry]:
    yield TimelineEntry(event.created_at, "event written", event.event_id, event.event_type or _NULL)
    if event.attempts:
        tries = f"{count_of(event.attempts, 'failed attempt')}, the last: {event.last_error}"
        yield TimelineEntry(event.due_at, "due again", event.event_id, tries)


def _of_letter(letter: DeadLetter) -> Iterator[TimelineEntry]:
    key = letter.event_id
    yield TimelineEntry(letter.created_at, "event written", key, letter.event_type)
    died = f"{letter.reason}: {letter.detail} ({count_of(letter.attempts, 'attempt')})"
    yield TimelineEntry(letter.dead_at, "event buried", key, died, RULES_BEHIND.get(letter.reason, ()))
    for decided in history(letter.note):
        yield TimelineEntry(decided.at, f"dead letter {decided.state}", key, f"by {decided.actor}: {decided.why}")
    if letter.state == DeadLetterState.SETTLED:
        yield TimelineEntry(letter.resolved_at, "dead letter settled", key, "the event succeeded after all")


def _of_mark(mark: MarkRow) -> Iterator[TimelineEntry]:
    key, outcome = mark.event_id, mark.outcome or _NULL
    rules = RULES_BEHIND.get(outcome, ())
    if mark.event_type == PURCHASE_BACKFILLED:
        yield TimelineEntry(mark.processed_at, "backfilled", key, outcome, rules)
    elif mark.recovered_at is None:
        yield TimelineEntry(mark.processed_at, "event settled" if rules else "event marked", key, outcome, rules)
    else:
        yield TimelineEntry(mark.processed_at, "event marked", key, "but the purchase was missing later")
        yield TimelineEntry(mark.recovered_at, "event settled", key, outcome, rules)


def _of_purchase(purchase: PurchaseRow, payment_id: Key | None) -> Iterator[TimelineEntry]:
    whose = "" if purchase.payment_id == payment_id else _owner(purchase)
    yield TimelineEntry(purchase.created_at, "purchase made", purchase.id, whose)
    if not purchase.is_active:
        yield TimelineEntry(purchase.deactivated_at, "purchase taken back", purchase.id, whose)


def _owner(purchase: PurchaseRow) -> str:
    if purchase.payment_id is None:
        return f"it has no payment (a gift, or older than payments) and {_GIVES}"
    return f"of payment {purchase.payment_id}: it {_GIVES}"
