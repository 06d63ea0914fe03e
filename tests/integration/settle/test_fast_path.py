"""The fast statement: what it settles, what it leaves, what others commit after its snapshot."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import outbox_worker
from outbox_worker.database.direct import Direct
from outbox_worker.database.engine import Database
from outbox_worker.model import Latencies, Outcome
from outbox_worker.telemetry.metrics import SECONDS, BulkHistogram
from tests.support.factories import Clerk, ProbedProcessor, Shop, drain_all
from tests.support.interleaving import GATE, PATIENCE, poll, stop_insert_of, waits_at
from tests.support.makers import Connect, MakeDatabase, MakeProcessor
from tests.support.settling import settle
from tests.support.trips import RoundTrips

OURS = Path(outbox_worker.__file__).parent


# --- what it settles, and what it leaves


def test_two_deliveries_of_one_payment_in_one_claim(both_guards: str, shop: Shop, processor: ProbedProcessor) -> None:
    """One of the two events made the purchase. The other event is judged."""
    payment, first = shop.paid()
    second = shop.confirm(payment)
    assert settle(processor) == {first: Outcome.CREATED, second: Outcome.ALREADY_EXISTS}
    assert (shop.count("purchases"), shop.count("processed_events"), shop.count("outbox")) == (1, 2, 0)
    assert processor.watch.state.guard == both_guards


def test_two_payments_of_one_pair_in_one_claim(both_guards: str, shop: Shop, processor: ProbedProcessor) -> None:
    payment, first = shop.paid()
    _, second = shop.paid(student=payment.student_id, course=payment.course_id)
    assert settle(processor) == {first: Outcome.CREATED, second: Outcome.DUPLICATE_PAYMENT}
    assert shop.doubled() == 0
    assert processor.watch.state.guard == both_guards


def test_a_refund_beside_confirmations_is_settled_in_the_same_call(
    both_guards: str, shop: Shop, database: Database, processor: ProbedProcessor
) -> None:
    payment = shop.payment()
    shop.purchase(payment)
    shop.refund(payment)
    shop.pay_many(5)
    trips = RoundTrips(database)
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 5, Outcome.REVOKED: 1}
    assert len(trips.transactions()) == 2
    assert processor.watch.state.guard == both_guards


@pytest.mark.parametrize("body", ["NEW.is_active := false;", "NEW.payment_id := gen_random_uuid();"])
def test_a_purchase_that_a_new_trigger_changes_is_not_told_as_created(
    shop: Shop, processor: ProbedProcessor, body: str
) -> None:
    """The worker does not know the trigger yet. The numbers of rows differ.

    Therefore the worker repeats the batch carefully.
    """
    _, event = shop.paid()
    shop.rows(
        f"CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$;"
        "CREATE TRIGGER change BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION change()"
    )
    assert settle(processor) == {event: Outcome.RETRIED}
    assert (shop.purchases(), shop.mark_of(event)) == ([], None)
    assert "a trigger" in shop.event(event).last_error


def test_a_row_whose_removal_is_swallowed_holds_no_neighbour_up(shop: Shop, processor: ProbedProcessor) -> None:
    _, odd = shop.paid()
    neighbours = [shop.paid()[1] for _ in range(5)]
    number = shop.event(odd).id
    shop.rows(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN IF OLD.id = {number} THEN RETURN NULL; END IF; RETURN OLD; END $$;"
        "CREATE TRIGGER keep BEFORE DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION keep()"
    )
    assert settle(processor) == dict.fromkeys(neighbours, Outcome.CREATED)
    assert list(processor._pacing.set_aside.ids) == [number]


# --- what others commit after its snapshot


def test_a_refund_after_its_snapshot_and_before_its_insert(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """The statement found no obstacle.

    Meanwhile the refund writes an inactive purchase of the same payment.
    """
    payment, event = shop.paid()
    one, other = (make_processor(database=make_database()) for _ in range(2))
    stop_insert_of(shop, payment, "BEFORE")
    gate = connect(autocommit=True)
    gate.execute("SELECT pg_advisory_lock(%s)", [GATE])
    confirming = pool.submit(one.process_batch)
    poll(lambda: waits_at(shop, GATE), "the statement has looked, and is about to write")
    shop.refund(payment)
    assert other.process_batch().outcomes() == {Outcome.REVOKED: 1}
    gate.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    assert confirming.result(PATIENCE).outcomes() == {Outcome.SUPPRESSED: 1}
    assert [row.is_active for row in shop.purchases(payment)] == [False]
    assert shop.outcome_of(event) == "suppressed"


@pytest.fixture
def before_the_lock(
    shop: Shop, clerk: Clerk, connect: Connect, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> Callable[[UUID, Callable[[], object]], Any]:
    """Run an action after a batch has read an event and before it locks the row of the event.

    A policy of row security runs the action.
    """
    processor = make_processor(database=clerk.database)
    gate = connect(autocommit=True)
    shop.rows("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")

    def settle_around(event: UUID, happens: Callable[[], object]) -> Any:
        shop.rows(
            "CREATE FUNCTION stand(event uuid) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$ BEGIN"
            f" IF event = '{event}' THEN PERFORM pg_advisory_xact_lock_shared({GATE}); END IF; RETURN true; END $$"
        )
        shop.rows("CREATE POLICY stand ON outbox USING (stand(event_id)) WITH CHECK (true)")
        gate.execute("SELECT pg_advisory_lock(%s)", [GATE])
        batch = pool.submit(processor.process_batch)
        poll(lambda: waits_at(shop, GATE), "the batch has its snapshot")
        happens()
        gate.execute("SELECT pg_advisory_unlock(%s)", [GATE])
        outcomes = batch.result(PATIENCE).outcomes()
        shop.rows("DROP POLICY stand ON outbox")
        shop.rows("ALTER TABLE outbox DISABLE ROW LEVEL SECURITY")
        return outcomes, processor

    return settle_around


@pytest.mark.parametrize("seconds", [-3600, -1, 3600], ids=["still the first", "still due", "due later"])
def test_an_event_that_is_postponed_before_its_row_is_locked(
    shop: Shop, before_the_lock: Callable[..., Any], seconds: int
) -> None:
    """If the event is still due, it is claimed with its new due time.

    The row of the event must be removed, too.
    """
    payment, event = shop.paid(due_in="-10 minutes")
    neighbour = shop.paid(due_in="-5 minutes")[1]

    def postpone() -> None:
        shop.rows(
            "UPDATE outbox SET due_at = clock_timestamp() + %s * interval '1 s' WHERE event_id = %s", seconds, event
        )

    outcomes, _ = before_the_lock(event, postpone)
    assert outcomes == {Outcome.CREATED: 1 if seconds > 0 else 2}
    assert (shop.event(event) is None, len(shop.purchases(payment))) == (seconds < 0, int(seconds < 0))
    assert shop.outcome_of(neighbour) == "created"


@pytest.mark.parametrize("how", ["settled", "deleted", "redelivered"])
def test_an_event_that_is_gone_before_its_row_is_locked(
    shop: Shop, before_the_lock: Callable[..., Any], make_processor: MakeProcessor, how: str
) -> None:
    payment, event = shop.paid(due_in="-10 minutes")
    other = make_processor()

    def go() -> None:
        if how == "settled":
            assert drain_all(other) == {Outcome.CREATED: 1}
            return
        shop.rows("DELETE FROM outbox WHERE event_id = %s", event)
        if how == "redelivered":
            shop.confirm(payment, event)

    outcomes, processor = before_the_lock(event, go)
    assert outcomes == {}
    assert drain_all(processor) == ({Outcome.CREATED: 1} if how == "redelivered" else {})
    assert len(shop.purchases(payment)) == (how != "deleted")
    assert shop.count("outbox") == 0


# --- what the worker reports


def test_the_latencies_that_the_database_counts_are_those_that_python_counts() -> None:
    """A value that equals the upper bound of a bucket belongs to that bucket."""
    values = [0.0, 0.004, *SECONDS, *(bound + 0.001 for bound in SECONDS), 1e6]
    one, other = (BulkHistogram("seconds", "seconds", SECONDS) for _ in range(2))
    one.observe_all(values)
    counted = [(sum(value <= bound for bound in SECONDS), 1) for value in values]
    other.observe_counts(Latencies(counted, sum(values)))
    assert samples(one) == samples(other)


@pytest.mark.parametrize("late", ["0.005", "0.00500001", "1", "3600", "3601", "86400"])
def test_the_buckets_of_the_statement_hold_their_bounds(shop: Shop, late: str) -> None:
    """``width_bucket`` alone would count a value that equals a bound in the next bucket."""
    thresholds = ", ".join(str(-float(bound)) for bound in reversed(SECONDS))
    found = shop.scalar(f"SELECT width_bucket(-CAST(%s AS float8), CAST(ARRAY[{thresholds}] AS float8[]))", late)
    assert found == sum(float(late) <= bound for bound in SECONDS)


def samples(histogram: BulkHistogram) -> list[tuple[str, float]]:
    (family,) = histogram.collect()
    return [(str(sample.labels), round(sample.value, 6)) for sample in family.samples]


def test_latencies_are_told_once_per_settled_event(shop: Shop, processor: ProbedProcessor) -> None:
    shop.pay_many(3, due_in="-20 seconds")
    processor.process_batch()
    registry = processor.telemetry.metrics.registry
    name = "outbox_settle_latency_seconds"
    assert registry.get_sample_value(f"{name}_count") == 3
    assert registry.get_sample_value(f"{name}_bucket", {"le": "10.0"}) == 0
    assert registry.get_sample_value(f"{name}_bucket", {"le": "30.0"}) == 3
    assert 60 <= (registry.get_sample_value(f"{name}_sum") or 0) < 75


# --- the path


def test_few_frames_and_files_lie_between_a_batch_and_its_statement(
    both_guards: str, shop: Shop, processor: ProbedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most ten frames of the worker's code in six files, and the calls enter no file twice."""
    shop.pay_many(1)
    stacks: list[list[str]] = []
    fetch = Direct.fetch

    def note(self: Direct, *given: Any) -> Any:
        frames = [Path(frame.filename) for frame in traceback.extract_stack()]
        stacks.append([frame.relative_to(OURS).as_posix() for frame in frames if frame.is_relative_to(OURS)])
        return fetch(self, *given)

    monkeypatch.setattr(Direct, "fetch", note)
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 1}
    assert len(stacks) == (1 if both_guards == "index" else 2)
    for stack in stacks:
        assert stack[0] == "settle/processor.py"
        assert len(stack) + 1 <= 10
        entered = [after for before, after in pairwise(["", *stack, "database/direct.py"]) if after != before]
        assert len(entered) == len(set(entered)) <= 6
