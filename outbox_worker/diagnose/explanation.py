"""Why a payment is what it is: what is on record of it, which rule decided, and what would become of it now.

What would happen now is not guessed: the facts are read by the statement that the worker reads them by, and judged by
the same ``decide``, in one READ ONLY snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any, assert_never
from uuid import UUID

from sqlalchemy import CTE, ColumnElement, FromClause, Table, case, func, literal, or_, select
from sqlalchemy.orm import Session

from outbox_worker.database.arrays import ids_as
from outbox_worker.decision import RULES_BEHIND, RetryPolicy, decide
from outbox_worker.diagnose.records import MarkRow, PaymentRow, PurchaseRow, Records, WaitingEvent, look_up
from outbox_worker.errors import Refused
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
from outbox_worker.schema.tables import Tables
from outbox_worker.settle.handlers import HANDLED_TYPES
from outbox_worker.store import payload
from outbox_worker.store.dead_letters import DECIDABLE, DeadLetter, Decision, history
from outbox_worker.store.payment_classes import REFUNDED_BUT_ACTIVE, PaymentClass, class_among
from outbox_worker.store.purchases import PurchaseRepository, backfill_event_id
from outbox_worker.store.queries import is_succeeded

SHOWN = 100
"""Characters of what was asked for, where nothing has that id."""


class Occasion(StrEnum):
    """When an event would be judged again."""

    DUE = "due"
    POSTPONED = "postponed"
    REQUEUED = "requeued"
    DELIVERED = "delivered_again"
    BACKFILL = "backfill"
    NEVER = "never"
    """Events of this type are left to others."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What would become of an event now."""

    event_id: UUID
    event_type: str
    occasion: Occasion
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """Something that happened, to whatever ``subject`` is the id of."""

    at: datetime | None
    what: str
    subject: Any
    detail: str = ""
    rules: tuple[int, ...] = ()
    """Which of docs/explanation/state-machine.md can have decided it."""


@dataclass(frozen=True, slots=True)
class PaymentStory:
    """All about one payment, or about events that name none."""

    payment_id: UUID | None
    payment: PaymentRow | None
    """None: no row of it is visible."""
    kind: str | None
    """Its class; ``refunded_but_active``; None: it is not standing."""
    timeline: Sequence[TimelineEntry]
    traces: Sequence[WaitingEvent | DeadLetter | MarkRow]
    prospects: Sequence[Prediction]


@dataclass(frozen=True, slots=True)
class Explanation:
    asked: str
    kinds: Sequence[str]
    """What has this id: event, payment, purchase, student."""
    stories: Sequence[PaymentStory]
    gifts: Sequence[PurchaseRow]
    """Purchases that no payment has paid for: the student's, or the one that was asked for."""
    has_more: bool
    """The student has more payments than are told of."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An event that could be judged again."""

    occasion: Occasion
    payment_id: UUID | None = None
    """Of one that has no payload any more, or never had one."""
    first: UUID | None = None
    """For a backfill: the payment of its pair that it takes."""

    @property
    def is_behind(self) -> bool:
        """Another payment of the pair comes first."""
        return self.first != self.payment_id and self.first is not None


def explain(
    session: Session, tables: Tables, policy: RetryPolicy, claimed_types: Sequence[str] | None, asked: str
) -> Explanation:
    """Everything that has to do with an event, a payment, a purchase or a student. ``claimed_types``: see ``handlers``.

    Raises Refused where nothing has this id.
    """
    found = look_up(session, tables, asked)
    if not found.kinds:
        raise Refused(f"Nothing is known of {asked[:SHOWN]}: no event, payment, purchase or student has this id.")
    classes = _classes(session, tables, [each.id for each in found.records.payments])
    owed = [payment_id for payment_id, kind in classes.items() if kind is PaymentClass.UNEXPLAINED]
    candidates = _candidates(found.records, _firsts(session, tables, owed), claimed_types)
    prospects = _judge(session, tables, policy, candidates) if candidates else []
    named: list[UUID | None] = list(found.payment_ids)
    if not named and found.records.traces:
        named.append(None)
    stories = [_story(found.records, key, classes, prospects) for key in named]
    return Explanation(asked, found.kinds, stories, found.gifts, found.has_more)


def _classes(session: Session, tables: Tables, ids: Sequence[UUID]) -> dict[UUID, PaymentClass]:
    """what: the classes of the standing ones among payments · lock: none · index: primary keys; see ``class_among``"""
    payments = tables.payments
    columns = [payments.c[key] for key in ("id", "student_id", "course_id")]
    few = select(*columns).where(payments.c.id.in_(ids), is_succeeded(payments)).cte("few")
    rows = session.execute(select(few.c.id, class_among(few, tables)))
    return {payment_id: PaymentClass(kind) for payment_id, kind in rows}


def _firsts(session: Session, tables: Tables, owed: Sequence[UUID]) -> dict[UUID, UUID]:
    """For each payment that is owed the oldest such payment of its pair, which a backfill takes; itself, mostly."""
    batch = Batch(ids=range(len(owed)), payment_ids=[str(each) for each in owed])
    standing = PurchaseRepository(tables).standing_payments(session, batch) if owed else {}
    unexplained = {
        owed[key]: [each.payment_id for each in found if each.kind is PaymentClass.UNEXPLAINED]
        for key, found in standing.items()
    }
    return {payment_id: UUID(first) for payment_id, (first, *_) in unexplained.items()}


def _candidates(
    records: Records, owed: Mapping[UUID, UUID], claimed_types: Sequence[str] | None
) -> dict[UUID, _Candidate]:
    """Each event on record, and the one that a backfill would write for each payment that is owed."""
    events = [mark for mark in records.marks if mark.event_type != PURCHASE_BACKFILLED]
    return {
        **{mark.event_id: _Candidate(Occasion.DELIVERED, mark.payment_id) for mark in events},
        **{letter.event_id: _Candidate(_occasion_of_letter(letter)) for letter in records.letters},
        **{event.event_id: _Candidate(_occasion_of_event(event, claimed_types)) for event in records.waiting},
        **{backfill_event_id(key): _Candidate(Occasion.BACKFILL, key, first) for key, first in owed.items()},
    }


def _occasion_of_letter(letter: DeadLetter) -> Occasion:
    return Occasion.REQUEUED if letter.state in DECIDABLE[Decision.REQUEUE] else Occasion.DELIVERED


def _occasion_of_event(event: WaitingEvent, claimed_types: Sequence[str] | None) -> Occasion:
    if claimed_types is not None and event.event_type not in claimed_types:
        return Occasion.NEVER
    return Occasion.DUE if event.is_due else Occasion.POSTPONED


def _judge(
    session: Session, tables: Tables, policy: RetryPolicy, candidates: Mapping[UUID, _Candidate]
) -> list[Prediction]:
    """Read the facts as the worker does, but for the locks, and decide."""
    known = _known(tables, list(candidates))
    read_of: list[ColumnElement[Any]] = [
        known.c[key] for key in ("id", "event_id", "event_type", "has_payload", "attempts", "crashes")
    ]
    rows = session.execute(select(*read_of, payload.claim_columns(known)).order_by(known.c.id)).all()
    read = [
        payload.read_claim_columns(known, row[-1]) if row.has_payload else _only(candidates[row.event_id].payment_id)
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
    return [_prospect(row, candidates[row.event_id], seen[row.id].facts) for row in rows]


def _prospect(row: Any, candidate: _Candidate, facts: Facts) -> Prediction:
    is_handled = row.event_type in HANDLED_TYPES
    pair_held = facts.pair_held or candidate.is_behind
    verdict = decide(replace(facts, crashes=row.crashes, handled=is_handled, pair_held=pair_held))
    if candidate.is_behind:
        verdict = replace(verdict, detail=f"payment {candidate.first} of the same pair is older, and owed, too")
    event_type = PURCHASE_BACKFILLED if candidate.occasion is Occasion.BACKFILL else row.event_type
    return Prediction(row.event_id, event_type, candidate.occasion, verdict)


def _only(payment_id: UUID | None) -> tuple[str | None, Repeated]:
    return None if payment_id is None else str(payment_id), Repeated()


def _known(tables: Tables, events: Sequence[UUID]) -> CTE:
    """what: events as the outbox has them, else as they would be requeued from their dead letter, else as they were
    lock: none · index: event ids
    """
    outbox, letters, marks = tables.outbox, tables.dead_letters, tables.processed_events
    ids = func.unnest(ids_as(marks.c.event_id.type, events))
    given = ids.table_valued("event_id", with_ordinality="position").render_derived(name="given")
    is_waiting = outbox.c.event_id.is_not(None)
    marked = func.nullif(marks.c.event_type, PURCHASE_BACKFILLED)
    types = [outbox.c.event_type, letters.c.event_type, marked, literal(PURCHASE_CONFIRMED)]
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
    """What stands for the row of an event in the outbox."""
    return select(known).where(known.c.id == keys.c.id).lateral("event")


def _story(
    records: Records,
    payment_id: UUID | None,
    classes: Mapping[UUID, PaymentClass],
    prospects: Sequence[Prediction],
) -> PaymentStory:
    """What concerns one payment; with None what names no payment."""
    payment = next((each for each in records.payments if each.id == payment_id), None)
    events = {each.event_id for each in records.traces if payment_id in (None, each.payment_id)}
    traces = [each for each in records.traces if each.event_id in events]
    if payment_id is not None:
        events.add(backfill_event_id(payment_id))
    purchases = _purchases(records, payment_id, payment)
    moments = [
        *_of_payment(payment),
        *(moment for each in traces for moment in _of_trace(each)),
        *(moment for each in purchases for moment in _of_purchase(each, payment_id)),
    ]
    return PaymentStory(
        payment_id,
        payment,
        _kind(payment, classes, purchases),
        sorted(dict.fromkeys(moments), key=lambda moment: moment.at or datetime.min.replace(tzinfo=UTC)),
        traces,
        [each for each in prospects if each.event_id in events],
    )


def _kind(
    payment: PaymentRow | None, classes: Mapping[UUID, PaymentClass], purchases: Sequence[PurchaseRow]
) -> str | None:
    if payment is None:
        return None
    is_active = any(each.is_active and each.payment_id == payment.id for each in purchases)
    if payment.status == PaymentStatus.REFUNDED and is_active:
        return REFUNDED_BUT_ACTIVE
    return classes.get(payment.id)


def _purchases(records: Records, payment_id: UUID | None, payment: PaymentRow | None) -> list[PurchaseRow]:
    """The payment's own, and those that hold its pair."""
    pair = payment and (payment.student_id, payment.course_id)
    return [
        each
        for each in records.purchases
        if payment_id is not None
        and (each.payment_id == payment_id or (each.is_active and (each.student_id, each.course_id) == pair))
    ]


def _of_payment(payment: PaymentRow | None) -> Iterator[TimelineEntry]:
    if payment is not None:
        yield TimelineEntry(payment.created_at, "paid", payment.id, f"{payment.amount:.2f} {payment.currency}")


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
    yield TimelineEntry(event.created_at, "event written", event.event_id, event.event_type)
    if event.attempts:
        tries = f"{event.attempts} failed attempt(s), the last: {event.last_error}"
        yield TimelineEntry(event.due_at, "due again", event.event_id, tries)


def _of_letter(letter: DeadLetter) -> Iterator[TimelineEntry]:
    key = letter.event_id
    yield TimelineEntry(letter.created_at, "event written", key, letter.event_type)
    died = f"{letter.reason}: {letter.detail} ({letter.attempts} attempt(s))"
    yield TimelineEntry(letter.dead_at, "event buried", key, died, RULES_BEHIND.get(letter.reason, ()))
    for decided in history(letter.note):
        yield TimelineEntry(decided.at, f"dead letter {decided.state}", key, f"by {decided.actor}: {decided.why}")
    if letter.state == DeadLetterState.SETTLED:
        yield TimelineEntry(letter.resolved_at, "dead letter settled", key, "the event succeeded after all")


def _of_mark(mark: MarkRow) -> Iterator[TimelineEntry]:
    key, rules = mark.event_id, RULES_BEHIND.get(mark.outcome, ())
    if mark.event_type == PURCHASE_BACKFILLED:
        yield TimelineEntry(mark.processed_at, "backfilled", key, mark.outcome, rules)
    elif mark.recovered_at is None:
        yield TimelineEntry(mark.processed_at, "event settled" if rules else "event marked", key, mark.outcome, rules)
    else:
        yield TimelineEntry(mark.processed_at, "event marked", key, "but its purchase was missing later")
        yield TimelineEntry(mark.recovered_at, "event settled", key, mark.outcome, rules)


def _of_purchase(purchase: PurchaseRow, payment_id: UUID | None) -> Iterator[TimelineEntry]:
    whose = "" if purchase.payment_id == payment_id else f"of {_owner(purchase)}: it holds the pair"
    yield TimelineEntry(purchase.created_at, "purchase made", purchase.id, whose)
    if not purchase.is_active:
        yield TimelineEntry(purchase.deactivated_at, "purchase taken back", purchase.id, whose)


def _owner(purchase: PurchaseRow) -> str:
    return "nobody's payment (a gift)" if purchase.payment_id is None else f"payment {purchase.payment_id}"
