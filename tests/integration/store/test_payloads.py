"""A payload of any content, in any type of column, decides only about its own event.

Columns of json and text can hold what jsonb refuses: NUL, lone surrogates, NaN, and texts that are
no JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from loguru import logger
from psycopg.types.string import TextLoader

from outbox_worker.database.engine import Database
from outbox_worker.model import Outcome, Reason
from outbox_worker.reconcile.audit import Audit
from outbox_worker.schema.tables import Tables
from outbox_worker.store.payload import LONGEST_DOCUMENT
from tests.support.factories import ProbedProcessor, Shop, drain_all
from tests.support.makers import MakeProcessor
from tests.support.payloads import CANARY, EVERYTHING, NO_OBJECT, TYPES, document, put, retype

EACH = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
FEW = examples(max_examples=40, derandomize=True, **EACH)  # type: ignore[arg-type]
MANY = examples(max_examples=500, print_blob=True, **EACH)  # type: ignore[arg-type]
LONGEST_LIST = 20


@pytest.fixture(params=TYPES)
def column(request: pytest.FixtureRequest, shop: Shop) -> str:
    """Change the type of outbox.payload to this type, and return its name."""
    kind: str = request.param
    shop.connection.adapters.register_loader("jsonb", TextLoader)  # Python cannot decode all of it
    retype(shop, kind)
    return kind


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Collect all log records with their bound values."""
    records: list[str] = []
    sink = logger.add(records.append, level="DEBUG", format="{message} {extra}", diagnose=True)
    yield records
    logger.remove(sink)


def kept(shop: Shop, event_id: UUID) -> str:
    """Return the payload of the dead letter: a document as it was written, or jsonb's form."""
    text: str = shop.scalar(
        "SELECT CASE jsonb_typeof(payload) WHEN 'string' THEN payload #>> '{}' ELSE payload::text END"
        " FROM dead_letters WHERE event_id = %s",
        event_id,
    )
    return text


def test_what_no_rule_reads_matters_in_no_type(
    column: str, shop: Shop, make_processor: MakeProcessor, said: list[str]
) -> None:
    taken = {}
    for name, value in EVERYTHING.items():
        payment = shop.payment()
        if event := put(shop, column, document(payment, extra=value, note=f'"{CANARY}"')):
            taken[name] = payment, event
    assert set(taken) == set(EVERYTHING) if column != "jsonb" else set(taken) >= {"deep", "many digits"}
    assert drain_all(make_processor()) == {Outcome.CREATED: len(taken)}
    assert all(len(shop.purchases(payment)) == 1 for payment, _ in taken.values())
    assert CANARY not in "".join(said)


@pytest.mark.parametrize("key", ["payment_id", "student_id", "course_id", "amount", "currency"])
def test_a_key_that_holds_evil_is_this_events_matter_alone(
    key: str, column: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    reason = Reason.INVALID_PAYLOAD if key == "payment_id" else Reason.PAYMENT_MISMATCH
    good = [shop.payment() for _ in EVERYTHING]
    evil = {}
    for payment, value in zip(good, EVERYTHING.values(), strict=True):
        if event := put(shop, column, document(shop.payment(), **{key: value})):
            evil[event] = value
        put(shop, column, document(payment))
    assert drain_all(make_processor()) == {Outcome.CREATED: len(good), Outcome.DEAD: len(evil)}
    for event in evil:
        letter = shop.letter_of(event)
        assert (letter.reason, letter.state) == (reason, "open")


@pytest.mark.parametrize("column", ["text"], indirect=True)
def test_what_is_no_json_is_buried_as_it_was(
    column: str, shop: Shop, make_processor: MakeProcessor, said: list[str]
) -> None:
    marked = [text.replace('{"', f'{{"{CANARY}": 1, "', 1) for text in NO_OBJECT.values()]
    texts = [text.replace("%s", str(shop.payment().id)) for text in marked]
    events = {put(shop, column, text): text for text in texts}
    good = put(shop, column, document(shop.payment()))
    assert drain_all(make_processor()) == {Outcome.CREATED: 1, Outcome.DEAD: len(texts)}
    assert shop.outcome_of(good or uuid4()) == "created"
    for event, text in events.items():
        assert event is not None
        assert shop.letter_of(event).reason == Reason.INVALID_PAYLOAD
        assert kept(shop, event) == text
    buried = [record for record in said if "event_buried" in record]
    assert len(buried) == len(texts)
    assert CANARY not in "".join(said)


def test_of_a_key_that_stands_twice_the_last_counts(column: str, shop: Shop, make_processor: MakeProcessor) -> None:
    payment = shop.payment()
    put(shop, column, f'{{"payment_id": 1, "amount": "1.00", {document(payment)[1:]}')
    assert drain_all(make_processor()) == {Outcome.CREATED: 1}


def test_numbers_are_compared_as_numbers(column: str, shop: Shop, make_processor: MakeProcessor) -> None:
    payments = [shop.payment(amount="49.90") for _ in range(3)]
    for payment, amount in zip(payments, ("4.99e1", "49.9", "49.900000000000000000001"), strict=True):
        put(shop, column, document(payment, amount=amount))
    assert drain_all(make_processor()) == {Outcome.CREATED: 2, Outcome.DEAD: 1}


def test_a_type_that_nobody_handles_is_buried_unread(column: str, shop: Shop, make_processor: MakeProcessor) -> None:
    events = [put(shop, column, document(shop.payment(), x=each), CANARY + "\n\x1b[0m") for each in EVERYTHING.values()]
    taken = [event for event in events if event]
    assert drain_all(make_processor()) == {Outcome.DEAD: len(taken)}
    assert {shop.letter_of(event).reason for event in taken} == {Reason.UNSUPPORTED_EVENT_TYPE}


def test_a_long_payload(column: str, shop: Shop, make_processor: MakeProcessor) -> None:
    """jsonb is read inside the database. A document that is too long to fetch is buried."""
    long, within = shop.payment(), shop.payment()
    put(shop, column, document(within, x=f'"{"x" * (LONGEST_DOCUMENT - 1000)}"'))
    event = put(shop, column, document(long, x=f'"{"x" * 50_000_000}"'))
    put(shop, column, document(shop.payment()))
    outcomes = drain_all(make_processor())
    if column == "jsonb":
        assert outcomes == {Outcome.CREATED: 3}
        return
    assert outcomes == {Outcome.CREATED: 2, Outcome.DEAD: 1}
    assert event is not None
    assert shop.letter_of(event).reason == Reason.INVALID_PAYLOAD
    assert len(kept(shop, event)) > 50_000_000


def test_refused_events_among_documents_are_found(column: str, shop: Shop, make_processor: MakeProcessor) -> None:
    """The careful path, too, knows the values of the documents."""
    shop.rows("ALTER TABLE purchases ADD CHECK (amount < 1000)")
    for number in range(40):
        put(shop, column, document(shop.payment(amount="1000.00" if number == 7 else "49.90")))
    put(shop, column, document(shop.payment(), amount="1"))
    report = make_processor().process_batch()
    assert report.outcomes() == {Outcome.CREATED: 39, Outcome.RETRIED: 1, Outcome.DEAD: 1}


def test_the_audit_sees_what_is_in_flight(column: str, shop: Shop, database: Database, tables: Tables) -> None:
    payments = [shop.payment() for _ in EVERYTHING]
    for payment, value in zip(payments, EVERYTHING.values(), strict=True):
        put(shop, column, document(payment, x=value))
    if column == "text":
        for text in NO_OBJECT.values():
            put(shop, column, text)
    waiting = shop.count("outbox") - (len(NO_OBJECT) if column == "text" else 0)
    report = Audit.start(database, tables).run()
    assert report.counts["in_flight"] == waiting  # type: ignore[index]
    assert len(report.unexplained) == len(payments) - waiting


# --- generated


class Case(NamedTuple):
    """A payload. PAYMENT, STUDENT and COURSE in it are placeholders for ids of a payment."""

    document: str
    outcome: Outcome | None
    """None: any outcome is right."""


right = {"payment_id": "PAYMENT", "student_id": "STUDENT", "course_id": "COURSE", "amount": "49.90", "currency": "EUR"}
"""The generator must not draw these keys and values by chance.

It also draws constants of the code.
"""

strings = st.text().filter(lambda text: text not in right.values())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings | st.just(CANARY),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw payloads with the right keys among other data.

    Some keys are left out, some values are replaced, and some texts are broken.
    """
    said: dict[str, Any] = draw(
        st.dictionaries(st.text(max_size=12).filter(lambda key: key not in right), values, max_size=4)
    )
    said |= {key: value for key, value in right.items() if key == "payment_id" or draw(st.integers(0, 3))}
    replaced = draw(st.sampled_from([None] * 6 + list(right)))
    if replaced:
        said[replaced] = draw(values)
    text = json.dumps(said, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    text = text.encode(errors="replace").decode().replace("\0", "")
    match draw(st.integers(0, 9)):
        case 0:
            at = draw(st.integers(0, len(text)))
            return Case(text[:at] + draw(st.sampled_from(['"', "{", "}", "\\", ",", "\\u0000", "é"])) + text[at:], None)
        case 1:
            return Case(text[: draw(st.integers(0, len(text)))], None)
    return Case(text, expected(said, replaced, text))


def expected(said: dict[str, Any], replaced: str | None, text: str) -> Outcome | None:
    """Derive the outcome from the drawn values by the rules, not from the text."""
    if "NaN" in text or "Infinity" in text or '"PAYMENT"' not in text:
        return None if replaced != "payment_id" or "PAYMENT" in text else Outcome.DEAD
    may_be_the_same = replaced == "amount" and isinstance(said[replaced], int | float | str)
    differs = replaced is not None and said[replaced] is not None
    return None if may_be_the_same else Outcome.DEAD if differs else Outcome.CREATED


def settle_cases(shop: Shop, column: str, processor: ProbedProcessor, drawn: list[Case], said: list[str]) -> None:
    said.clear()
    told = []
    for case in drawn:
        payment, neighbour = shop.payment(), shop.payment()
        text = case.document.replace("PAYMENT", str(payment.id)).replace("STUDENT", str(payment.student_id))
        event = put(shop, column, text.replace("COURSE", str(payment.course_id)))
        told.append((case, event, neighbour, put(shop, column, document(neighbour))))
    drain_all(processor)
    assert shop.count("outbox") == 0
    for case, event, neighbour, others in told:
        assert others is not None
        assert shop.outcome_of(others) == "created", neighbour
        if event is None:
            continue
        letter, outcome = shop.letter_of(event), shop.outcome_of(event)
        assert (letter is None) != (outcome is None)
        if case.outcome is not None:
            assert (outcome or "dead") == case.outcome, case.document
    assert CANARY not in "".join(said)
    buried = sum("event_buried" in record for record in said)
    assert buried == sum(bool(event and shop.letter_of(event)) for _, event, _, _ in told)


def check_generated(
    shop: Shop, column: str, processor: ProbedProcessor, said: list[str], effort: Callable[..., Any]
) -> int:
    """Return how many cases were tried."""
    tried = 0

    @effort
    @given(st.lists(cases(), min_size=5, max_size=LONGEST_LIST))
    def check(drawn: list[Case]) -> None:
        nonlocal tried
        tried += len(drawn)
        settle_cases(shop, column, processor, drawn, said)

    check()
    return tried


def test_generated_payloads(column: str, shop: Shop, processor: ProbedProcessor, said: list[str]) -> None:
    """All types together try more than 500 cases."""
    assert check_generated(shop, column, processor, said, FEW) > 200


@pytest.mark.slow
def test_ten_thousand_generated_payloads(column: str, shop: Shop, processor: ProbedProcessor, said: list[str]) -> None:
    assert check_generated(shop, column, processor, said, MANY) > 10_000 // len(TYPES)
