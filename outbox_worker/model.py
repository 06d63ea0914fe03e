"""The words of the product, as closed sets and frozen records. No I/O, no clock, no randomness."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple
from uuid import UUID

PURCHASE_CONFIRMED = "PURCHASE_CONFIRMED"

PURCHASE_BACKFILLED = "PURCHASE_BACKFILLED"
"""The type of a mark that a backfill writes: there was no event."""

PURCHASE_REFUNDED = "PURCHASE_REFUNDED"


class Outcome(StrEnum):
    """What became of an event. All outcomes but ``retried`` and ``dead`` are final and leave a mark."""

    CREATED = "created"
    RECOVERED = "recovered"
    ALREADY_EXISTS = "already_exists"
    DUPLICATE_PAYMENT = "duplicate_payment"
    SUPPRESSED = "suppressed"
    REVOKED = "revoked"
    RETRIED = "retried"
    DEAD = "dead"


GRANTS = frozenset({Outcome.CREATED, Outcome.RECOVERED})
"""Outcomes for which a purchase is inserted."""

FINAL = frozenset(Outcome) - {Outcome.RETRIED, Outcome.DEAD}
"""Outcomes that end an event: it is marked and deleted from the outbox."""

_LOGGED_INDIVIDUALLY = frozenset({Outcome.RECOVERED, Outcome.DUPLICATE_PAYMENT, Outcome.RETRIED, Outcome.DEAD})

MARKS_WITHOUT_PURCHASE = frozenset({Outcome.DUPLICATE_PAYMENT, Outcome.SUPPRESSED, Outcome.REVOKED})
"""Outcomes whose mark does not say that an active purchase was made. Every other mark says so, an unknown one too."""


class Reason(StrEnum):
    """Why an event was retried or is dead."""

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
"""Reasons that mean that event and payment contradict each other: until a person decides, nothing is granted."""

WAIVABLE = CONTRADICTIONS | {Reason.REJECTED_BY_DATABASE, Reason.CRASHED_WORKER}
"""Reasons of a confirmation's dead letter: discarding one with such a reason waives the purchase of its payment.

The other reasons say that the payment is missing or has not succeeded. Discarding a letter with such a reason waives
nothing, should the payment succeed later.
"""


class PaymentStatus(StrEnum):
    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REFUNDED = "refunded"


class DeadLetterState(StrEnum):
    OPEN = "open"
    REQUEUED = "requeued"
    DISCARDED = "discarded"
    SETTLED = "settled"


class Guard(StrEnum):
    """What stops a second active purchase of a pair."""

    INDEX = "index"
    LOCK = "lock"


class Event(NamedTuple):
    """The keys of a claimed event; its payload stays in the database."""

    id: int
    event_id: UUID
    event_type: str
    payment_id: str | None
    """The payload's ``payment_id`` in lower case if it is a UUID string; otherwise None."""
    attempts: int
    lateness: float
    """Seconds between ``due_at`` and the claim, by the database's clock."""


class Position(NamedTuple):
    """A position in the queue: an event's due time, as PostgreSQL writes it, and its id."""

    due_at: str
    id: int


class DueWindow(NamedTuple):
    """From one due time to another, as PostgreSQL writes them, both included."""

    first: str
    last: str


ALWAYS = DueWindow("-infinity", "infinity")


class Repeated(NamedTuple):
    """What a payload repeats of its payment, as bounded text; None: the key is absent or null."""

    student_id: str | None = None
    course_id: str | None = None
    amount: str | None = None
    currency: str | None = None


@dataclass(frozen=True, eq=False)
class Batch(Mapping[int, Event]):
    """Claimed events by ``outbox.id``, in the order of the claim.

    The events are kept as columns, as the database sends them: on the happy path no single event is read, and the
    columns are sent back as they came.
    """

    ids: Sequence[int] = ()
    event_ids: Sequence[str] = ()
    event_types: Sequence[str] = ()
    payment_ids: Sequence[str | None] = ()
    attempts: Sequence[int | str] = ()
    lateness: Sequence[float] = ()
    repeated: Sequence[Repeated] = ()
    """What the payloads repeat of their payments, if the client reads them: ``payload`` is of type json or text."""
    window: DueWindow = ALWAYS
    """The due times between which the events lie."""

    def __getitem__(self, key: int) -> Event:
        at = self._positions[key]
        return Event(
            id=key,
            event_id=UUID(self.event_ids[at]),
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
        """The events with these keys, in the order of ``keys``."""
        return self._take([self._positions[key] for key in keys])

    def among(self, keys: Collection[int]) -> Batch:
        """The events with these keys, in the order of the claim."""
        return self if len(keys) == len(self) else self.without(set(self.ids).difference(keys))

    def without(self, keys: Collection[int]) -> Batch:
        """The events with other keys, in the order of the claim."""
        return self._take([at for at, key in enumerate(self.ids) if key not in keys]) if keys else self

    def by_type(self) -> dict[str, Batch]:
        """The events of each type."""
        types = dict.fromkeys(self.event_types)
        if len(types) == 1:
            return dict.fromkeys(types, self)
        return {name: self._take([at for at, each in enumerate(self.event_types) if each == name]) for name in types}

    def payments(self) -> Sequence[str | None]:
        """The payment of each event."""
        return self.payment_ids

    def _take(self, positions: Sequence[int]) -> Batch:
        columns = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "window"}
        taken = {name: [column[at] for at in positions] for name, column in columns.items() if column}
        return Batch(**taken, window=self.window)

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {key: at for at, key in enumerate(self.ids)}


class Mark(NamedTuple):
    outcome: str
    payment_id: UUID | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that ``decide`` looks at: read by one statement while the event and its pair are locked."""

    crashes: int = 0
    """How many processes died while they handled this event alone."""
    handled: bool = True
    is_refund: bool = False
    """The event reports a refund; otherwise it confirms a purchase."""
    payment_id: UUID | None = None
    mark: Mark | None = None
    purchase_active: bool | None = None
    """Whether the purchase of this payment is active; None: there is no purchase."""
    payment_status: str | None = None
    """None: the payment row is not visible."""
    mismatches: tuple[str, ...] = ()
    """Payload keys that differ from the payment row."""
    pair_held: bool = False
    """Another active purchase already gives the student this course."""
    last_try: bool = False
    """This attempt is the last: if it fails, the event is dead."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome with its reason; ``detail`` is for people and never contains text of a payload."""

    outcome: Outcome
    reason: Reason | None = None
    detail: str = ""
    writes: bool = False
    """The verdict writes a purchase."""
    via_fast_path: bool = False
    """The fast statement made the purchase: its predicates exclude marks and open letters, so neither is looked for."""
    passed_to: str | None = None
    """The payment that got the course after another one was refunded."""
    rule: int = field(default=0, compare=False)
    """The rule of docs/explanation/state-machine.md that decided; 0: none of them."""
    traceparent: str | None = None
    """The trace that the producer names in the event's headers."""

    @property
    def logged_individually(self) -> bool:
        """Whether the event gets a log record of its own, so that a person can find it again."""
        return self.outcome in _LOGGED_INDIVIDUALLY or self.passed_to is not None


Verdicts = dict[int, Verdict]
"""Verdicts by ``outbox.id``. A claimed event without a verdict stays in the outbox as it was."""


def by_outcome(verdicts: Mapping[int, Verdict]) -> dict[Outcome, list[int]]:
    """The events of each outcome. Usually all of them share one verdict."""
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
    ),
    "backfill_runs": (
        *("id", "kind", "started_at", "seen_at", "finished_at", "since", "until", "cutoff", "is_full"),
        *("cursor", "counts", "host", "pid", "actor", "reason", "outcome"),
    ),
}
"""Tables and columns under the names of code and docs; settings map them to the names of the user's database."""


@dataclass(frozen=True, slots=True)
class FoundPayment:
    """A payment that is owed a purchase, or that a person should look at."""

    payment_id: UUID
    student_id: Any
    course_id: Any
    amount: Decimal
    currency: str
    created_at: datetime | None
    """None: a time that Python cannot represent, such as ``-infinity``."""
    age_seconds: float

    @property
    def pair(self) -> tuple[Any, Any]:
        return self.student_id, self.course_id

    def is_since(self, time: datetime) -> bool:
        return self.created_at is not None and self.created_at >= time

    @property
    def age(self) -> tuple[datetime, int]:
        """A sort key: oldest first."""
        return self.created_at or datetime.min.replace(tzinfo=UTC), self.payment_id.int


@dataclass(frozen=True, slots=True)
class PaymentTotals:
    """A number of payments, and their money by currency."""

    count: int = 0
    money: Mapping[str, Decimal] = field(default_factory=dict)

    def __add__(self, other: PaymentTotals) -> PaymentTotals:
        keys = dict.fromkeys([*self.money, *other.money])
        sums = {key: self.money.get(key, Decimal(0)) + other.money.get(key, Decimal(0)) for key in keys}
        return PaymentTotals(self.count + other.count, sums)

    def __sub__(self, other: PaymentTotals) -> PaymentTotals:
        less = self + PaymentTotals(-other.count, {key: -amount for key, amount in other.money.items()})
        return PaymentTotals(less.count, {key: amount for key, amount in less.money.items() if amount})

    @classmethod
    def of(cls, payments: Iterable[FoundPayment]) -> PaymentTotals:
        return sum((cls(1, {payment.currency: payment.amount}) for payment in payments), cls())

    @classmethod
    def read(cls, written: Mapping[str, Any] | None) -> PaymentTotals:
        """Read what ``written`` wrote; None is no payments."""
        given = written or {"count": 0, "money": {}}
        return cls(given["count"], {key: Decimal(amount) for key, amount in given["money"].items()})

    def written(self) -> dict[str, Any]:
        """The totals for a JSON column."""
        return {"count": self.count, "money": {key: f"{amount:.2f}" for key, amount in self.money.items()}}
