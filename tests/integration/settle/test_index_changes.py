"""Two writers of a pair and one change of its index make one purchase, in whatever order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations_with_replacement

import pytest

from outbox_worker.errors import PairTaken
from outbox_worker.model import Guard, Outcome
from outbox_worker.schema.tables import Tables
from tests.support.factories import ProbedProcessor, Shop
from tests.support.guarding import leave_invalid_index, without_index
from tests.support.makers import Connect, MakeDatabase, MakeProcessor
from tests.support.schedules import CHANGES, WRITERS, Stage, all_schedules, at_random, following
from tests.support.watching import on_statement

pytestmark = without_index

TWO = [*combinations_with_replacement(WRITERS, 2)]
THREE = [*combinations_with_replacement(WRITERS, 3)]
SAMPLE, SAMPLE_OF_THREE, LARGE_SAMPLE_OF_THREE = 48, 12, 800


@pytest.fixture
def stage(
    shop: Shop,
    connect: Connect,
    tables: Tables,
    make_database: MakeDatabase,
    make_processor: MakeProcessor,
    pool: ThreadPoolExecutor,
) -> Stage:
    return Stage(shop, connect, tables, make_database, make_processor, pool)


def sample(stage: Stage, many: Sequence[tuple[str, ...]], schedules: int, seed: int) -> None:
    chance = random.Random(seed)
    worlds = [(kinds, change) for kinds in many for change in CHANGES]
    chance.shuffle(worlds)
    for run in range(schedules):
        stage.run(*worlds[run % len(worlds)], at_random(chance))
    assert stage.blocked > schedules / 4, "hardly anybody waited"


def test_two_writers_and_a_change_in_any_order(stage: Stage) -> None:
    sample(stage, TWO, SAMPLE, 13)


def test_three_writers_and_a_change_in_any_order(stage: Stage) -> None:
    sample(stage, THREE, SAMPLE_OF_THREE, 17)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kinds", TWO, ids=" and ".join)
def test_two_writers_and_a_change_in_every_order(
    kinds: tuple[str, str],
    change: str,
    stage: Stage,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run every order, and count them."""
    steps = sum(len(trace) for trace in all_schedules(partial(stage.run, kinds, change)))
    told = f"{' and '.join(kinds)}, {change}: {stage.runs} orders, {steps} steps, {stage.blocked} blocked"
    with capsys.disabled():
        request.config.get_terminal_writer().line(f"\n{told}")
    assert stage.runs > 10


@pytest.mark.slow
def test_three_writers_and_a_change_in_many_orders(stage: Stage) -> None:
    sample(stage, THREE, LARGE_SAMPLE_OF_THREE, 19)


@pytest.mark.parametrize("second", ["by lock", "backfill"])
def test_the_index_is_dropped_between_the_snapshot_of_one_and_the_commit_of_the_other(
    second: str, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One writer uses the index and locks no pair.

    The other writer sees no valid index, takes its snapshot and waits. The first writer commits. No
    transaction that could need the index is left, and the index is dropped. The other writer does
    not see the first purchase. It also does not maintain an index that would refuse the second
    purchase.
    """
    taken: list[str] = []
    monkeypatch.setattr(PairTaken, "__init__", lambda _, told: taken.append(told))
    change = "drop concurrently"
    order = ["by index", "by index", change, second, second, "by index", change, second]
    trace = stage.run(("by index", second), change, following(order))
    assert [name for _, name in trace][: len(order)] == order
    assert len(taken) == 1, "the second purchase was not even written"


def test_only_an_index_that_is_not_valid_costs_a_second_look(
    shop: Shop, processor: ProbedProcessor, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    looks: list[str] = []

    on_statement(processor.database, lambda sent: looks.extend(["look"] if "pair_held" in sent else []))
    shop.paid()
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 1}
    assert (processor.watch.state.guard, looks) == (Guard.LOCK, [])
    leave_invalid_index(shop, connect, pool)
    shop.paid()
    assert processor.process_batch().outcomes() == {Outcome.CREATED: 1}
    assert (processor.watch.state.guard, looks) == (Guard.LOCK, ["look", "look"]), "it was judged, and looked again"
