"""The three ways to settle a batch agree with ``decide`` and with each other, on every case.

The ways are the fast statement, the batch in parts, and the judgement of each event. Hypothesis
draws a world of pairs, payments and events. A pair can be held by a purchase. A payment can have a
purchase. An event can have a mark, a dead letter, failed tries and a changed payload. The test
writes the world once for each way, each time with new ids. It works out the expected result from
the drawn world alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import settings as examples

from outbox_worker.decision import decide
from outbox_worker.model import (
    GRANTS,
    PURCHASE_CONFIRMED,
    PURCHASE_REFUNDED,
    Facts,
    Mark,
    Outcome,
    Reason,
    Verdict,
)
from tests.support.factories import ProbedProcessor, Shop
from tests.support.makers import MakeProcessor
from tests.support.settling import VIA_FAST_PATH, judge
from tests.support.worlds import (
    ALONE,
    DIFFERENT,
    FEW,
    MAX_ATTEMPTS,
    REFUNDS_ALONE,
    REFUNDS_TOGETHER,
    STRANGER,
    TOGETHER,
    UNUSABLE,
    PairCase,
    Told,
    write,
)

pytestmark = pytest.mark.usefixtures("both_guards")
MANY = examples(FEW, max_examples=1000, derandomize=False, print_blob=True)


class Way(Enum):
    """How a batch is settled."""

    FAST = 1
    IN_PARTS = 2
    JUDGED = 3


SettleInEachWay = Callable[[list[PairCase]], list[list[Any]]]


@pytest.fixture
def settle_in_each_way(shop: Shop, make_processor: MakeProcessor) -> SettleInEachWay:
    """Write a world, settle it and check it, in each way. Return what became of its events."""
    processors = {way: make_processor() for way in Way}
    make_parts(processors[Way.IN_PARTS])
    processors[Way.JUDGED].is_careful = True

    def settle(world: list[PairCase]) -> list[list[Any]]:
        return [settle_and_check(shop, processor, world, way) for way, processor in processors.items()]

    return settle


def make_parts(processor: ProbedProcessor) -> None:
    """Let the processor settle each batch in at least two parts."""
    settlement, processor.is_careful = processor._settlement, True
    arrange = settlement._arrange

    def halved(*given: Any, **named: Any) -> Any:
        plan, parts = arrange(*given, **named)
        return plan, [half for part in parts for half in part.halves() if half]

    settlement._arrange = halved  # type: ignore[method-assign]


@FEW
@given(world=ALONE)
def test_each_event_alone(world: list[PairCase], settle_in_each_way: SettleInEachWay) -> None:
    fast, in_parts, judged = settle_in_each_way(world)
    assert fast == in_parts == judged


@FEW
@given(world=TOGETHER)
def test_events_of_one_payment_and_payments_of_one_pair(
    world: list[PairCase], settle_in_each_way: SettleInEachWay
) -> None:
    """The ways can differ in which event or payment comes first.

    The order must be a possible one.
    """
    settle_in_each_way(world)


@FEW
@given(world=REFUNDS_ALONE)
def test_each_refund_alone(world: list[PairCase], settle_in_each_way: SettleInEachWay) -> None:
    fast, in_parts, judged = settle_in_each_way(world)
    assert fast == in_parts == judged


@FEW
@given(world=REFUNDS_TOGETHER)
def test_refunds_of_one_payment(world: list[PairCase], settle_in_each_way: SettleInEachWay) -> None:
    settle_in_each_way(world)


@pytest.mark.slow
@MANY
@given(world=ALONE)
def test_each_event_alone_many(world: list[PairCase], settle_in_each_way: SettleInEachWay) -> None:
    fast, in_parts, judged = settle_in_each_way(world)
    assert fast == in_parts == judged


@pytest.mark.slow
@MANY
@given(world=TOGETHER)
def test_events_of_one_payment_and_payments_of_one_pair_many(
    world: list[PairCase], settle_in_each_way: SettleInEachWay
) -> None:
    settle_in_each_way(world)


@pytest.mark.slow
@MANY
@given(world=REFUNDS_ALONE)
def test_each_refund_alone_many(world: list[PairCase], settle_in_each_way: SettleInEachWay) -> None:
    fast, in_parts, judged = settle_in_each_way(world)
    assert fast == in_parts == judged


@pytest.mark.slow
@MANY
@given(world=REFUNDS_TOGETHER)
def test_refunds_of_one_payment_many(world: list[PairCase], settle_in_each_way: SettleInEachWay) -> None:
    settle_in_each_way(world)


# --- what must come of it


def settle_and_check(shop: Shop, processor: ProbedProcessor, world: list[PairCase], way: Way) -> list[Any]:
    told = write(shop, world)
    verdicts = judge(processor)
    assert verdicts.keys() == {one.event_id for one in told}
    after = purchases_of(shop, told)
    found = rows_of(shop, told)
    judged = [(one, verdicts[one.event_id]) for one in told]
    check_grants(judged, after)
    check_revocations(judged, after)
    for one, verdict in judged:
        before, later = decide(facts_before(one)), decide(facts_after(one, after[one.payment.pair]))
        assert said(verdict) in (said(before), said(later)), one
        if len(one.pair.payments) == len(one.of.events) == 1:
            assert said(verdict) == said(before), one
        assert found[one.event_id] == rows_expected(one, verdict), one
    if all(len(pair.payments) == len(pair.payments[0].events) == 1 for pair in world):
        check_way(judged, way)
    return [(said(verdict), found[one.event_id], owners(one, after)) for one, verdict in judged]


def check_way(judged: list[tuple[Told, Verdict]], way: Way) -> None:
    """The fast statement makes exactly the purchases of events without a mark or an open letter."""
    owed = [(one, verdict) for one, verdict in judged if verdict.outcome in GRANTS]
    fast = [way is Way.FAST and is_clean(one, verdict) for one, verdict in owed]
    assert [verdict is VIA_FAST_PATH for _, verdict in owed] == fast


def check_grants(judged: list[tuple[Told, Verdict]], after: dict[tuple[UUID, UUID], list[Any]]) -> None:
    """Every grant made one purchase. Nothing else made an active purchase.

    Each pair that was owed a purchase has one.
    """
    granted = [one for one, verdict in judged if verdict.outcome in GRANTS]
    revoked = {one.payment.id for one, verdict in judged if verdict.outcome is Outcome.REVOKED}
    assert len({one.payment.id for one in granted}) == len(granted), "two events made one purchase"
    for pair, rows in after.items():
        mine = [one for one, _ in judged if one.payment.pair == pair]
        had = {one.payment.id for one in mine if one.of.purchase is not None}
        new = {row.payment_id for row in rows if row.payment_id in {one.payment.id for one in mine}} - had
        left = {one.payment.id for one in mine if one.of.purchase is None} & revoked
        assert new == {one.payment.id for one in granted if one.payment.pair == pair} | left
        assert len(rows) == len(had) + len(new) + (mine[0].pair.holder is not None)
        owed = any(decide(facts_before(one)).outcome in GRANTS for one in mine)
        bought = {one.payment.id for one in mine if one.of.purchase} - revoked
        held = mine[0].pair.holder is not None or bool(bought)
        assert sum(row.is_active for row in rows) == (owed or held)
        assert all((str(row.amount), row.currency) == ("49.90", "EUR") for row in rows if row.payment_id in new)


def check_revocations(judged: list[tuple[Told, Verdict]], after: dict[tuple[UUID, UUID], list[Any]]) -> None:
    """Every refund left its payment an inactive purchase. Nothing else made a purchase inactive."""
    revoked = {one.payment.id for one, verdict in judged if verdict.outcome is Outcome.REVOKED}
    for one, _ in judged:
        own = [row.is_active for row in after[one.payment.pair] if row.payment_id == one.payment.id]
        assert own == [False] or one.payment.id not in revoked
        assert own != [False] or one.payment.id in revoked or one.of.purchase is False


def facts_before(one: Told) -> Facts:
    """Work out the facts of an event before its batch, from what was drawn only."""
    case, unusable = one.case, one.case.payload in UNUSABLE
    whose = {"own": one.payment.id, "stranger": STRANGER, None: None}
    others = [payment for payment in one.pair.payments if payment is not one.of]
    return Facts(
        handled=case.event_type in (PURCHASE_CONFIRMED, PURCHASE_REFUNDED),
        is_refund=case.event_type == PURCHASE_REFUNDED,
        payment_id=None if unusable else one.payment.id,
        mark=Mark(case.mark[0], whose[case.mark[1]]) if case.mark else None,
        purchase_active=one.of.purchase,
        payment_status=one.of.status,
        mismatches=tuple(DIFFERENT.get(case.payload, ())),
        pair_held=one.pair.holder is not None or any(payment.purchase for payment in others),
        last_try=case.attempts + 1 >= MAX_ATTEMPTS,
    )


def facts_after(one: Told, rows: list[Any]) -> Facts:
    """Work out the facts of an event as if it came after the rest of its batch was settled."""
    before = facts_before(one)
    own = [row.is_active for row in rows if row.payment_id == one.payment.id]
    return Facts(
        handled=before.handled,
        is_refund=before.is_refund,
        payment_id=before.payment_id,
        mark=before.mark,
        purchase_active=any(own) if own else None,
        payment_status=before.payment_status,
        mismatches=before.mismatches,
        pair_held=any(row.is_active for row in rows if row.payment_id != one.payment.id),
        last_try=before.last_try,
    )


def is_clean(one: Told, verdict: Verdict) -> bool:
    return verdict.outcome is Outcome.CREATED and one.case.mark is None and one.case.letter != "open"


def said(verdict: Verdict) -> tuple[Outcome, Reason | None, str]:
    return verdict.outcome, verdict.reason, verdict.detail


class Rows(NamedTuple):
    """What became of one event, without ids and times that differ between two worlds."""

    outbox: tuple[int, str] | None
    """Failed tries and the last error."""
    mark: tuple[str, str | None, bool] | None
    """Outcome, whose payment, whether recovered."""
    letter: tuple[str, str, int, str | None, bool] | None
    """State, reason, failed tries, whose payment, whether resolved."""


def rows_of(shop: Shop, told: Sequence[Told]) -> dict[UUID, Rows]:
    """Return the rows of each event. An event has at most one row in each table."""
    events = [one.event_id for one in told]
    outbox, marks, letters = (
        {row.event_id: row for row in shop.rows(f"SELECT * FROM {table} WHERE event_id = ANY(%s)", events)}
        for table in ("outbox", "processed_events", "dead_letters")
    )
    found = {}
    for one in told:
        whose = {one.payment.id: "own", STRANGER: "stranger", None: None}
        event, mark, letter = (rows.get(one.event_id) for rows in (outbox, marks, letters))
        found[one.event_id] = Rows(
            event and (event.attempts, event.last_error),
            mark and (mark.outcome, whose[mark.payment_id], mark.recovered_at is not None),
            letter
            and (
                letter.state,
                letter.reason,
                letter.attempts,
                whose[letter.payment_id],
                letter.resolved_at is not None,
            ),
        )
    return found


def purchases_of(shop: Shop, told: Sequence[Told]) -> dict[tuple[UUID, UUID], list[Any]]:
    """Return the purchases of each pair, the oldest first."""
    found: dict[tuple[UUID, UUID], list[Any]] = {one.payment.pair: [] for one in told}
    students = [student for student, _ in found]
    for row in shop.rows("SELECT * FROM purchases WHERE student_id = ANY(%s) ORDER BY created_at", students):
        found[row.student_id, row.course_id].append(row)
    return found


def rows_expected(one: Told, verdict: Verdict) -> Rows:
    case = one.case
    mark = (*case.mark, False) if case.mark else None
    letter = (case.letter, "payment_not_found", 7, "own", case.letter != "open") if case.letter else None
    if verdict.outcome is Outcome.RETRIED:
        return Rows((case.attempts + 1, f"{verdict.reason}: {verdict.detail}"), mark, letter)
    if verdict.outcome is Outcome.DEAD:
        whose = None if case.payload in UNUSABLE else "own"
        return Rows(None, mark, ("open", str(verdict.reason), case.attempts + 1, whose, False))
    kept = case.mark[0] if case.mark and verdict.outcome not in GRANTS else str(verdict.outcome)
    if letter and case.letter == "open":
        letter = ("settled", "payment_not_found", 7, "own", True)
    return Rows(None, (kept, "own", verdict.outcome is Outcome.RECOVERED), letter)


def owners(one: Told, after: dict[tuple[UUID, UUID], list[Any]]) -> list[tuple[bool, bool]]:
    """Tell of each purchase of the event's pair: is it of the event's payment, and is it active?"""
    return [(row.payment_id == one.payment.id, row.is_active) for row in after[one.payment.pair]]
