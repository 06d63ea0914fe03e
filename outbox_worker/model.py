"""Data types of the program: enumerations and frozen records. The types do no I/O, and use no clock or randomness."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from outbox_worker import money
from outbox_worker.keys import Key

PURCHASE_CONFIRMED = "PURCHASE_CONFIRMED"

PURCHASE_BACKFILLED = "PURCHASE_BACKFILLED"
"""The ``event_type`` of a mark that a backfill writes for a payment that has no event."""

PURCHASE_REFUNDED = "PURCHASE_REFUNDED"

_Item = TypeVar("_Item")


class Outcome(StrEnum):
    """The result of handling an event.

    All outcomes except ``retried`` and ``dead`` are final. For a final outcome, the worker writes a
    mark (a row of ``processed_events``).
    """

    CREATED = "created"
    RECOVERED = "recovered"
    ALREADY_EXISTS = "already_exists"
    DUPLICATE_PAYMENT = "duplicate_payment"
    SUPPRESSED = "suppressed"
    REVOKED = "revoked"
    RETRIED = "retried"
    DEAD = "dead"


GRANTS = frozenset({Outcome.CREATED, Outcome.RECOVERED})
"""Outcomes of events for which the worker inserts a purchase."""

FINAL = frozenset(Outcome) - {Outcome.RETRIED, Outcome.DEAD}
"""Outcomes after which the worker writes a mark for the event and deletes the event from the outbox."""

_LOGGED_INDIVIDUALLY = frozenset({Outcome.RECOVERED, Outcome.DUPLICATE_PAYMENT, Outcome.RETRIED, Outcome.DEAD})

MARKS_WITHOUT_PURCHASE = frozenset({Outcome.DUPLICATE_PAYMENT, Outcome.SUPPRESSED, Outcome.REVOKED})
"""The outcomes of marks that are no proof that the worker created an active purchase.

A mark with any other outcome proves that the worker created an active purchase. This is true even
if this version of the program does not know the outcome.
"""


class Reason(StrEnum):
    """The reason why an event was retried or became a dead letter."""

    UNSUPPORTED_EVENT_TYPE = "unsupported_event_type"
    INVALID_PAYLOAD = "invalid_payload"
    EVENT_ID_REUSED = "event_id_reused"
    PAYMENT_NOT_FOUND = "payment_not_found"
    PAYMENT_MISMATCH = "payment_mismatch"
    PAYMENT_NOT_SUCCEEDED = "payment_not_succeeded"
    PAYMENT_NOT_REFUNDED = "payment_not_refunded"
    REJECTED_BY_DATABASE = "rejected_by_database"
    CRASHED_WORKER = "crashed_worker"


CONTRADICTIONS = frozenset({Reason.PAYMENT_MISMATCH, Reason.EVENT_ID_REUSED})
"""The reasons of dead letters whose event contradicts its payment.

The worker creates no purchase for the payment until a person decides.
"""

WAIVABLE = CONTRADICTIONS | {Reason.REJECTED_BY_DATABASE, Reason.CRASHED_WORKER}
"""The reasons for which a discarded dead letter *waives* a purchase.

The payment of the dead letter then gets no purchase. Only a dead letter whose event confirms a
payment can waive a purchase. All other reasons mean that the payment is missing or has not
succeeded. If a person discards a dead letter with another reason, and the payment succeeds later,
the payment still gets a purchase.
"""


class PaymentStatus(StrEnum):
    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REFUNDED = "refunded"


IGNORED = "ignored"
"""The key of ``status_values`` for statuses that the worker treats like ``pending``."""


class DeadLetterState(StrEnum):
    OPEN = "open"
    REQUEUED = "requeued"
    DISCARDED = "discarded"
    SETTLED = "settled"


class Guard(StrEnum):
    """The mechanism that prevents a second active purchase of a pair: the unique index, or advisory locks."""

    INDEX = "index"
    LOCK = "lock"


class Event(NamedTuple):
    """The keys of a claimed event. This record does not contain the payload of the event."""

    id: int
    event_id: str
    event_type: str
    payment_id: str | None
    """The payload's ``payment_id`` as PostgreSQL prints it.

    The value is None if it cannot be the id of a payment.
    """
    attempts: int
    lateness: float
    """Seconds from ``due_at`` to the claim, measured by the database's clock."""


class Position(NamedTuple):
    """A position in the queue: the due time (as text from PostgreSQL) and the id of an event."""

    due_at: str
    id: int


class DueWindow(NamedTuple):
    """A range of due times, as text from PostgreSQL. Both ends belong to the range."""

    first: str
    last: str


class Latencies(NamedTuple):
    """How late events were settled, as a histogram."""

    buckets: Sequence[Sequence[int]] = ()
    """Pairs of counts: bounds that are equal to the latency or larger, and events."""
    seconds: float = 0.0
    """The sum of all latencies."""


NO_LATENCIES = Latencies()

ALWAYS = DueWindow("-infinity", "infinity")


class Repeated(NamedTuple):
    """The values of a payment that the payload of its event can repeat, as text of limited length.

    A field is None if the payload does not contain its key, or if the value is null.
    """

    student_id: str | None = None
    course_id: str | None = None
    amount: str | None = None
    currency: str | None = None


@dataclass(frozen=True, eq=False)
class Batch(Mapping[int, Event]):
    """Claimed events by ``outbox.id``, in the order of the claim.

    The batch stores events as columns, because the claim returns one array per column. The fast
    path is one statement for the whole batch. The fast path sends the arrays back to the database
    unchanged, and reads no single event.
    """

    ids: Sequence[int] = ()
    event_ids: Sequence[str] = ()
    event_types: Sequence[str] = ()
    payment_ids: Sequence[str | None] = ()
    attempts: Sequence[int | str] = ()
    lateness: Sequence[float] = ()
    repeated: Sequence[Repeated] = ()
    """The values of the payments that the payloads repeat.

    This list is empty if the column ``payload`` has the type jsonb. SQL statements then read the
    values.
    """
    window: DueWindow = ALWAYS
    """The range that contains the due times of all events of the batch."""

    def __getitem__(self, key: int) -> Event:
        at = self._positions[key]
        return Event(
            id=key,
            event_id=self.event_ids[at],
            event_type=self.event_types[at],
            payment_id=self.payment_ids[at],
            attempts=int(self.attempts[at]),
            lateness=self.lateness[at],
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def only(self, keys: Iterable[int]) -> Batch:
        """Return the events with these keys, in the order of ``keys``."""
        return self._take([self._positions[key] for key in keys])

    def halves(self) -> tuple[Batch, Batch]:
        """Return both halves, in the order of the claim. If there is only one event, the first half is empty."""
        first, second = halves(list(self))
        return self.only(first), self.only(second)

    def among(self, keys: Collection[int]) -> Batch:
        """Return the events with these keys, in the order of the claim."""
        return self if len(keys) == len(self) else self.without(set(self.ids).difference(keys))

    def without(self, keys: Collection[int]) -> Batch:
        """Return all events except those with these keys, in the order of the claim."""
        return self._take([at for at, key in enumerate(self.ids) if key not in keys]) if keys else self

    def by_type(self) -> dict[str, Batch]:
        """Return a batch for each event type."""
        types = dict.fromkeys(self.event_types)
        if len(types) == 1:
            return dict.fromkeys(types, self)
        return {name: self._take([at for at, each in enumerate(self.event_types) if each == name]) for name in types}

    def _take(self, positions: Sequence[int]) -> Batch:
        columns = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "window"}
        taken = {name: [column[at] for at in positions] for name, column in columns.items() if column}
        return Batch(**taken, window=self.window)

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {key: at for at, key in enumerate(self.ids)}


class Mark(NamedTuple):
    outcome: str
    payment_id: Key | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that ``decide`` needs to know about an event.

    One statement reads these facts while the event and its pair (student, course) are locked.
    """

    crashes: int = 0
    """The number of processes that died while this event was the only event in their batch."""
    handled: bool = True
    is_refund: bool = False
    """True if the event reports a refund. False if the event confirms a purchase."""
    payment_id: Key | None = None
    mark: Mark | None = None
    purchase_active: bool | None = None
    """Whether the purchase of this payment is active, or None if this payment has no purchase."""
    payment_status: str | None = None
    """The status of the payment, or None if this transaction sees no row of the payment."""
    mismatches: tuple[str, ...] = ()
    """The payload keys whose values differ from the payment row."""
    has_pair: bool = True
    """Whether the payment names a student and a course. False if the shop has erased the student of an old payment."""
    pair_held: bool = False
    """Whether another active purchase already gives the student this course."""
    last_try: bool = False
    """Whether this attempt is the last one. If the last attempt fails, the event becomes a dead letter."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of an event, and the reason. ``detail`` is for people and never contains text from a payload."""

    outcome: Outcome
    reason: Reason | None = None
    detail: str = ""
    writes: bool = False
    """Whether the verdict inserts a purchase or deactivates one."""
    passed_to: str | None = None
    """The payment of the same pair that got a purchase after this event's payment was refunded."""
    refused_next: str | None = None
    """The next payment of the same pair, if the database refused its purchase.

    ``detail`` names the error.
    """
    rule: int = field(default=0, compare=False)
    """The deciding rule's number in docs/explanation/state-machine.md, or 0 if no rule decided."""
    traceparent: str | None = None
    """The ``traceparent`` that the producer wrote into the headers of the event."""

    @property
    def logged_individually(self) -> bool:
        """Whether the event gets a separate log record. A person can then find the event later."""
        passed_on = self.passed_to is not None or self.refused_next is not None
        return self.outcome in _LOGGED_INDIVIDUALLY or passed_on


Verdicts = dict[int, Verdict]
"""Verdicts by ``outbox.id``. A claimed event that has no verdict stays unchanged in the outbox."""


def halves(items: Sequence[_Item]) -> tuple[Sequence[_Item], Sequence[_Item]]:
    """Return both halves of a sequence. The first half of a single item is empty."""
    middle = len(items) // 2
    return items[:middle], items[middle:]


def by_outcome(verdicts: Mapping[int, Verdict]) -> dict[Outcome, list[int]]:
    """Group the events by outcome.

    A shortcut handles the usual case that all events share one verdict object.
    """
    distinct = {id(verdict): verdict for verdict in verdicts.values()}
    if len(distinct) == 1:
        return {verdict.outcome: list(verdicts) for verdict in distinct.values()}
    grouped: dict[Outcome, list[int]] = {}
    for key, verdict in verdicts.items():
        grouped.setdefault(verdict.outcome, []).append(key)
    return grouped


COLUMNS: Mapping[str, tuple[str, ...]] = {
    "payments": ("id", "student_id", "course_id", "amount", "currency", "status", "created_at", "updated_at"),
    "outbox": (
        *("id", "event_id", "event_type", "payload", "headers", "created_at", "due_at"),
        *("attempts", "crashes", "last_error"),
    ),
    "purchases": (
        *("id", "student_id", "course_id", "payment_id", "amount", "currency"),
        *("is_active", "created_at", "deactivated_at"),
    ),
    "processed_events": ("event_id", "event_type", "outcome", "payment_id", "processed_at", "recovered_at"),
    "dead_letters": (
        *("event_id", "event_type", "payload", "headers", "created_at", "payment_id", "attempts"),
        *("reason", "detail", "dead_at", "state", "resolved_at", "actor", "note"),
    ),
    "workers": (
        "id",
        "host",
        "pid",
        "version",
        "started_at",
        "seen_at",
        "stopped_at",
        "guard",
        "metrics",
        "succeeded_at",
        "isolated_event",
        "isolated_at",
        "isolated_timeline",
        "set_aside",
    ),
    "backfill_runs": (
        *("id", "kind", "started_at", "seen_at", "finished_at", "since", "until", "cutoff", "is_full"),
        *("cursor", "counts", "host", "pid", "actor", "reason", "outcome"),
    ),
}
"""Tables and columns by their names in code and docs.

Settings map these names to the names in the user's database.
"""


@dataclass(frozen=True, slots=True)
class FoundPayment:
    """A payment whose purchase is missing, or that a person should check."""

    payment_id: Key
    student_id: Any
    course_id: Any
    amount: Decimal | None
    """The amount, or None if the column is NULL. The payments table of a shop can allow NULL."""
    currency: str
    created_at: datetime | None
    """The time of the payment, or None if Python cannot represent the time (``-infinity``)."""
    age_seconds: float | None
    """The age, or None if the payment has no time."""
    pair: tuple[str, str] = field(repr=False)
    """One text for the student and one for the course, to compare payments.

    Two payments of the same student and course have equal texts, even if their ids are written in different ways.
    """

    def is_since(self, time: datetime) -> bool:
        return self.created_at is not None and self.created_at >= time

    @property
    def age(self) -> tuple[datetime, int, str]:
        """The sort key that puts the oldest payment first.

        The length of the id comes before its text, so that integers are sorted as numbers.
        """
        key = str(self.payment_id)
        return self.created_at or datetime.min.replace(tzinfo=UTC), len(key), key


@dataclass(frozen=True, slots=True)
class UnjudgedPayment(FoundPayment):
    """A succeeded payment that cannot be classified until a person corrects a missing or unusable value."""

    reason: str
    """A clause that says which value is missing or unusable: ``it names no student``."""

    @property
    def age(self) -> tuple[datetime, int, str]:
        """A sort key that puts the oldest payment first.

        The key contains no id, because the payment possibly has no id.
        """
        return self.created_at or datetime.min.replace(tzinfo=UTC), 0, ""


@dataclass(frozen=True, slots=True)
class PaymentTotals:
    """The number of payments, and the sum of their amounts for each currency."""

    count: int = 0
    money: Mapping[str, Decimal] = field(default_factory=dict)

    def __add__(self, other: PaymentTotals) -> PaymentTotals:
        keys = dict.fromkeys([*self.money, *other.money])
        sums = {key: money.add(self.money.get(key, Decimal(0)), other.money.get(key, Decimal(0))) for key in keys}
        return PaymentTotals(self.count + other.count, sums)

    def __sub__(self, other: PaymentTotals) -> PaymentTotals:
        less = self + PaymentTotals(-other.count, {key: amount.copy_negate() for key, amount in other.money.items()})
        return PaymentTotals(less.count, {key: amount for key, amount in less.money.items() if amount})

    @classmethod
    def of(cls, payments: Iterable[FoundPayment]) -> PaymentTotals:
        return sum((cls(1, {payment.currency: payment.amount or Decimal(0)}) for payment in payments), cls())

    @classmethod
    def read(cls, written: Mapping[str, Any] | None) -> PaymentTotals:
        """Convert the value that ``written`` returned back to totals. If the value is None, the totals are empty."""
        given = written or {"count": 0, "money": {}}
        return cls(given["count"], {key: Decimal(amount) for key, amount in given["money"].items()})

    def written(self) -> dict[str, Any]:
        """Return the totals as a value for a JSON column."""
        return {"count": self.count, "money": money.amount_texts(self.money)}
