"""Confirmations and refunds of one pair in every order, by one worker and by two.

A small model says how each order must end. Many pairs go through their orders at once, one step of
each before the next step. Every pair has two payments, A and B.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest

from outbox_worker.errors import KeyMissing
from outbox_worker.model import PURCHASE_CONFIRMED, PURCHASE_REFUNDED, Outcome
from tests.support.factories import Payment, Shop, drain_all
from tests.support.interleaving import (
    AT_ONCE,
    GATE,
    PATIENCE,
    Steps,
    deadlocks,
    errors,
    poll,
    settle_all,
    stop_insert_of,
    waits_at,
    waits_beside,
)
from tests.support.makers import Connect, MakeDatabase, MakeProcessor
from tests.support.refunding import CONFIRM_A, CONFIRM_B, OPS, REFUND_A, REFUND_B, Op, Pair, check, tell

ORDERS = list(itertools.permutations(OPS))


def histories(cuts: Iterable[int], again: Iterable[int]) -> Iterator[list[list[Op]]]:
    """Return every order of the four events, in steps.

    A worker settles after each step. A step ends after the n-th event if bit n of a cut is set, and
    at the end. Events whose bit in ``again`` is set are delivered once more in the next step.
    """
    for order, cut, twice in itertools.product(ORDERS, cuts, again):
        steps: list[list[Op]] = [[]]
        for place, op in enumerate(order):
            steps[-1].append(op)
            if cut >> place & 1:
                steps.append([])
        steps = [step for step in steps if step]
        delivered = [*(list(step) for step in steps), []]
        for place, op in enumerate(order):
            if twice >> place & 1:
                (of,) = (n for n, step in enumerate(steps) if op in step)
                delivered[of + 1].append(op)
        yield [step for step in delivered if step]


def play(shop: Shop, histories: Iterable[list[list[Op]]], settle: Callable[[], Counter[Outcome]]) -> Counter[Outcome]:
    """Play each history on a pair of its own. Settle and check everything after every step."""
    played = [(Pair(), steps) for steps in histories]
    outcomes: Counter[Outcome] = Counter()
    for n in range(max(len(steps) for _, steps in played)):
        now = [(pair, steps[n]) for pair, steps in played if n < len(steps)]
        tell(shop, [(pair, op) for pair, step in now for op in step])
        outcomes += settle()
        assert shop.count("outbox") == 0
        check(shop, [pair for pair, _ in played], n)
    return outcomes


EVERY_CUT, EVERY_SUBSET = range(8), range(16)
NEVER, ALL = 0, 15


@pytest.mark.parametrize("again", [[NEVER], [ALL]], ids=["once", "each event twice"])
def test_every_order(both_guards: str, again: list[int], shop: Shop, make_processor: MakeProcessor) -> None:
    processor = make_processor()
    outcomes = play(shop, histories(EVERY_CUT, again), lambda: drain_all(processor))
    events = len(ORDERS) * len(EVERY_CUT) * len(OPS) * (1 + bool(again[0]))
    assert outcomes.total() == events
    assert outcomes[Outcome.REVOKED] == events / 2, "every refund, and nothing else"
    assert outcomes.keys() >= {Outcome.CREATED, Outcome.SUPPRESSED, Outcome.DUPLICATE_PAYMENT}
    assert errors(processor) == {}
    assert processor.watch.state.guard == both_guards


@pytest.mark.slow
def test_every_order_with_each_subset_of_events_delivered_again(
    both_guards: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    processor = make_processor()
    play(shop, histories(EVERY_CUT, EVERY_SUBSET), lambda: drain_all(processor))
    assert errors(processor) == {}
    assert processor.watch.state.guard == both_guards


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_order_in_small_batches(
    both_guards: str, batch_size: int, shop: Shop, make_processor: MakeProcessor
) -> None:
    processor = make_processor(batch_size=batch_size)
    play(shop, histories([0, 7], [NEVER]), lambda: drain_all(processor))
    assert errors(processor) == {}
    assert processor.watch.state.guard == both_guards


@pytest.mark.parametrize("careful", [False, True], ids=["fast", "careful"])
def test_every_order_on_either_way(both_guards: str, careful: bool, shop: Shop, make_processor: MakeProcessor) -> None:
    """The careful way, which halves its batches, ends where the fast way does."""
    processor = make_processor()
    processor.is_careful = careful
    play(shop, histories([0, 2, 5, 7], [NEVER]), lambda: drain_all(processor))
    assert processor.watch.state.guard == both_guards


def test_every_order_by_two_workers(
    both_guards: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> None:
    databases = [make_database(connections=1) for _ in range(2)]
    workers = [make_processor(batch_size=16, policy=AT_ONCE, database=database) for database in databases]
    counting = threading.Lock()

    def is_empty() -> bool:
        with counting:
            return shop.count("outbox") == 0

    def settle() -> Counter[Outcome]:
        running = [pool.submit(settle_all, worker, is_empty) for worker in workers]
        return sum((each.result(2 * PATIENCE) for each in running), Counter())

    play(shop, histories(EVERY_CUT, [NEVER, ALL]), settle)
    assert errors(*workers) == {}
    assert {worker.watch.state.guard for worker in workers} == {both_guards}
    assert deadlocks(shop, *databases) == 0


# --- one worker stopped before every statement in turn


def moments(first: str, second: str) -> list[tuple[tuple[Op, ...], Op, Op]]:
    """Return past events, the event in the slow worker's hands, and the event that comes meanwhile.

    The last two have the types ``first`` and ``second``.
    """
    found = {(order[:place], order[place], order[place + 1]) for order in ORDERS for place in range(3)}
    return sorted(each for each in found if (each[1].event_type, each[2].event_type) == (first, second))


@pytest.mark.parametrize("second", [PURCHASE_CONFIRMED, PURCHASE_REFUNDED])
@pytest.mark.parametrize("first", [PURCHASE_CONFIRMED, PURCHASE_REFUNDED])
def test_whatever_the_moment(
    both_guards: str,
    first: str,
    second: str,
    shop: Shop,
    make_database: MakeDatabase,
    make_processor: MakeProcessor,
    pool: ThreadPoolExecutor,
) -> None:
    """Try every two events after every past.

    The second comes while the worker of the first is stopped.
    """
    fast_database = make_database()
    fast = make_processor(policy=AT_ONCE, database=fast_database)
    cases = moments(first, second)

    def prepare() -> list[tuple[Pair, Op]]:
        shop.rows("TRUNCATE processed_events, purchases, payments")
        pairs = [(Pair(), case) for case in cases]
        for place in range(2):
            tell(shop, [(pair, past[place]) for pair, (past, _, _) in pairs if place < len(past)])
            drain_all(fast)
        tell(shop, [(pair, in_hand) for pair, (_, in_hand, _) in pairs])
        return [(pair, then) for pair, (_, _, then) in pairs]

    statements = []
    steps = Steps(shop, fast, lambda: make_processor(policy=AT_ONCE, database=make_database(connections=1)), pool)
    for pairs, statement in steps.through(prepare, lambda pairs: tell(shop, pairs)):
        statements.append(statement)
        assert shop.count("outbox") == 0
        check(shop, [pair for pair, _ in pairs], statement)
    assert statements[-2:] == ["COMMIT", ""]
    assert len(statements) >= (10 if first == PURCHASE_REFUNDED else 6), statements
    assert errors(fast) == {}
    assert fast.watch.state.guard == both_guards
    assert deadlocks(shop, fast_database) == 0


@pytest.mark.parametrize(
    ("past", "in_hand", "then"),
    [
        ([CONFIRM_A], REFUND_A, CONFIRM_B),  # B came after the look for another payment
        ([CONFIRM_A], CONFIRM_B, REFUND_A),  # B is about to be a duplicate of A
        ([], CONFIRM_A, REFUND_A),  # UPDATE, then INSERT: the purchase comes in between and stays
        ([], REFUND_A, CONFIRM_A),
        ([CONFIRM_A, CONFIRM_B], REFUND_A, REFUND_B),  # B gets the pair while it is refunded itself
    ],
)
def test_two_events_alone_whatever_the_moment(
    both_guards: str,
    past: list[Op],
    in_hand: Op,
    then: Op,
    shop: Shop,
    make_database: MakeDatabase,
    make_processor: MakeProcessor,
    pool: ThreadPoolExecutor,
) -> None:
    """Try the most dangerous interleavings with one event per batch.

    No other event sends the batch the careful way.
    """
    fast_database = make_database()
    fast = make_processor(batch_size=1, policy=AT_ONCE, database=fast_database)

    def prepare() -> Pair:
        pair = Pair()
        for op in past:
            tell(shop, [(pair, op)])
            drain_all(fast)
        tell(shop, [(pair, in_hand)])
        return pair

    pairs = []
    steps = Steps(
        shop, fast, lambda: make_processor(batch_size=1, policy=AT_ONCE, database=make_database(connections=1)), pool
    )
    for pair, statement in steps.through(prepare, lambda pair: tell(shop, [(pair, then)])):
        pairs.append(pair)
        check(shop, pairs, statement)
    assert errors(fast) == {}
    assert fast.watch.state.guard == both_guards
    assert deadlocks(shop, fast_database) == 0


# --- the order in which purchases are written

LOW, HIGH, COURSE = UUID(int=1 << 100), UUID(int=2 << 100), UUID(int=7)
SECOND_GATE = GATE + 1


class Two:
    """Two workers, one batch each at a time."""

    def __init__(self, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor) -> None:
        self.databases = [make_database(connections=1), make_database(connections=1)]
        self.one, self.other = (make_processor(policy=AT_ONCE, database=each) for each in self.databases)
        self._shop = shop

    def check(self) -> None:
        drain_all(self.one)
        assert errors(self.one, self.other) == {}
        assert (self._shop.count("outbox"), self._shop.owed(), self._shop.doubled()) == (0, 0, 0)
        assert deadlocks(self._shop, *self.databases) == 0


@pytest.fixture
def two(shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor) -> Two:
    return Two(shop, make_database, make_processor)


def active(shop: Shop, **of_pair: Any) -> Payment:
    payment = shop.payment(**of_pair)
    shop.purchase(payment)
    return payment


def test_confirmations_and_refunds_are_not_written_in_one_transaction(
    shop: Shop, two: Two, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """One worker writes the high pair, then deactivates the low pair.

    The other worker writes the low pair, then the high pair.
    """
    bought, _ = shop.paid(student=LOW, course=COURSE)
    second, _ = shop.paid(student=HIGH, course=COURSE)
    stop_insert_of(shop, second, "BEFORE")
    gate = connect(autocommit=True)
    gate.execute("SELECT pg_advisory_lock(%s)", [GATE])
    upwards = pool.submit(two.other.process_batch)
    poll(lambda: waits_at(shop, GATE), "one worker has written the low pair, and comes to the high one")
    shop.paid(student=HIGH, course=COURSE)
    shop.refund(bought)
    both = pool.submit(two.one.process_batch)
    poll(lambda: both.done() or waits_beside(shop, GATE), "the other is done, or waits for the low pair")
    gate.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    upwards.result(PATIENCE)
    assert both.result(PATIENCE).outcomes() == {Outcome.CREATED: 1, Outcome.REVOKED: 1}, "in one transaction each"
    two.check()
    assert [row.is_active for row in shop.purchases(bought)] == [False]


def test_refunds_are_written_in_the_order_of_purchases(
    shop: Shop, two: Two, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """In claim order the worker of the refunds would lock the high pair and wait for the low pair.

    The other worker has locked the low pair and needs the high pair.
    """
    high = active(shop, student=HIGH, course=COURSE)
    bought, _ = shop.paid(student=LOW, course=COURSE)
    shop.paid(student=HIGH, course=COURSE)
    stop_insert_of(shop, bought, "BEFORE")
    stop_insert_of(shop, bought, "BEFORE", is_active=False, gate=SECOND_GATE)
    gate = connect(autocommit=True)
    gate.execute("SELECT pg_advisory_lock(%s), pg_advisory_lock(%s)", [GATE, SECOND_GATE])
    upwards = pool.submit(two.other.process_batch)
    poll(lambda: waits_at(shop, GATE), "one worker is about to write the low pair")
    shop.refund(high, due_in="-1 hour")
    shop.refund(bought)
    refunding = pool.submit(two.one.process_batch)
    poll(lambda: waits_at(shop, SECOND_GATE), "and so is the other")
    gate.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    poll(lambda: upwards.done() or waits_beside(shop, SECOND_GATE), "the first is done, or waits for the high pair")
    gate.execute("SELECT pg_advisory_unlock(%s)", [SECOND_GATE])
    upwards.result(PATIENCE), refunding.result(PATIENCE)
    two.check()
    assert [row.is_active for row in shop.purchases(bought)] == [False]


def test_who_grants_in_place_of_a_refunded_payment_waits_for_nobody(
    shop: Shop, two: Two, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """Another transaction can be writing a pair that was free before its refund.

    That transaction can still have later pairs to write.
    """
    free = shop.payment("refunded", student=LOW, course=COURSE)
    shop.purchase(free, active=False)
    shop.payment(student=LOW, course=COURSE)  # owed, and no event tells of it
    on_its_way, _ = shop.paid(student=LOW, course=COURSE)
    high = active(shop, student=HIGH, course=COURSE)
    stop_insert_of(shop, on_its_way, "AFTER")
    gate = connect(autocommit=True)
    gate.execute("SELECT pg_advisory_lock(%s)", [GATE])
    upwards = pool.submit(two.other.process_batch)
    poll(lambda: waits_at(shop, GATE), "one worker has written the low pair")
    shop.refund(free)
    shop.refund(high)
    refunding = pool.submit(two.one.process_batch)
    poll(lambda: refunding.done() or waits_beside(shop, GATE), "the other is done, or waits")
    assert refunding.done(), "it waits for the low pair while it holds the high one"
    assert refunding.result().outcomes() == {Outcome.REVOKED: 2}
    gate.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    assert upwards.result(PATIENCE).outcomes() == {Outcome.CREATED: 1}
    two.check()
    assert [row.payment_id for row in shop.purchases(free.pair) if row.is_active] == [on_its_way.id]


# --- both types in one queue


def test_a_queue_in_which_both_types_take_turns(both_guards: str, shop: Shop, make_processor: MakeProcessor) -> None:
    """Each claim settles one type of event and postpones nothing.

    The queue takes hardly more claims than one type alone.
    """
    processor = make_processor(batch_size=20)
    pairs = [Pair() for _ in range(200)]
    tell(shop, [(pair, CONFIRM_A) for pair in pairs])
    drain_all(processor)
    tell(shop, [(pair, op) for pair in pairs for op in (REFUND_A, CONFIRM_B)])
    due = dict(shop.rows("SELECT event_id, due_at FROM outbox"))
    passes = 0
    while (report := processor.process_batch()).claimed:
        passes += 1
        assert report.settled, "a claim in vain"
        left = dict(shop.rows("SELECT event_id, due_at FROM outbox"))
        assert left.items() <= due.items(), "an event was made due later"
    assert passes <= 2 * 400 / 20
    assert shop.rows("SELECT DISTINCT attempts FROM outbox") == []
    check(shop, pairs)
    assert processor.watch.state.guard == both_guards


def test_events_of_no_handler_go_with_either_type(shop: Shop, make_processor: MakeProcessor) -> None:
    shop.confirm(None, event_type="LESSON_WATCHED")
    payment = active(shop)
    shop.refund(payment)
    shop.paid()
    shop.confirm(None, event_type="COFFEE_BREWED")
    processor = make_processor()
    assert processor.process_batch().outcomes() == {Outcome.DEAD: 2, Outcome.REVOKED: 1, Outcome.CREATED: 1}
    assert shop.count("outbox") == 0


def test_trouble_that_only_refunds_meet_keeps_no_confirmation_waiting(
    both_guards: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    """Confirmations are settled between the pauses."""
    refunded = shop.refund(active(shop), due_in="-1 hour")
    processor = make_processor()
    shop.rows("ALTER TABLE purchases DROP CONSTRAINT purchases_payment_id_key")
    for _ in range(3):
        _, confirmed = shop.paid()
        with pytest.raises(KeyMissing):
            processor.process_batch()
        assert shop.outcome_of(confirmed) == "created"
    shop.rows("ALTER TABLE purchases ADD UNIQUE (payment_id)")
    assert drain_all(processor) == {Outcome.REVOKED: 1}
    assert shop.outcome_of(refunded) == "revoked"
    assert processor.watch.state.guard == both_guards


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "at COMMIT"])
def test_a_refund_that_the_database_refuses_keeps_its_turn_until_it_is_found(
    both_guards: str, deferred: bool, shop: Shop, make_processor: MakeProcessor
) -> None:
    """The refund keeps its turn even beside a stream of confirmations."""
    kind, timing = ("CONSTRAINT TRIGGER", "DEFERRABLE INITIALLY DEFERRED") if deferred else ("TRIGGER", "")
    shop.rows("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'")
    shop.rows(
        f"CREATE {kind} refuse AFTER UPDATE ON purchases {timing} FOR EACH ROW"
        " WHEN (NEW.amount = 13) EXECUTE FUNCTION refuse()"
    )
    refused, _ = shop.payment(amount="13"), shop.paid()
    shop.purchase(refused)
    bad, good = shop.refund(refused, due_in="-1 hour"), shop.refund(active(shop))
    processor = make_processor()
    outcomes = processor.process_batch().outcomes() + drain_all(processor)
    assert outcomes == {Outcome.RETRIED: 1, Outcome.REVOKED: 1, Outcome.CREATED: 1}
    assert (shop.event(bad).attempts, shop.outcome_of(good)) == (1, "revoked")
    assert processor.watch.state.guard == both_guards


@pytest.mark.parametrize("batch_size", [3, 1000], ids=["full claims", "short claims"])
def test_a_refund_that_waits_for_its_pair_keeps_no_confirmation_waiting(
    both_guards: str, batch_size: int, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    """A confirmation that waits delays no refund, either.

    The worker does not claim twice in a row the type whose first event cannot be settled.
    """
    held = active(shop)
    holder = connect()
    holder.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"{held.student_id}:{held.course_id}"])
    waits = shop.refund(held, due_in="-1 hour")
    processor = make_processor(batch_size=batch_size)
    for _ in range(10):
        _, refunded = shop.paid(), shop.refund(active(shop))
        _, confirmed = shop.paid()
        for _ in range(6):
            processor.process_batch()
        assert (shop.outcome_of(refunded), shop.outcome_of(confirmed)) == ("revoked", "created")
    assert shop.event(waits).attempts == 0
    holder.rollback()
    shop.make_due()
    assert drain_all(processor) == {Outcome.REVOKED: 1}
    assert processor.watch.state.guard == both_guards
