"""No error, record or metric repeats a value of a payload or row, whatever the server says.

The secret is everywhere a producer can write. The server repeats it in every part of its errors.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from loguru import logger
from prometheus_client import generate_latest
from sqlalchemy.exc import DBAPIError

from outbox_worker.errors import NothingRecorded
from outbox_worker.model import Outcome
from outbox_worker.telemetry.logs import Style, configure_logging
from tests.support.factories import ABSENT, Payment, ProbedProcessor, Shop
from tests.support.processes import finish
from tests.support.refusals import run

SECRET = "hunter2secret"  # noqa: S105 - what must not be found again
LAST = 9
Listen = Callable[[Style], Callable[[], str]]
STYLES: list[Style] = ["json", "console"]
REFUSALS = {
    "check": f"ALTER TABLE purchases ADD CHECK (currency <> '{SECRET}')",
    "foreign key": "CREATE TABLE students (id text PRIMARY KEY);"
    "ALTER TABLE purchases ADD FOREIGN KEY (student_id) REFERENCES students",
    "foreign key at COMMIT": "CREATE TABLE students (id text PRIMARY KEY);"
    "ALTER TABLE purchases ADD FOREIGN KEY (student_id) REFERENCES students DEFERRABLE INITIALLY DEFERRED",
    "unique": "CREATE UNIQUE INDEX whole ON purchases (currency);"
    f"INSERT INTO purchases (student_id, course_id, amount, currency) VALUES ('', gen_random_uuid(), 0, '{SECRET}')",
}
"""What makes the server refuse a row. The server repeats values of the row in its error."""


@pytest.fixture
def listen(capsys: pytest.CaptureFixture[str]) -> Iterator[Listen]:
    """Send records of every level to stderr, in a style.

    Return a function that reads the new records.
    """

    def begin(style: Style) -> Callable[[], str]:
        configure_logging("DEBUG", style)
        return lambda: capsys.readouterr().err

    yield begin
    logger.remove()


@pytest.fixture
def loud(shop: Shop) -> Shop:
    """Make a shop with texts for students and currencies. These texts hold the secret."""
    for table in ("payments", "purchases"):
        run(shop, f"ALTER TABLE {table} ALTER student_id TYPE text, ALTER currency TYPE text")
    return shop


@pytest.mark.parametrize("refusal", sorted(REFUSALS.keys() - {"unique"}))
def test_what_the_server_says_of_a_row_is_not_repeated(
    loud: Shop, processor: ProbedProcessor, listen: Listen, refusal: str
) -> None:
    run(loud, REFUSALS[refusal])
    assert SECRET in what_the_server_says(loud)
    for style in STYLES:
        for attempts in (0, LAST):
            pay_loudly(loud, attempts=attempts)
        heard = listen(style)
        assert processor.process_batch().outcomes() == {Outcome.RETRIED: 1, Outcome.DEAD: 1}
        assert_kept(loud, processor, heard(), "event_retried", "event_buried")


def test_what_the_server_says_of_a_key_that_is_no_events_is_not_repeated(
    loud: Shop, processor: ProbedProcessor, listen: Listen
) -> None:
    run(loud, REFUSALS["unique"])
    assert SECRET in what_the_server_says(loud)
    pay_loudly(loud)
    for style in STYLES:
        heard = listen(style)
        with pytest.raises(NothingRecorded) as raised:
            processor.process_batch()
        processor.telemetry.trouble(raised.value, 1.0)
        assert_kept(loud, processor, heard(), "paused", "transaction_rolled_back")


@pytest.mark.parametrize("state", ["P0001", "22000", "ZZ001"])
def test_what_a_trigger_says_is_not_repeated(
    loud: Shop, processor: ProbedProcessor, listen: Listen, state: str
) -> None:
    raise_loudly(loud, state)
    assert SECRET in what_the_server_says(loud)
    for style in STYLES:
        for attempts in (0, LAST):
            pay_loudly(loud, attempts=attempts)
        loud.pay_many(1)
        heard = listen(style)
        assert processor.process_batch().outcomes() == {Outcome.RETRIED: 1, Outcome.DEAD: 1, Outcome.CREATED: 1}
        assert_kept(loud, processor, heard(), "event_retried", "event_buried")


@pytest.mark.parametrize("state", ["ZZ001", "53100", "57P01", "0A000"])
def test_what_stops_the_worker_is_not_repeated(
    loud: Shop, processor: ProbedProcessor, listen: Listen, state: str
) -> None:
    raise_loudly(loud, state)
    pay_loudly(loud)
    for style in STYLES:
        heard = listen(style)
        with pytest.raises(Exception, match=SECRET) as raised:
            processor.process_batch()
        processor.telemetry.trouble(raised.value, 1.0)
        assert_kept(loud, processor, heard(), "paused", "transaction_rolled_back")


PAYLOADS: dict[str, Any] = {
    **{key: {key: SECRET} for key in ("payment_id", "student_id", "course_id", "amount", "currency")},
    **{f"{key} an object": {key: {SECRET: SECRET}} for key in ("payment_id", "student_id", "amount")},
    "elsewhere": {SECRET: SECRET, "note": [SECRET], "payment_id": ABSENT},
    "no object": json.dumps(SECRET),
}


@pytest.mark.parametrize("style", STYLES)
def test_what_a_payload_says_is_not_repeated(
    loud: Shop, processor: ProbedProcessor, listen: Listen, style: Style
) -> None:
    for payload in PAYLOADS.values():
        loud.paid(payload=payload)
    loud.paid(event_type=SECRET)
    loud.paid(status="pending", payload={"note": SECRET})
    _, reused = loud.paid()
    loud.mark(reused, SECRET, UUID(int=7), event_type=SECRET)
    loud.rows("UPDATE outbox SET headers = jsonb_build_object('note', CAST(%s AS text))", SECRET)
    heard = listen(style)
    assert processor.process_batch().outcomes() == {Outcome.DEAD: len(PAYLOADS) + 2, Outcome.RETRIED: 1}
    assert_kept(loud, processor, heard(), "event_retried", "event_buried")


@pytest.mark.parametrize(
    ("state", "on", "status", "code"),
    [
        ("ZZ001", "TRIGGER refuse BEFORE INSERT ON purchases", "succeeded", 78),
        ("P0001", "CONSTRAINT TRIGGER refuse AFTER UPDATE ON outbox", "pending", 1),
    ],
    ids=["purchases", "outbox"],
)
def test_a_drain_that_gives_up_does_not_repeat_what_stopped_it(
    loud: Shop, database_url: str, state: str, on: str, status: str, code: int
) -> None:
    """The last messages are the worker's own.

    This includes a COMMIT that is refused for no event's fault.
    """
    raise_loudly(loud, state, on)
    pay_loudly(loud, status=status)
    done = finish("run", "--drain", url=database_url, database_deadline_seconds=1, log_level="DEBUG")
    assert done.code == code
    told = done.sentences() if code == 78 else done.record("drain_left_events")["message"]
    assert told.startswith("outbox-worker: " if code == 78 else "1 event is set aside")
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("said", [SECRET, {SECRET: SECRET}, [SECRET], f"00-{SECRET}", SECRET * 10_000])
def test_what_headers_say_is_not_repeated(loud: Shop, processor: ProbedProcessor, listen: Listen, said: Any) -> None:
    """The headers hold the secret, also in the header that is read for a trace."""
    for _ in STYLES:
        loud.paid(status="pending")
        loud.paid(payload="[]")
    loud.rows("UPDATE outbox SET headers = %s", json.dumps({"traceparent": said, "authorization": SECRET}))
    for style in STYLES:
        heard = listen(style)
        loud.make_due()
        processor.process_batch()
        assert_kept(loud, processor, heard(), "event_retried")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("library", ["sqlalchemy.pool.impl.QueuePool", "alembic.runtime", "psycopg", "uvicorn.error"])
def test_what_libraries_say_of_a_row_is_not_repeated(loud: Shop, listen: Listen, style: Style, library: str) -> None:
    run(loud, REFUSALS["check"])
    heard, log = listen(style), partial(logging.getLogger(library).log, logging.ERROR)
    try:
        write_loudly(loud)
    except psycopg.Error as error:
        log("error ignored in %r: %s", loud.connection, error, exc_info=True)
        log(error)
        log("error ignored: %s", {"row": str(error)}, exc_info=DBAPIError("", {}, error))
    records = heard()
    assert records.count("library_record") == 3
    assert records.count("CheckViolation, SQLSTATE 23514") == 4
    assert SECRET not in records


@pytest.mark.parametrize("style", STYLES)
def test_a_record_that_cannot_be_written_takes_nothing_with_it(
    loud: Shop, processor: ProbedProcessor, listen: Listen, style: Style, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker survives a stderr that cannot be written.

    After stderr works again, the worker does not write the server's words of that time.
    """
    raise_loudly(loud, "53100")
    pay_loudly(loud)
    listen(style)
    full = FullDisk()
    monkeypatch.setattr(sys, "stderr", full)
    with pytest.raises(DBAPIError):
        processor.process_batch()
    processor.telemetry.stopping()
    assert "transaction_rolled_back" in full.lost
    assert "worker_stopping" in full.written
    assert SECRET not in full.written


class FullDisk(io.StringIO):
    """A stderr that has no room for the first record."""

    lost = ""

    @property
    def written(self) -> str:
        return self.getvalue()

    def write(self, text: str) -> int:
        if not self.lost:
            self.lost = text
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


# --- helpers


def raise_loudly(shop: Shop, state: str, on: str = "TRIGGER refuse BEFORE INSERT ON purchases") -> None:
    """Make a trigger that repeats the row in MESSAGE, DETAIL, HINT and CONTEXT."""
    timing = "DEFERRABLE INITIALLY DEFERRED" if "CONSTRAINT" in on else ""
    run(
        shop,
        "CREATE FUNCTION tell(said text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN"
        f" RAISE EXCEPTION 'of %', said USING ERRCODE = '{state}', DETAIL = said, HINT = said;"
        " END $$;"
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF CAST(NEW AS text) LIKE '%{SECRET}%' THEN EXECUTE format('SELECT tell(%L)', NEW); END IF;"
        " RETURN NEW; END $$;"
        f"CREATE {on} {timing} FOR EACH ROW EXECUTE FUNCTION refuse()",
    )


def pay_loudly(shop: Shop, **of_event: Any) -> tuple[Payment, UUID]:
    return shop.paid(student=f"{SECRET} {uuid4()}", currency=SECRET, **of_event)


def what_the_server_says(shop: Shop) -> str:
    """Return the server's error for a purchase like those that the worker is going to write."""
    with pytest.raises(psycopg.Error) as raised:
        write_loudly(shop)
    return str(raised.value)


def write_loudly(shop: Shop) -> None:
    shop.rows(
        "INSERT INTO purchases (student_id, course_id, amount, currency) VALUES (%s, gen_random_uuid(), 1, %s)",
        *(SECRET, SECRET),
    )


def assert_kept(shop: Shop, processor: ProbedProcessor, records: str, *events: str) -> None:
    for event in events:
        assert event in records
    told = shop.rows("SELECT last_error FROM outbox")
    told += shop.rows("SELECT event_id, payment_id, reason, detail, actor, note FROM dead_letters")
    told += shop.rows("SELECT * FROM processed_events WHERE outcome <> %s", SECRET)
    metrics = processor.telemetry.metrics
    assert SECRET not in f"{told} {generate_latest(metrics.registry).decode()} {metrics.snapshot()}"
    assert SECRET not in records
