"""Records of single events, and of many of a kind: a batch of a thousand bad events is one record, not a thousand."""

from __future__ import annotations

from collections.abc import Sequence

from loguru import logger

from outbox_worker.model import Batch, Event, Outcome, Reason, Verdict, Verdicts

SINGLES_MAX = 10
"""More events of one kind than that in a batch share one record; each has its own at DEBUG only."""
EXAMPLES_MAX = 10
"""So many of their ids such a record names."""
_LOUD = (Outcome.RECOVERED, Outcome.DUPLICATE_PAYMENT, Outcome.DEAD)


def log_events(batch: Batch, verdicts: Verdicts) -> None:
    """Log each event that was judged one by one; above DEBUG, more than ``SINGLES_MAX`` of a kind as one record."""
    logged = {key: verdict for key, verdict in verdicts.items() if not verdict.via_fast_path}
    crowds = _crowds(logged)
    for key, verdict in logged.items():
        _log_event(batch[key], verdict, in_crowd=_kind(verdict) in crowds)
    for (outcome, reason), keys in crowds.items():
        _log_crowd(outcome, reason, [str(batch[key].event_id) for key in keys])


def _kind(verdict: Verdict) -> tuple[Outcome, Reason | None]:
    """What single events have in common that are summed up in one record if there are many."""
    return verdict.outcome, verdict.reason


def _crowds(verdicts: Verdicts) -> dict[tuple[Outcome, Reason | None], list[int]]:
    """The events of each kind that one batch holds too many of to log each above DEBUG."""
    by_kind: dict[tuple[Outcome, Reason | None], list[int]] = {}
    for key, verdict in verdicts.items():
        if verdict.outcome in _LOUD or verdict.passed_to is not None:
            by_kind.setdefault(_kind(verdict), []).append(key)
    return {kind: keys for kind, keys in by_kind.items() if len(keys) > SINGLES_MAX}


def _log_event(event: Event, verdict: Verdict, *, in_crowd: bool) -> None:
    """A record of one event that a person may want to find again."""
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
                "DEBUG" if in_crowd else "WARNING", "the event was marked as settled, but had no purchase; made it now"
            )
        case Outcome.DUPLICATE_PAYMENT:
            record.bind(event="duplicate_payment").log(
                "DEBUG" if in_crowd else "WARNING", "the student paid twice for the course; no second purchase was made"
            )
        case Outcome.DEAD:
            record.bind(event="event_buried", reason=str(verdict.reason), detail=verdict.detail).log(
                "DEBUG" if in_crowd else "ERROR", "the event cannot succeed as it stands; it is a dead letter now"
            )
        case Outcome.RETRIED:
            record.bind(event="event_retried", reason=str(verdict.reason), detail=verdict.detail).debug(
                "the event did not succeed yet; it is tried again later"
            )
        case Outcome.REVOKED if verdict.passed_to is not None:
            record.bind(event="purchase_passed_on", passed_to=verdict.passed_to).log(
                "DEBUG" if in_crowd else "INFO",
                "a purchase was refunded; another payment of the student for the course got it",
            )
        case _:
            record.bind(event="event_settled", outcome=str(verdict.outcome)).debug("settled")


def _log_crowd(outcome: Outcome, reason: Reason | None, event_ids: Sequence[str]) -> None:
    """One record of many events of a kind; each has a record of its own at DEBUG."""
    count = len(event_ids)
    record = logger.bind(count=count, event_ids=list(event_ids[:EXAMPLES_MAX]))
    match outcome:
        case Outcome.RECOVERED:
            record.bind(event="purchases_recovered").warning(
                "{} events were marked as settled, but had no purchase; made them now", count
            )
        case Outcome.DUPLICATE_PAYMENT:
            record.bind(event="duplicate_payments").warning(
                "{} payments were second ones of a student for a course; no second purchase was made", count
            )
        case Outcome.DEAD:
            record.bind(event="events_buried", reason=str(reason)).error(
                "{} events cannot succeed as they stand ({}); they are dead letters now", count, str(reason)
            )
        case _:
            record.bind(event="purchases_passed_on").info(
                "{} purchases were refunded; other payments of the students for the courses got them", count
            )
