"""Logs the outcome of each event.

If many events of a batch have the same outcome and reason, they share one log record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loguru import logger

from outbox_worker.durations import count_of
from outbox_worker.model import Batch, Event, Outcome, Reason, Verdict, Verdicts

SINGLES_MAX = 10
"""If a batch has at most this many events of one kind, each event has a log record at the usual
level.

A kind is an outcome and a reason. If a batch has more events of one kind, one shared record reports
these events. The record of each single event then has the level DEBUG.
"""
EXAMPLES_MAX = 10
"""The largest number of event ids in a shared record. This limit keeps the record short."""
_LOUD = (Outcome.RECOVERED, Outcome.DUPLICATE_PAYMENT, Outcome.DEAD)


def log_events(batch: Batch, verdicts: Verdicts) -> None:
    """Log each event that a careful transaction has decided (see ``BatchReport``).

    If a batch has more than ``SINGLES_MAX`` events of a kind, these events share one record.
    """
    crowds = _crowds(verdicts)
    for key, verdict in verdicts.items():
        _log_event(batch[key], verdict, in_crowd=_kind(verdict) in crowds and verdict.refused_next is None)
    for (outcome, reason), keys in crowds.items():
        _log_crowd(outcome, reason, [str(batch[key].event_id) for key in keys])


def log_unrecorded(refusals: Mapping[int, str]) -> None:
    """Log failed events whose failure the database refuses to record.

    The worker tries these events again later.
    """
    if refusals:
        ids, told = _shown(refusals)
        logger.bind(event="outcome_not_recorded", count=len(refusals), outbox_ids=ids, refusals=told).error(
            "the database does not let the worker settle {}, or record the failure; the worker tries again later and "
            "does not count this try",
            count_of(len(refusals), "event"),
        )


def log_set_aside(refusals: Mapping[int, str]) -> None:
    """Log the events that the worker sets aside.

    The database refuses to delete or change the rows of these events in the outbox.
    """
    if refusals:
        ids, told = _shown(refusals)
        logger.bind(event="events_set_aside", count=len(refusals), outbox_ids=ids, refusals=told).error(
            "the database refuses to change the rows of {}; the worker tries again after 15 s, then every 10 minutes. "
            "Meanwhile it settles all other events",
            count_of(len(refusals), "event"),
        )


def _shown(refusals: Mapping[int, str]) -> tuple[list[int], list[str]]:
    """Return the first event ids and the first distinct refusals.

    Return at most ``EXAMPLES_MAX`` of each.
    """
    return list(refusals)[:EXAMPLES_MAX], list(dict.fromkeys(refusals.values()))[:EXAMPLES_MAX]


def _kind(verdict: Verdict) -> tuple[Outcome, Reason | None]:
    """Return the kind of an event (outcome and reason). Events of one kind can share one record."""
    return verdict.outcome, verdict.reason


def _crowds(verdicts: Verdicts) -> dict[tuple[Outcome, Reason | None], list[int]]:
    """Group the events by kind. Return only the kinds that have more than ``SINGLES_MAX`` events.

    A refund is never in a group if the database refused a purchase for the student's next payment. A person must act
    for each such payment.
    """
    by_kind: dict[tuple[Outcome, Reason | None], list[int]] = {}
    for key, verdict in verdicts.items():
        if verdict.outcome in _LOUD or verdict.passed_to is not None:
            by_kind.setdefault(_kind(verdict), []).append(key)
    return {kind: keys for kind, keys in by_kind.items() if len(keys) > SINGLES_MAX}


def _log_event(event: Event, verdict: Verdict, *, in_crowd: bool) -> None:
    """Log one event. The level is DEBUG if a shared record of the same batch also reports the event."""
    attempts = event.attempts + (verdict.outcome in (Outcome.RETRIED, Outcome.DEAD))
    record = logger.bind(
        event_id=str(event.event_id),
        payment_id=event.payment_id,
        traceparent=verdict.traceparent,
        attempts=attempts,
    )
    match verdict.outcome:
        case Outcome.RECOVERED:
            record.bind(event="purchase_recovered").log(
                "DEBUG" if in_crowd else "WARNING",
                "the event was marked as settled, but had no purchase; the purchase is created now",
            )
        case Outcome.DUPLICATE_PAYMENT:
            record.bind(event="duplicate_payment").log(
                "DEBUG" if in_crowd else "WARNING",
                "another purchase already gives the student the course; no second purchase was created",
            )
        case Outcome.DEAD:
            record.bind(event="event_buried", reason=str(verdict.reason), detail=verdict.detail).log(
                "DEBUG" if in_crowd else "ERROR", "the event failed for good; it is a dead letter now"
            )
        case Outcome.RETRIED:
            record.bind(event="event_retried", reason=str(verdict.reason), detail=verdict.detail).debug(
                "the event has not succeeded yet; it is retried later"
            )
        case Outcome.REVOKED if verdict.refused_next is not None:
            record.bind(
                event="next_payment_refused", next_payment_id=verdict.refused_next, refusal=verdict.detail
            ).error(
                "a purchase was refunded, but the database refuses the purchase of the student's next payment for this "
                "course; that payment is unexplained until the cause is removed and a backfill runs"
            )
        case Outcome.REVOKED if verdict.passed_to is not None:
            record.bind(event="purchase_passed_on", passed_to=verdict.passed_to).log(
                "DEBUG" if in_crowd else "INFO",
                "a purchase was refunded; another payment of the student for this course gets a purchase instead",
            )
        case _:
            record.bind(event="event_settled", outcome=str(verdict.outcome)).debug("settled")


def _log_crowd(outcome: Outcome, reason: Reason | None, event_ids: Sequence[str]) -> None:
    """Log one record for many events of one kind. Each event also has its own record at DEBUG."""
    count = len(event_ids)
    record = logger.bind(count=count, event_ids=list(event_ids[:EXAMPLES_MAX]))
    match outcome:
        case Outcome.RECOVERED:
            record.bind(event="purchases_recovered").warning(
                "{} events were marked as settled, but had no purchase; the purchases are created now", count
            )
        case Outcome.DUPLICATE_PAYMENT:
            record.bind(event="duplicate_payments").warning(
                "{} payments are second payments of a student for the same course; no second purchase was created",
                count,
            )
        case Outcome.DEAD:
            record.bind(event="events_buried", reason=str(reason)).error(
                "{} events failed for good ({}); they are dead letters now", count, str(reason)
            )
        case _:
            record.bind(event="purchases_passed_on").info(
                "{} purchases were refunded; other payments for the same students and courses get purchases instead",
                count,
            )
