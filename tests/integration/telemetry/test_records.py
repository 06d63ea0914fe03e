"""Records of events and transactions: trace of the producer, counts, sums once per heartbeat."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from outbox_worker.database.engine import Database
from outbox_worker.model import Outcome
from tests.support.factories import ABSENT, ProbedProcessor, Shop
from tests.support.refusals import run
from tests.support.trips import RoundTrips

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
NO_TRACES = {
    "no headers": None,
    "no object": f'["{TRACE}"]',
    "a text": f'"{TRACE}"',
    "another key": f'{{"Traceparent": "{TRACE}"}}',
    "null": '{"traceparent": null}',
    "an object": f'{{"traceparent": {{"traceparent": "{TRACE}"}}}}',
    "a list": f'{{"traceparent": ["{TRACE}"]}}',
    "upper case": f'{{"traceparent": "{TRACE.upper()}"}}',
    "more": f'{{"traceparent": "{TRACE}-01"}}',
    "a line more": f'{{"traceparent": "{TRACE}\\n"}}',
    "less": f'{{"traceparent": "{TRACE[:-1]}"}}',
    "spaces": f'{{"traceparent": " {TRACE}"}}',
    "other digits": f'{{"traceparent": "{TRACE.replace("4", "٤")}"}}',
    "no trace": '{"traceparent": "00-00000000000000000000000000000000-00f067aa0ba902b7-01"}',
    "no parent": '{"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"}',
    "no version": f'{{"traceparent": "ff{TRACE[2:]}"}}',
    "long": f'{{"traceparent": "{"0" * 1_000_000}"}}',
}


def head(shop: Shop, headers: str | None = f'{{"traceparent": "{TRACE}"}}') -> None:
    shop.rows("UPDATE outbox SET headers = %s", headers)


def told(records: list[dict[str, Any]], event: str) -> dict[str, Any]:
    (found,) = (record for record in records if record["event"] == event)
    return found


def test_what_is_told_of_an_event_names_its_trace(
    both_guards: str, shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    recovered, marked = shop.paid()
    shop.mark(marked, "created", recovered.id)
    first, _ = shop.paid(due_in="-1 hour")
    _, twice = shop.paid(student=first.student_id, course=first.course_id)
    _, dead = shop.paid(payload={"payment_id": ABSENT})
    _, retried = shop.paid(status="pending")
    head(shop)
    processor.process_batch()
    by_event = {
        "purchase_recovered": marked,
        "duplicate_payment": twice,
        "event_buried": dead,
        "event_retried": retried,
    }
    for event, event_id in by_event.items():
        record = told(records, event)
        assert (record["event_id"], record["traceparent"]) == (str(event_id), TRACE), both_guards


def test_so_does_what_is_told_of_a_refused_event_and_of_a_pair_that_is_passed_on(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    first, _ = shop.paid()
    shop.paid(student=first.student_id, course=first.course_id)
    processor.process_batch()
    shop.set_status(first, "refunded")
    shop.refund(first)
    head(shop)
    processor.process_batch()
    assert told(records, "purchase_passed_on")["traceparent"] == TRACE
    run(shop, "ALTER TABLE purchases ADD CHECK (amount < 100)")
    shop.paid(amount="100.00")
    head(shop)
    assert processor.process_batch().outcomes() == {Outcome.RETRIED: 1}
    assert told(records, "event_retried")["traceparent"] == TRACE


@pytest.mark.parametrize("headers", NO_TRACES.values(), ids=NO_TRACES)
def test_what_is_no_trace_is_not_told(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]], headers: str | None
) -> None:
    shop.paid(status="pending")
    head(shop, headers)
    assert processor.process_batch().outcomes() == {Outcome.RETRIED: 1}
    assert told(records, "event_retried")["traceparent"] is None


def test_headers_of_others_are_not_read(shop: Shop, database: Database, processor: ProbedProcessor) -> None:
    shop.pay_many(10)
    head(shop)
    trips = RoundTrips(database)
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 10}
    assert not any("traceparent" in sent for sent in trips.statements)


def test_transactions_are_told_with_their_counts_and_summed_up_once_a_beat(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    processor.telemetry.beat()
    shop.pay_many(3)
    processor.process_batch()
    shop.pay_many(2)
    processor.process_batch()
    run(shop, "ALTER TABLE purchases RENAME TO gone")
    shop.pay_many(4)
    with pytest.raises(Exception, match="purchases"):
        processor.process_batch()
    assert [record["created"] for record in records if record["event"] == "batch_committed"] == [3, 2]
    failed = [record for record in records if record["event"] == "transaction_rolled_back"]
    assert [(each["claimed"], each["result"]) for each in failed] == [(0, "rollback"), (4, "rollback")], "fast, careful"
    for _ in range(2):
        processor.telemetry.beat()
    assert [record for record in records if record["event"] == "batches_settled"] == [
        {"event": "batches_settled", "created": 3, "transactions_commit": 1},
        {"event": "batches_settled", "created": 2, "transactions_commit": 1, "transactions_rollback": 1},
    ], "the first batch at once, then what came since"


def test_fallbacks_are_told_and_summed_up(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    run(shop, "DROP INDEX purchases_active_student_course_key")
    shop.pay_many(3)
    processor.process_batch()
    processor.telemetry.beat()
    assert told(records, "constraint_fallback")["claimed"] == 3
    assert told(records, "batches_settled")["constraint_fallbacks"] == 1


def test_every_series_is_there_before_its_first_event(processor: ProbedProcessor) -> None:
    """``rate`` does not see the first value of a new series.

    The alert would miss the first recovery.
    """
    value = processor.telemetry.metrics.registry.get_sample_value
    for outcome in Outcome:
        assert value("outbox_events_total", {"event_type": "PURCHASE_CONFIRMED", "outcome": outcome}) == 0
    assert value("outbox_transactions_total", {"result": "rollback"}) == 0
    assert value("outbox_dead_letters_total", {"reason": "payment_mismatch"}) == 0
    assert value("outbox_database_errors_total", {"class": "pause"}) == 0


def test_a_poll_is_one_that_succeeded(shop: Shop, processor: ProbedProcessor) -> None:
    def since() -> float:
        found = processor.telemetry.metrics.registry.get_sample_value("outbox_since_poll_seconds")
        assert found is not None
        return found

    before = since()
    while since() == before:  # the clock has a grain
        pass
    run(shop, "ALTER TABLE outbox RENAME TO gone")
    grown = since()
    with pytest.raises(Exception, match="outbox"):
        processor.process_batch()
    assert since() > grown
    run(shop, "ALTER TABLE gone RENAME TO outbox")
    grown = since()
    assert not processor.process_batch().batch
    assert since() < grown


def test_the_end_of_a_trouble_is_told_once(
    shop: Shop, processor: ProbedProcessor, records: list[dict[str, Any]]
) -> None:
    """The end is logged whatever the look finds.

    A transaction that is only repeated was no trouble.
    """
    processor.telemetry.trouble(psycopg.errors.DeadlockDetected(), 0.1)
    processor.process_batch()
    assert "resumed" not in [record.get("event") for record in records]
    for _ in range(3):
        processor.telemetry.trouble(psycopg.errors.AdminShutdown(), 0.1)
    for _ in range(2):
        processor.process_batch()
    (told,) = [record for record in records if record.get("event") == "resumed"]
    assert told["seconds"] >= 0
    assert shop.count("outbox") == 0
