"""Every command, from `migrate` on, in a shop with integer or text ids of payments and events."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from tests.support.processes import Finished, finish
from tests.support.servers import libpq


@dataclass(frozen=True)
class Made:
    """A shop that another application made: its tables, and its n-th id of a payment or event."""

    payments: str
    outbox: str
    id: Callable[[int], Any]
    types: tuple[str, str, str, str]
    """The types of four columns.

    They are purchases.payment_id, processed_events.event_id, dead_letters.event_id and
    dead_letters.payment_id.
    """


SHOPS = {
    "integers": Made(
        "CREATE TABLE payments (id integer PRIMARY KEY, student_id bigint NOT NULL, course_id integer NOT NULL,"
        " amount numeric(10,2) NOT NULL, currency varchar(3) NOT NULL, status varchar(20) NOT NULL,"
        " created_at timestamptz NOT NULL DEFAULT now())",
        "CREATE TABLE outbox (id bigserial PRIMARY KEY, event_id bigint UNIQUE NOT NULL, event_type text NOT NULL,"
        " payload jsonb NOT NULL, headers jsonb, created_at timestamptz NOT NULL DEFAULT now(),"
        " due_at timestamptz NOT NULL DEFAULT now(), attempts int NOT NULL DEFAULT 0, crashes int NOT NULL DEFAULT 0,"
        " last_error text)",
        lambda number: number,
        ("bigint", "bigint", "bigint", "bigint"),
    ),
    "texts": Made(
        'CREATE TABLE payments (id varchar(30) COLLATE "C" PRIMARY KEY, student_id text NOT NULL, course_id text'
        " NOT NULL, amount numeric(10,2) NOT NULL, currency text NOT NULL, status text NOT NULL,"
        " created_at timestamptz NOT NULL DEFAULT now())",
        "CREATE TABLE outbox (id bigserial PRIMARY KEY, event_id text UNIQUE NOT NULL, event_type text NOT NULL,"
        " payload jsonb NOT NULL, headers jsonb, created_at timestamptz NOT NULL DEFAULT now(),"
        " due_at timestamptz NOT NULL DEFAULT now(), attempts int NOT NULL DEFAULT 0, crashes int NOT NULL DEFAULT 0,"
        " last_error text)",
        lambda number: f"clx{number:04d}, 'q' \"x\"",
        ("text", "text", "text", "text"),
    ),
}
COPIES = ("purchases payment_id", "processed_events event_id", "dead_letters event_id", "dead_letters payment_id")


class Worker:
    """Runs the commands on one database."""

    def __init__(self, url: str, made: Made, connection: psycopg.Connection[Any]) -> None:
        self.url, self.made, self.connection = url, made, connection

    def run(self, *arguments: str, code: int = 0) -> Finished:
        done = finish(*arguments, url=self.url)
        assert done.code == code, done.stderr
        return done

    def ask(self, *arguments: str, code: int = 0) -> Any:
        at = arguments.index("--") if "--" in arguments else len(arguments)
        return json.loads(self.run(*arguments[:at], "--json", *arguments[at:], code=code).stdout)

    def pay(self, number: int, status: str = "succeeded", pair: int | None = None, ago: str = "1 hour") -> str:
        """Write a payment and return its id as text."""
        self.connection.execute(
            "INSERT INTO payments (id, student_id, course_id, amount, currency, status, created_at)"
            " VALUES (%s, %s, 7, 49.9, 'EUR', %s, now() - CAST(%s AS interval))",
            [self.made.id(number), pair or number, status, ago],
        )
        return str(self.made.id(number))

    def tell(self, number: int, event: int, event_type: str = "PURCHASE_CONFIRMED") -> str:
        """Write an event of a payment and return its id as text."""
        self.connection.execute(
            "INSERT INTO outbox (event_id, event_type, payload) VALUES (%s, %s, CAST(%s AS jsonb))",
            [self.made.id(event), event_type, json.dumps({"payment_id": self.made.id(number)})],
        )
        return str(self.made.id(event))


@pytest.fixture(params=SHOPS)
def unmigrated(request: pytest.FixtureRequest, make_url: Callable[[str | None], str]) -> Iterator[Worker]:
    made, url = SHOPS[request.param], make_url(None)
    with psycopg.connect(libpq(url), autocommit=True) as connection:
        connection.execute(made.payments)
        connection.execute(made.outbox)
        yield Worker(url, made, connection)


@pytest.fixture
def worker(unmigrated: Worker) -> Worker:
    unmigrated.run("migrate")
    return unmigrated


def test_columns_are_added_as_printed_to_a_table_with_rows(unmigrated: Worker) -> None:
    """The shop's own marks hold only the id of the event."""
    kind = unmigrated.made.types[1]
    unmigrated.connection.execute(f"CREATE TABLE processed_events (event_id {kind} PRIMARY KEY)")
    unmigrated.connection.execute("INSERT INTO processed_events VALUES (%s)", [unmigrated.made.id(1)])
    refused = unmigrated.run("migrate", code=78).stderr
    statements = re.findall(r"ALTER TABLE \S+ ADD COLUMN [^;]*;", " ".join(refused.split()))
    assert len(statements) == 5, refused
    for statement in statements:
        unmigrated.connection.execute(statement.encode())
    unmigrated.run("migrate")
    unmigrated.pay(1)
    unmigrated.tell(1, 1)
    unmigrated.run("run", "--drain")
    outcome = unmigrated.connection.execute("SELECT outcome, payment_id::text FROM processed_events").fetchone()
    assert outcome == ("recovered", str(unmigrated.made.id(1))), "the mark claimed a purchase that was not there"


def test_new_tables_have_ids_of_the_same_kind(worker: Worker) -> None:
    types = [
        worker.connection.execute(
            "SELECT format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = to_regclass(%s) AND attname = %s",
            each.split(),
        ).fetchone()
        for each in COPIES
    ]
    assert types == [(kind,) for kind in worker.made.types]
    worker.run("doctor", code=1)  # only indexes that help are missing in the shop's tables


def test_events_are_settled_and_told(worker: Worker) -> None:
    paid = [worker.pay(number) for number in (1, 2, 3)]
    for number in (1, 2, 3):
        worker.tell(number, 100 + number)
    second, refunded = worker.pay(4, pair=1), worker.pay(5, status="refunded")
    worker.tell(4, 104)
    worker.tell(5, 105, "PURCHASE_REFUNDED")
    worker.run("run", "--drain")
    rows = worker.connection.execute("SELECT payment_id::text FROM purchases WHERE is_active ORDER BY 1").fetchall()
    assert rows == [(each,) for each in paid]
    assert worker.ask("audit")["ok"]
    (duplicate,) = worker.ask("duplicates", "list")["duplicates"]
    assert (duplicate["payment"]["payment_id"], duplicate["held_by"]) == (second, paid[0])
    (story,) = worker.ask("why", refunded)["payments"]
    assert story["payment_id"] == refunded
    assert [entry["what"] for entry in story["timeline"]]


def test_a_dead_letter_is_shown_requeued_and_settled(worker: Worker) -> None:
    event = worker.tell(1, 101)
    worker.connection.execute("UPDATE outbox SET attempts = 9")
    worker.run("run", "--drain")
    (letter,) = worker.ask("dead-letters", "list")["dead_letters"]
    assert (letter["event_id"], letter["payment_id"]) == (event, str(worker.made.id(1)))
    assert worker.ask("dead-letters", "show", event)["dead_letter"]["event_id"] == event
    paid = worker.pay(1)
    worker.run("dead-letters", "requeue", event, "--actor", "ada", "--reason", "the payment is there now")
    worker.run("run", "--drain")
    assert worker.connection.execute("SELECT payment_id::text FROM purchases").fetchall() == [(paid,)]
    assert worker.ask("dead-letters", "list", "--state", "requeued")["dead_letters"][0]["event_id"] == event


def test_the_audit_finds_what_is_owed_and_the_backfill_makes_it(worker: Worker) -> None:
    owed = [worker.pay(number) for number in range(1, 30)]
    audit = worker.ask("audit", code=1)
    assert sorted(each["payment_id"] for each in audit["unexplained"]) == sorted(owed)
    worker.run("backfill", "--actor", "ada", "--reason", "test")
    rows = worker.connection.execute("SELECT payment_id::text FROM purchases").fetchall()
    assert sorted(owed) == sorted(key for (key,) in rows)
    assert worker.ask("audit")["ok"]


def test_an_id_that_cannot_be(worker: Worker) -> None:
    done = finish("dead-letters", "show", "no-such-event", url=worker.url)
    is_text = worker.made.types[1] == "text"
    assert (done.code, "no dead letter" in done.stderr or "cannot be the id of an event" in done.stderr) == (
        (1 if is_text else 2),
        True,
    )


def test_an_event_has_the_id_of_a_payment_that_it_does_not_name(worker: Worker) -> None:
    paid = worker.pay(1)
    worker.connection.execute(
        "INSERT INTO outbox (event_id, event_type, payload) VALUES (%s, 'PURCHASE_CONFIRMED', '{}')",
        [worker.made.id(1)],
    )
    worker.run("run", "--drain")
    letter = worker.ask("dead-letters", "show", paid)
    assert (letter["payment"], letter["class"], letter["now"]["outcome"]) == (None, None, "dead")
    stories = {story["payment_id"]: story for story in worker.ask("why", paid)["payments"]}
    assert stories.keys() == {paid, None}
    assert stories[paid]["class"] == "unexplained"
    assert any("invalid_payload" in entry["detail"] for entry in stories[None]["timeline"])


def test_the_next_command_is_right_for_an_id_with_a_hyphen(worker: Worker) -> None:
    event = {"bigint": -12, "text": "-x"}[worker.made.types[1]]
    worker.connection.execute(
        "INSERT INTO outbox (event_id, event_type, payload) VALUES (%s, 'PURCHASE_CONFIRMED', '{}')", [event]
    )
    worker.run("run", "--drain")
    (printed,) = [
        line.strip() for line in worker.run("dead-letters", "list").stdout.splitlines() if "dead-letters show" in line
    ]
    words = shlex.split(printed.partition("outbox-worker ")[2])
    assert words[-2:] == ["--", str(event)]
    assert "invalid_payload" in worker.run(*words).stdout
    who = ("--actor", "ann", "--reason", "it is right")
    previewed = worker.run("dead-letters", "discard", *who, "--dry-run", "--", str(event)).stdout
    (printed,) = [line.strip() for line in previewed.splitlines() if "dead-letters discard" in line]
    worker.run(*shlex.split(printed.partition("outbox-worker ")[2]))
    assert worker.ask("dead-letters", "show", "--", str(event))["dead_letter"]["state"] == "discarded"


def test_the_printed_value_for_a_missing_event_id_fits(worker: Worker) -> None:
    worker.connection.execute("ALTER TABLE outbox ALTER event_id DROP NOT NULL")
    worker.connection.execute("INSERT INTO outbox (event_type, payload) VALUES ('PURCHASE_CONFIRMED', '{}')")
    found = [
        each["remedy"]
        for each in worker.ask("doctor", code=1)["checks"]
        if "event_id" in (each["remedy"] or "") and "UPDATE" in each["remedy"]
    ]
    assert found
    for remedy in found:
        worker.connection.execute(remedy[remedy.index("UPDATE") :].encode())
    assert worker.connection.execute("SELECT count(*) FROM outbox WHERE event_id IS NULL").fetchone() == (0,)


def test_a_value_that_is_missing_has_no_name_to_map(worker: Worker) -> None:
    """A NULL as status or type is reported.

    No line of the configuration file is suggested for it.
    """
    worker.connection.execute("ALTER TABLE payments ALTER status DROP NOT NULL")
    worker.connection.execute("ALTER TABLE outbox ALTER event_type DROP NOT NULL")
    worker.pay(1)
    worker.connection.execute("UPDATE payments SET status = NULL")
    worker.connection.execute("INSERT INTO outbox (event_id, payload) VALUES (%s, '{}')", [worker.made.id(1)])
    shown = worker.run("audit", code=1).stdout
    assert "Write a status into the payments that have none." in shown
    assert "status_values" not in shown
    worker.pay(2, status="PAID")
    assert 'status_values.succeeded = ["PAID"]' in worker.run("audit", code=1).stdout
    remedies = [each["remedy"] or "" for each in worker.ask("doctor", code=1)["checks"]]
    assert any("OUTBOX_UNKNOWN_TYPES=bury" in each for each in remedies)
    assert not any('types."NULL"' in each for each in remedies)
