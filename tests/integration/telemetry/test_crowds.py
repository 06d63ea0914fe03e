"""Many events of one kind in a batch make one record above DEBUG, with some of their ids.

A few events make one record each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from loguru import logger

from outbox_worker.telemetry.events import EXAMPLES_MAX, SINGLES_MAX
from tests.support.factories import ABSENT, ProbedProcessor, Shop

MANY = SINGLES_MAX + 1
Told = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def told() -> Iterator[Told]:
    """Collect the level and the fields of every record."""
    found: Told = []
    sink = logger.add(lambda message: found.append((message.record["level"].name, message.record["extra"])), level=0)
    yield found
    logger.remove(sink)


def levels(told: Told, event: str) -> Counter[str]:
    return Counter(level for level, fields in told if fields.get("event") == event)


def of(told: Told, event: str) -> dict[str, Any]:
    ((_, fields),) = [each for each in told if each[1].get("event") == event]
    return fields


def test_dead_letters_of_one_reason(shop: Shop, processor: ProbedProcessor, told: Told) -> None:
    dead = {str(shop.paid(payload={"payment_id": ABSENT})[1]) for _ in range(MANY)}
    shop.paid(payload={"payment_id": "00000000-0000-0000-0000-000000000001"}, attempts=9)
    processor.process_batch()
    assert levels(told, "events_buried") == {"ERROR": 1}
    assert levels(told, "event_buried") == {"DEBUG": MANY, "ERROR": 1}, "the one of another reason is told by itself"
    record = of(told, "events_buried")
    assert (record["reason"], record["count"]) == ("invalid_payload", MANY)
    assert len(record["event_ids"]) == EXAMPLES_MAX
    assert set(record["event_ids"]) < dead


def test_few_are_told_one_by_one(shop: Shop, processor: ProbedProcessor, told: Told) -> None:
    for _ in range(SINGLES_MAX):
        shop.paid(payload={"payment_id": ABSENT})
    processor.process_batch()
    assert levels(told, "event_buried") == {"ERROR": SINGLES_MAX}
    assert not levels(told, "events_buried")


def test_duplicates_and_recovered_purchases(
    both_guards: str, shop: Shop, processor: ProbedProcessor, told: Told
) -> None:
    for _ in range(MANY):
        first, _ = shop.paid(due_in="-1 hour")
        shop.paid(student=first.student_id, course=first.course_id)
        marked, event_id = shop.paid()
        shop.mark(event_id, "created", marked.id)
    processor.process_batch()
    for single, many in (("duplicate_payment", "duplicate_payments"), ("purchase_recovered", "purchases_recovered")):
        assert levels(told, single) == {"DEBUG": MANY}, both_guards
        assert levels(told, many) == {"WARNING": 1}
        assert (of(told, many)["count"], len(of(told, many)["event_ids"])) == (MANY, EXAMPLES_MAX)


def test_purchases_passed_on(shop: Shop, processor: ProbedProcessor, told: Told) -> None:
    paid = [shop.paid()[0] for _ in range(MANY)]
    for first in paid:
        shop.paid(student=first.student_id, course=first.course_id)
    processor.process_batch()
    for first in paid:
        shop.set_status(first, "refunded")
        shop.refund(first)
    processor.process_batch()
    assert levels(told, "purchase_passed_on") == {"DEBUG": MANY}
    assert levels(told, "purchases_passed_on") == {"INFO": 1}
    assert of(told, "purchases_passed_on")["count"] == MANY


def test_only_losing_the_index_is_a_warning(shop: Shop, processor: ProbedProcessor, told: Told) -> None:
    shop.rows("DROP INDEX purchases_active_student_course_key")
    with processor.database.transaction() as session:
        processor.watch.probe(session)
    shop.rows(
        "CREATE UNIQUE INDEX purchases_active_student_course_key ON purchases (student_id, course_id) WHERE is_active"
    )
    with processor.database.transaction() as session:
        processor.watch.probe(session)
    assert [(level, fields["guard"]) for level, fields in told if fields.get("event") == "guard_changed"] == [
        ("WARNING", "lock"),
        ("INFO", "index"),
    ]
