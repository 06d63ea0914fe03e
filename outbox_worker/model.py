"""The words of the product, as closed sets and frozen records. No I/O, no clock, no chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

PURCHASE_CONFIRMED = "PURCHASE_CONFIRMED"


class Outcome(StrEnum):
    """What became of an event. All but ``retried`` and ``dead`` are final and leave a mark."""

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
"""Outcomes that are marked and remove the event."""

MARKS_WITHOUT_PURCHASE = frozenset({Outcome.DUPLICATE_PAYMENT, Outcome.SUPPRESSED, Outcome.REVOKED})
"""Marks that never claimed an active purchase; every other mark, an unknown one included, did."""


class Reason(StrEnum):
    """Why an event was retried or is dead."""

    UNSUPPORTED_EVENT_TYPE = "unsupported_event_type"
    INVALID_PAYLOAD = "invalid_payload"
    EVENT_ID_REUSED = "event_id_reused"
    PAYMENT_NOT_FOUND = "payment_not_found"
    PAYMENT_MISMATCH = "payment_mismatch"
    PAYMENT_NOT_SUCCEEDED = "payment_not_succeeded"
    REJECTED_BY_DATABASE = "rejected_by_database"


CONTRADICTIONS = frozenset({Reason.PAYMENT_MISMATCH, Reason.EVENT_ID_REUSED})
"""Reasons by which event and payment contradict each other: a person decides, nothing is granted meanwhile."""


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
    """A claimed event, by its keys; its payload stays in the database."""

    id: int
    event_id: UUID
    event_type: str
    payment_id: str | None
    """The payload's ``payment_id`` where it is a UUID string, in lower case; otherwise None."""
    attempts: int
    lateness: float
    """Seconds between ``due_at`` and the claim, by the database's clock."""


Batch = Mapping[int, Event]
"""Claimed events by ``outbox.id``, in the order of the claim."""


class Mark(NamedTuple):
    outcome: str
    payment_id: UUID | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that ``decide`` may look at, read in one statement while the event and its pair are locked."""

    handled: bool = True
    payment_id: UUID | None = None
    mark: Mark | None = None
    purchase_active: bool | None = None
    """The purchase of this payment; None: there is none."""
    payment_status: str | None = None
    """None: no payment row is visible."""
    mismatches: tuple[str, ...] = ()
    """Payload keys that differ from the payment row."""
    pair_held: bool = False
    """Another purchase holds the pair active."""
    last_try: bool = False
    """One more failed attempt reaches the maximum."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome with its reason; ``detail`` is for people and never carries payload text."""

    outcome: Outcome
    reason: Reason | None = None
    detail: str = ""
    clean: bool = False
    """Made by the fast statement, whose predicates exclude marks and dead letters: nothing else needs care."""


Verdicts = dict[int, Verdict]
"""Verdicts by ``outbox.id``. A claimed event without one stays in the outbox as it was."""

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
    "workers": ("id", "host", "pid", "version", "started_at", "seen_at", "stopped_at", "guard", "metrics"),
}
"""Tables and columns by the names that code and docs use; settings map them to the names of the user's database."""
