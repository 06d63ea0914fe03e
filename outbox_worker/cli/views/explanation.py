"""The output of `why` and `dead-letters show`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

from outbox_worker import terminal
from outbox_worker.cli.views.audit import MEANINGS
from outbox_worker.decision import REFUND_RULES, RULES
from outbox_worker.diagnose.explanation import Explanation, Occasion, PaymentStory, Prediction, TimelineEntry
from outbox_worker.diagnose.records import MarkRow, PurchaseRow, WaitingEvent
from outbox_worker.model import PURCHASE_REFUNDED, DeadLetterState, PaymentStatus
from outbox_worker.money import amount_of
from outbox_worker.store.dead_letters import DECIDABLE, Content, DeadLetter, history
from outbox_worker.store.payment_classes import REFUNDED_BUT_ACTIVE, PaymentClass

_MEANINGS = MEANINGS | {REFUNDED_BUT_ACTIVE: "its refund event is missing or not settled yet"}
_OCCASIONS = {
    Occasion.DUE: "when a worker claims it",
    Occasion.POSTPONED: "when it is due again",
    Occasion.REQUEUED: "if it is requeued",
    Occasion.DELIVERED: "if it is delivered again",
    Occasion.BACKFILL: "by a backfill",
    Occasion.NEVER: "and later: workers do not claim events of this type, or events without due time, id or type",
}


def explanation_object(found: Explanation) -> dict[str, Any]:
    """Return the object of ``why --json``."""
    return {
        "id": found.asked,
        "found_as": found.kinds,
        "payments": [_story_object(story) for story in found.stories],
        "gifts": found.gifts,
        "has_more": found.has_more,
    }


def _story_object(story: PaymentStory) -> dict[str, Any]:
    return {
        "payment_id": story.payment_id,
        "payment": story.payment,
        "class": story.kind,
        "not_judged": story.not_judged,
        "timeline": story.timeline,
        "events": [{"place": _place(trace)} | asdict(trace) for trace in story.traces],
        "now": [_prediction_object(prediction) for prediction in story.predictions],
    }


def _prediction_object(prediction: Prediction) -> dict[str, Any]:
    verdict = prediction.verdict
    return {
        "event_id": prediction.event_id,
        "event_type": prediction.event_type,
        "occasion": prediction.occasion,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "rule": verdict.rule,
        "writes_purchase": verdict.writes,
    }


def _place(trace: object) -> str:
    match trace:
        case WaitingEvent():
            return "outbox"
        case MarkRow():
            return "mark"
        case _:
            return "dead_letter"


def print_explanation(found: Explanation) -> None:
    """Print the data of each payment, what happened to the payment, and what would happen now."""
    shown = [
        *(partial(_print_story, story) for story in found.stories),
        *(partial(_print_gift, g) for g in found.gifts),
    ]
    for position, show in enumerate(shown):
        if position:
            terminal.line("")
        show()
    if found.has_more:
        terminal.line("\nThe student has more payments. To see another payment, give its id.", "yellow")


def _print_gift(gift: PurchaseRow) -> None:
    state = "active" if gift.is_active else "taken back"
    terminal.facts([("gift", f"{gift.id}, {state}"), ("course", gift.course_id), ("since", _time(gift.created_at))])


def _print_story(story: PaymentStory) -> None:
    terminal.facts(_heading(story))
    terminal.line("")
    terminal.facts([(_time(entry.at), _sentence(entry)) for entry in story.timeline])
    _print_predictions(story.predictions)
    if sum(each.verdict.writes for each in story.predictions) > 1:
        terminal.line(
            "\nEach prediction ignores the other events. Only the event that is settled first makes the purchase.",
            "dim",
        )


def next_steps(found: Explanation) -> list[list[str]]:
    """Choose the commands to run next by the classes and the dead letters of the payments."""
    steps = [["backfill", "--dry-run"]] if any(s.kind == PaymentClass.UNEXPLAINED for s in found.stories) else []
    letters = [each for s in found.stories for each in s.traces if isinstance(each, DeadLetter)]
    opened = [each for each in letters if each.state == DeadLetterState.OPEN]
    return [*steps, *(["dead-letters", "show", str(each.event_id)] for each in opened[:1])]


def next_steps_of(letter: DeadLetter) -> list[list[str]]:
    """Return a command that explains the payment, and a command for each possible decision."""
    verbs = [str(decision) for decision, states in DECIDABLE.items() if letter.state in states]
    about = [["why", str(letter.payment_id)]] if letter.payment_id else []
    return [*about, *(["dead-letters", verb, str(letter.event_id)] for verb in verbs)]


def letter_object(letter: DeadLetter, content: Content, story: PaymentStory) -> dict[str, Any]:
    """Return the object of ``dead-letters show --json``."""
    return {
        "dead_letter": asdict(letter) | content._asdict(),
        "history": [each._asdict() for each in history(letter.note)],
        "payment": story.payment,
        "class": story.kind,
        "now": next((_prediction_object(each) for each in story.predictions if each.event_id == letter.event_id), None),
    }


def print_letter(letter: DeadLetter, content: Content, story: PaymentStory) -> None:
    """Print a dead letter: event, reason, payment, decisions so far, and what would happen now."""
    terminal.facts(
        [
            ("event", f"{letter.event_id} ({letter.event_type})"),
            ("state", letter.state),
            ("reason", f"{letter.reason}: {letter.detail}"),
            ("attempts", letter.attempts),
            ("written", _time(letter.created_at)),
            ("dead since", _time(letter.dead_at)),
            ("payload", content.payload),
            *([("headers", content.headers)] if content.headers else []),
        ]
    )
    terminal.line("")
    terminal.facts(_heading(story))
    if decided := history(letter.note):
        terminal.line("")
        terminal.facts([(_time(each.at), f"{each.state} by {each.actor}: {each.why}") for each in decided])
    _print_predictions([each for each in story.predictions if each.event_id == letter.event_id])


def _print_predictions(predictions: Sequence[Prediction]) -> None:
    for prediction in predictions:
        terminal.line(f"\nnow, {_OCCASIONS[prediction.occasion]}", "bold")
        terminal.facts(
            [
                ("event", f"{prediction.event_id} ({prediction.event_type})"),
                ("outcome", _outcome(prediction)),
                *_rule(prediction),
            ]
        )


def _heading(story: PaymentStory) -> list[tuple[str, object]]:
    if story.payment_id is None:
        return [("payment", "the event names none")]
    if story.payment is None:
        return [("payment", f"{story.payment_id} (no such row in payments)")]
    paid = story.payment
    return [
        ("payment", paid.id),
        ("student", paid.student_id),
        ("course", paid.course_id),
        ("money", f"{amount_of(paid.amount, paid.currency)}, {paid.status or 'NULL'}"),
        ("class", _class(story, paid.status)),
    ]


def _class(story: PaymentStory, status: str | None) -> str:
    kind = story.kind
    if story.not_judged is not None:
        return f"cannot be judged: {story.not_judged}"
    if status not in set(PaymentStatus):
        return "not judged: its status is unknown; add it to status_values under [payments] in the configuration file"
    if kind is None:
        return f"none: a {status} payment is owed no purchase"
    return f"{kind.replace('_', ' ')}: {_MEANINGS[kind]}"


def _sentence(entry: TimelineEntry) -> str:
    text = f"{entry.what} {entry.subject}" if entry.what != "paid" else entry.what
    rules = " or ".join(map(str, entry.rules))
    return text + (f": {entry.detail}" if entry.detail else "") + (f" (rule {rules})" if rules else "")


def _outcome(prediction: Prediction) -> str:
    verdict = prediction.verdict
    if prediction.occasion is Occasion.NEVER:
        return "stays as it is"
    named = f"{verdict.outcome}, {verdict.reason}" if verdict.reason else str(verdict.outcome)
    return f"{named}: {verdict.detail}" if verdict.detail else named


def _rule(prediction: Prediction) -> list[tuple[str, object]]:
    rules = REFUND_RULES if prediction.event_type == PURCHASE_REFUNDED else RULES
    number = prediction.verdict.rule
    return [(f"rule {number}", rules[number])] if number else []


def _time(entry: datetime | None) -> str:
    return "?" if entry is None else f"{entry.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
