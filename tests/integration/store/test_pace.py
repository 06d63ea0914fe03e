"""Round trips per batch, and the low-water mark at which a claim begins.

The low-water mark must neither lose nor delay an event.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database
from outbox_worker.model import Outcome
from outbox_worker.settings import load_settings
from tests.support.factories import Shop, drain_all, hold_pair, open_payment
from tests.support.makers import Connect, MakeDatabase, MakeProcessor
from tests.support.proxy import proxied
from tests.support.refusals import NO_TRIGGER, raising, run
from tests.support.trips import RoundTrips


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_a_batch_takes_one_statement_however_large(
    size: int, both_guards: str, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """The happy path stays in the database.

    Under the guard ``lock``, one statement locks, another settles.
    """
    shop.pay_many(size)
    processor = make_processor(batch_size=1000)
    size = min(size, processor.watch.state.lock_capacity) if both_guards == "lock" else size
    trips = RoundTrips(database)
    assert processor.process_batch().outcomes() == {Outcome.CREATED: size}
    assert trips.sent == ["set", "begin", *(["claim"] if both_guards == "lock" else []), "fast", "commit"]


@pytest.mark.parametrize("pooler", ["none", "transaction"])
def test_a_batch_waits_twice_for_the_server(
    pooler: Literal["none", "transaction"], database_url: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    """A batch waits for its statement and for COMMIT. A batch without events ends with ROLLBACK.

    BEGIN and the parameters travel with the statement, but separately behind a pooler.
    """
    with proxied(database_url) as proxy:
        database = Database(load_settings(database_url=proxy.url, pooler=pooler), deadline_seconds=10)
        processor = make_processor(database=database)
        expected = 2 if pooler == "none" else 4
        for _ in range(2):
            shop.pay_many(10)
            processor.process_batch()
        proxy.quiet_seconds = 0.05
        shop.pay_many(10)
        before = proxy.waits
        assert processor.process_batch().outcomes() == {Outcome.CREATED: 10}
        assert proxy.waits - before == expected
        processor._pacing.frontier.go_back()
        assert processor.process_batch().claimed == 0
        assert proxy.waits - before == 2 * expected
        before = proxy.waits
        assert processor.seconds_until_due() > 0
        assert proxy.waits - before == (1 if pooler == "none" else 4), "an idle look"
        database.close()


def test_a_mark_is_looked_at_before_anything_is_written(shop: Shop, database: Database, processor: Any) -> None:
    """The fast statement leaves a marked event.

    It settles the others at once, and the marked event is judged.
    """
    recovered, event = shop.paid(due_in="-1 hour")
    shop.mark(event, "created", recovered.id)
    shop.pay_many(10)
    trips = RoundTrips(database)
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 10, Outcome.RECOVERED: 1}
    assert [sent.count("savepoint") for sent in trips.transactions()] == [0, 1]
    assert "rollback" not in trips.sent


def test_a_batch_is_planned_once_and_for_all(shop: Shop, make_database: Any, make_processor: MakeProcessor) -> None:
    """To plan each time would cost a batch as much as a round trip."""
    shop.pay_many(120)
    database = make_database(connections=1)
    processor = make_processor(batch_size=10, database=database)
    assert drain_all(processor) == {Outcome.CREATED: 120}
    with database.transaction() as session:
        kept = "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement NOT LIKE '%set_config%'"
        plans = session.execute(text(kept)).all()
    assert sum(generic for generic, _ in plans) == 12 + 2, (
        "and two looks in vain: after the last claim, and from the start"
    )
    assert [custom for _, custom in plans] == [0] * len(plans)


def test_behind_a_pooler_nothing_is_prepared(database_url: str, shop: Shop, make_processor: MakeProcessor) -> None:
    """The next transaction can meet another backend without these prepared statements."""
    shop.pay_many(120)
    database = Database(load_settings(database_url=database_url, pooler="transaction"), deadline_seconds=10)
    processor = make_processor(batch_size=10, database=database)
    assert drain_all(processor) == {Outcome.CREATED: 120}
    with database.transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM pg_prepared_statements")) == 0
    database.close()


def test_no_row_travels_on_the_happy_path(shop: Shop, make_processor: MakeProcessor) -> None:
    """Only keys travel to the worker. A payload of a megabyte stays in the database."""
    shop.paid(payload={"note": "x" * 2**20})
    report = make_processor().process_batch()
    assert report.outcomes() == {Outcome.CREATED: 1}
    assert len(repr(report)) < 1000


# --- the low-water mark


def test_a_claim_begins_where_the_last_one_ended_and_then_at_the_beginning(
    shop: Shop, make_processor: MakeProcessor
) -> None:
    shop.pay_many(25)
    processor = make_processor(batch_size=10)
    never_sweep(processor)
    processor._pacing.frontier.start_due = 0.0
    starts = watch_starts(processor)
    processor.process_batch()
    processor._pacing.frontier.start_due = float("inf")
    assert drain_all(processor) == {Outcome.CREATED: 15}
    assert [start is None for start in starts] == [True, False, False, False, True], "before it says that none is left"


def test_a_worker_that_keeps_up_reads_no_dead_entries_twice(
    shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """An old snapshot keeps the index entries of settled events.

    Neither claims nor looks read these entries each time.
    """
    holder = connect()
    holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    holder.execute("SELECT count(*) FROM outbox")
    processor = make_processor(batch_size=1000)
    shop.pay_many(20_000)
    drain_all(processor)
    never_sweep(processor)
    found = {}
    for where in ("at the mark", "from the start"):
        shop.pay_many(5)
        before = pages_read(processor)
        assert processor.process_batch().created == 5
        processor.seconds_until_due()
        found[where] = pages_read(processor) - before
        processor._pacing.frontier.go_back()
    holder.rollback()
    assert found["at the mark"] * 3 < found["from the start"]


def pages_read(processor: Any) -> int:
    """Count the pages of the outbox and its indexes that the processor has read so far."""
    with processor.database.transaction() as session:
        session.execute(text("SELECT pg_stat_force_next_flush()"))
    read = "SELECT heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit FROM pg_statio_user_tables"
    with processor.database.transaction() as session:
        return int(session.scalars(text(f"{read} WHERE relname = 'outbox'")).one())


def watch_starts(processor: Any) -> list[Any]:
    starts: list[Any] = []
    run, claim = processor._fast._run, processor.outbox.claim

    def watched(transaction: Any, wanted: Any, start: Any) -> Any:
        starts.append(start)
        return run(transaction, wanted, start)

    def watched_claim(session: Any, limit: int, until: Any = None, start: Any = None, **besides: Any) -> Any:
        starts.append(start)
        return claim(session, limit, until, start, **besides)

    processor._fast._run, processor.outbox.claim = watched, watched_claim
    return starts


def never_sweep(processor: Any) -> None:
    """Put the next sweep off for ever: only the other rules can find events."""
    processor._pacing.claimed_from_start = lambda *_, **__: None
    processor._pacing.frontier.start_due = float("inf")


def test_what_is_behind_the_mark_waits_for_a_sweep_and_no_longer(
    shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """A producer's transaction stays open while later events are settled.

    Its event is older than the mark.
    """
    late = connect()
    event = open_payment(late)
    shop.pay_many(500)
    processor = make_processor(batch_size=10)
    never_sweep(processor)
    settled: Counter[Outcome] = Counter()
    for turn in range(40):
        if turn == 20:
            late.commit()
        settled += processor.process_batch().outcomes()
        assert shop.outcome_of(event) is None
    processor._pacing.frontier.start_due = 0.0
    settled += processor.process_batch().outcomes()
    assert shop.outcome_of(event) == "created", "the first look from the beginning finds it, before the backlog's rest"
    settled += drain_all(processor)
    assert settled == {Outcome.CREATED: 501}


def test_sweeps_come_by_themselves_while_the_backlog_lasts(
    shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """A late bulk commit is settled long before the backlog that was due after it."""
    late = connect()
    events = [open_payment(late) for _ in range(15)]
    shop.pay_many(20_000)
    processor = make_processor(batch_size=20)
    for _ in range(10):
        processor.process_batch()
    late.commit()
    while any(shop.outcome_of(event) is None for event in events):
        assert processor.process_batch().claimed
    assert shop.count("outbox") > 10_000, "the backlog was not drained first"


def test_a_step_back_of_the_servers_clock_loses_nothing(shop: Shop, make_processor: MakeProcessor) -> None:
    """The clock's step makes later events due before those that were already claimed."""
    shop.pay_many(100)
    processor = make_processor(batch_size=10)
    never_sweep(processor)
    for _ in range(5):
        processor.process_batch()
    for _ in range(30):
        shop.paid(due_in="-1 hour")
    assert drain_all(processor)[Outcome.CREATED] == 80
    assert shop.count("outbox") == 0


def test_events_left_behind_are_not_forgotten(shop: Shop, connect: Connect, make_processor: MakeProcessor) -> None:
    """An event whose pair is locked stays in the outbox. The mark does not pass that event."""
    held, event = shop.paid(due_in="-1 hour")
    shop.purchase(student=held.student_id, course=held.course_id)
    shop.pay_many(50)
    holder = connect()
    hold_pair(holder, held)
    processor = make_processor(batch_size=10)
    processor.set_target(0.0)
    never_sweep(processor)
    starts = watch_starts(processor)
    for _ in range(3):
        processor.process_batch()
    assert starts == [None] * 3
    holder.rollback()
    assert drain_all(processor)[Outcome.DUPLICATE_PAYMENT] == 1
    assert shop.outcome_of(event) == "duplicate_payment"


def test_what_falls_out_is_collected_while_claims_are_full(shop: Shop, make_processor: MakeProcessor) -> None:
    """A careful transaction costs twenty round trips.

    One such transaction settles what the fast statements of several batches left, and forgets no
    event.
    """
    for _ in range(6):
        shop.pay_many(9)
        paid, event = shop.paid()
        shop.mark(event, "created", paid.id)
    processor = make_processor(batch_size=10)
    never_sweep(processor)
    processor.set_target(60.0)
    found = [processor.process_batch().outcomes() for _ in range(7)]
    assert [each[Outcome.RECOVERED] for each in found] == [0, 0, 0, 0, 5, 0, 1]
    assert [each[Outcome.CREATED] for each in found] == [9, 9, 9, 9, 9, 9, 0]
    shop.pay_many(9)
    paid, event = shop.paid()
    shop.mark(event, "created", paid.id)
    shop.pay_many(30)
    processor.set_target(0.0)
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 9, Outcome.RECOVERED: 1}, (
        "nor do they wait for long"
    )


def test_a_batch_that_was_rolled_back_is_claimed_again_from_the_beginning(
    shop: Shop, make_processor: MakeProcessor
) -> None:
    shop.pay_many(80)
    processor = make_processor(batch_size=20)
    never_sweep(processor)
    starts = watch_starts(processor)
    processor.process_batch()
    run(shop, raising("53100", only_bad=False))
    with pytest.raises(DBAPIError):
        processor.process_batch()
    run(shop, NO_TRIGGER)
    fast, careful = starts[-2:]
    assert fast is not None
    assert careful is None
    processor.process_batch()
    assert starts[-1] is None
    assert drain_all(processor) == {Outcome.CREATED: 45}


@pytest.mark.usefixtures("both_guards")
def test_a_queue_behind_more_dead_rows_than_a_statement_can_read_goes_on(
    connect: Connect, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    """A transaction stays open for hours, and no claim from the start ends in time.

    New events are still settled. An old event that appeared late is settled when VACUUM can remove
    the dead rows.
    """
    with connect() as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM payments")
        shop.rows("DROP INDEX outbox_due_idx")  # an index that is built later contains the dead rows, too
        shop.rows(
            "INSERT INTO outbox (event_id, event_type, payload, due_at) SELECT gen_random_uuid(), 'X', '{}',"
            " now() - interval '2 days' - n * interval '1 millisecond' FROM generate_series(1, 800000) AS n"
        )
        shop.rows("DELETE FROM outbox")
        shop.rows("CREATE INDEX outbox_due_idx ON outbox (due_at, id)")
        processor = make_processor(database=make_database(connections=1, deadline_seconds=0.03))
        late, _ = shop.paid(due_in="-2 days")
        for _ in range(3):
            shop.pay_many(10)
            assert drain_all(processor) == {Outcome.CREATED: 10}
            processor._pacing.frontier.go_back()
        assert not shop.purchases(late)
    shop.rows("VACUUM outbox")
    for _ in range(5):
        processor._pacing.frontier.go_back()
        processor.process_batch()
    assert shop.purchases(late)
    assert processor._pacing.frontier.start is None
