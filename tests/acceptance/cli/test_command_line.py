"""What an operator can get wrong, what a supervisor sends, what a script reads: exit codes, sentences, shapes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from tests.support import servers
from tests.support.factories import Shop
from tests.support.processes import (
    Finished,
    eventually,
    finish,
    finish_in_shell,
    finish_on_terminal,
    finish_script,
    finish_unread,
    start,
)

Connect = Callable[..., psycopg.Connection[Any]]
PASSWORD = "s3cr3t-Pa55word"  # noqa: S105 - the point is that it is never printed
ONE_SHOT = [["run", "--drain"], ["status"], ["audit"], ["backfill"], ["dead-letters", "list"], ["migrate"]]
GATE = 4242


def fails(code: int, *said: str, done: Finished) -> str:
    """It ended with this code and a sentence for people that says all this; no traceback, no password. The sentence."""
    sentence = done.sentences()
    assert done.code == code, done
    for each in said:
        assert re.search(each, sentence), f"{each!r} not in {sentence!r}"
    assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    told = f"outbox-worker: {json.loads(done.stdout)['error']}" if done.stdout else sentence
    assert sentence == told, "whoever asked for an object is told the same"
    return sentence


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections for as long as the test runs: bound, and nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def url_of(database_url: str, **changes: Any) -> str:
    return make_url(database_url).set(**changes).render_as_string(hide_password=False)


# --- settings


@pytest.mark.parametrize("command", ONE_SHOT, ids=" ".join)
def test_without_a_url_nothing_runs(command: list[str]) -> None:
    sentence = fails(78, "OUTBOX_DATABASE_URL", "not set", done=finish(*command))
    assert "postgresql://" in sentence
    assert "embedded:" in sentence


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"mysql://me:{PASSWORD}@host/shop", "PostgreSQL"),
        (f"postgresql+psycopg2://me:{PASSWORD}@host/shop", "PostgreSQL"),
        (f"me:{PASSWORD}@host", "URL"),
        (f"postgresql://me:{PASSWORD}@host:port/shop", "URL"),
        (f"postgresql://me:{PASSWORD}@host:99999/shop", "port"),
        (f"postgresql://me:{PASSWORD}@host", "database"),
        ("embedded:", "directory"),
        (PASSWORD, "URL"),
        ("", "URL|not set"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, said: str) -> None:
    fails(78, "OUTBOX_DATABASE_URL", said, done=finish("run", "--drain", url=url))


def test_impossible_values_are_told_all_together(closed_port: int) -> None:
    done = finish(
        "run",
        "--drain",
        url=f"postgresql://me:{PASSWORD}@127.0.0.1:{closed_port}/shop",
        batch_size=0,
        concurrency="many",
        max_attempts=-1,
        poll_max_seconds="soon",
        log_level="LOUD",
        tables="paiments=x",
        columns="payments.colour=x",
    )
    sentence = fails(78, done=done)
    for name in ("BATCH_SIZE", "CONCURRENCY", "MAX_ATTEMPTS", "POLL_MAX_SECONDS", "LOG_LEVEL", "TABLES", "COLUMNS"):
        assert f"OUTBOX_{name}" in sentence
    assert "paiments" in sentence


def test_bounds_that_contradict_each_other(database_url: str) -> None:
    done = finish("run", "--drain", url=database_url, poll_min_seconds=9, poll_max_seconds=1)
    fails(78, "OUTBOX_POLL_MIN_SECONDS", "OUTBOX_POLL_MAX_SECONDS", done=done)


def test_an_impossible_value_on_the_command_line(database_url: str) -> None:
    fails(2, "--batch-size", done=finish("run", "--drain", "--batch-size", "0", url=database_url))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchsize = 5\n", r"batchsize.*batch_size"),
        ("no_such_thing = 5\n", "no_such_thing"),
        ("batch_size = 0\n", "(?i)batch_size"),
        ("batch_size = \n", "TOML"),
        (f'database_url = "mysql://me:{PASSWORD}@host/shop"\n', "(?i)database_url"),
    ],
)
def test_a_file_that_cannot_be_used(text: str, said: str, tmp_path: Path, database_url: str) -> None:
    file = tmp_path / "outbox.toml"
    file.write_text(text)
    url = None if "database_url" in text else database_url
    fails(78, said, done=finish("run", "--drain", "--config", str(file), url=url))
    fails(78, said, done=finish("status", url=url, config=file))


def test_a_file_that_is_not_there(tmp_path: Path, database_url: str) -> None:
    fails(78, "nowhere.toml", done=finish("status", "--config", str(tmp_path / "nowhere.toml"), url=database_url))


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path, database_url: str) -> None:
    file = tmp_path / "outbox.toml"
    file.write_text(f'database_url = "{database_url}"\nconcurrency = 3\n')
    started = [
        finish("run", "--drain", "-c", str(file)),
        finish("run", "--drain", "-c", str(file), concurrency=2),
        finish("run", "--drain", "-c", str(file), "--concurrency", "1", concurrency=2),
    ]
    assert [done.record("worker_started")["concurrency"] for done in started] == [3, 2, 1]


def test_an_unknown_variable_is_a_warning_with_the_nearest_name(database_url: str) -> None:
    done = finish("run", "--drain", url=database_url, batchsize=5, zzzzzzzz=PASSWORD)
    assert done.code == 0, done.stderr
    told = {each["variable"]: each for each in done.records if each["event"] == "unknown_setting"}
    assert told.keys() == {"OUTBOX_BATCHSIZE", "OUTBOX_ZZZZZZZZ"}
    assert {each["level"] for each in told.values()} == {"WARNING"}
    assert "OUTBOX_BATCH_SIZE" in told["OUTBOX_BATCHSIZE"]["message"]
    assert PASSWORD not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--dry"],
        ["run", "--concurrency", "two"],
        ["walk"],
        ["migrate", "--with", "wings"],
        ["dead-letters", "list", "--state", "odd"],
        ["dead-letters", "list", "--limit", "0"],
        ["audit", "extra"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], database_url: str) -> None:
    fails(2, "Usage:", done=finish(*arguments, url=database_url))


# --- streams that take nothing, signals that come early


@pytest.mark.parametrize("command", ["--version", "--help", "status --json", "status", "audit"])
def test_a_full_stdout_is_one_sentence(command: str, database_url: str) -> None:
    done = finish_in_shell(f"$WORKER {command} > /dev/full", database_url)
    assert done.code == 1, done
    assert done.stderr == "outbox-worker: The output could not be written: No space left on device.\n"


@pytest.mark.parametrize("command", ["--version", "--help", "status --json", "status"])
def test_a_reader_that_went_away_is_no_traceback(command: str, database_url: str) -> None:
    done = finish_unread(*command.split(), url=database_url)
    assert (done.code, done.stderr) == (1, "")


def test_without_stdout_and_stderr_the_daemon_works(database_url: str, shop: Shop) -> None:
    shop.paid()
    assert finish_in_shell("$WORKER run --drain >&- 2>&-", database_url).code == 0
    assert shop.count("outbox") == 0


EARLY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background has it ignored

class Finder:
    def find_spec(self, name, *_):
        if name == "outbox_worker.cli":
            os.kill(os.getpid(), getattr(signal, sys.argv.pop()))

sys.meta_path.insert(0, Finder())
from outbox_worker.__main__ import main
main()
"""
"""A signal in the middle of the imports, the first tenths of a second of every command."""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("command", "code"), [("run", 0), ("demo", 0), ("migrate", 130), ("audit", 130)])
def test_a_signal_during_the_imports(command: str, code: int, name: str) -> None:
    done = finish_script(EARLY, command, name)
    assert (done.code, done.stdout, done.stderr) == (code, "", "")


# --- a database that is not there


@pytest.mark.parametrize("command", ONE_SHOT, ids=" ".join)
def test_nobody_listens(command: list[str], closed_port: int) -> None:
    url = f"postgresql://me:{PASSWORD}@127.0.0.1:{closed_port}/shop"
    fails(69, "No connection to the database", str(closed_port), done=finish(*command, url=url))


def test_the_database_does_not_exist(database_url: str) -> None:
    url = url_of(database_url, database="no_such_database", password=PASSWORD)
    fails(69, "no_such_database", done=finish("run", "--drain", url=url))
    fails(69, "no_such_database", done=finish("status", url=url))


def test_a_role_that_does_not_exist(database_url: str) -> None:
    fails(69, "No connection", done=finish("run", "--drain", url=url_of(database_url, username="no_such_role")))


def test_a_wrong_password(role: str, database_url: str) -> None:
    url = url_of(database_url, username=role, password=PASSWORD)
    try:
        psycopg.connect(servers.libpq(url)).close()
    except psycopg.OperationalError:
        fails(69, "password", done=finish("run", "--drain", url=url))
        fails(69, "password", done=finish("audit", url=url))
    else:
        pytest.skip("this server trusts everybody")


def test_the_daemon_waits_for_an_absent_database_and_begins_when_it_comes(server: servers.Server) -> None:
    name = f"{server.run}_late_{uuid4().hex[:8]}"
    url = servers.with_database(server.url, name)
    try:
        with start("run", url=url) as process:
            process.wait_for("paused")
            assert process.popen.poll() is None
            server.create(name, "index")
            process.wait_for("worker_started")
            with psycopg.connect(servers.libpq(url), autocommit=True) as connection:
                shop = Shop(connection)
                _, event = shop.paid()
                eventually(lambda: shop.outcome_of(event) == "created", "the first event is settled")
            process.signal()
            assert process.wait() == 0, process.stderr
            assert "Traceback" not in process.stderr
    finally:
        server.drop(name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_that_waits_can_be_stopped(number: int, closed_port: int) -> None:
    with start("run", url=f"postgresql://me:{PASSWORD}@127.0.0.1:{closed_port}/shop") as process:
        process.wait_for("paused")
        process.signal(number)
        assert process.wait(10) == 0, process.stderr
        assert PASSWORD not in process.stderr
        assert "Traceback" not in process.stderr


# --- a database that lacks something


@pytest.fixture
def role(server: servers.Server) -> Iterator[str]:
    """A role that may log in and nothing else. To be asked for before the database that grants it something."""
    name = f"{server.run}_{uuid4().hex[:8]}"
    with psycopg.connect(servers.libpq(server.url), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'right'").format(sql.Identifier(name)))
    yield name
    with psycopg.connect(servers.libpq(server.url), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_an_empty_database(make_url: Callable[[str | None], str]) -> None:
    url = make_url(None)
    tables = ("payments", "outbox", "purchases", "processed_events", "dead_letters", "workers", "backfill_runs")
    for command in (["run"], ["run", "--drain"], ["status"]):
        sentence = fails(78, *tables, "outbox-worker migrate", done=finish(*command, url=url))
        assert sentence.count("\n") == 2, "one finding, one remedy"
    for command in (["audit"], ["backfill", "--dry-run"]):
        fails(78, *tables[:5], "outbox-worker migrate", done=finish(*command, url=url))
    fails(78, "dead_letters", "outbox-worker migrate", done=finish("dead-letters", "list", url=url))


def test_a_schema_that_is_not_there(database_url: str) -> None:
    fails(
        78, r"missing: nowhere\.payments", "migrate", done=finish("run", "--drain", url=database_url, schema="nowhere")
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("DROP TABLE processed_events", [r"this table is missing: public\.processed_events", "migrate"]),
        ("ALTER TABLE outbox DROP COLUMN last_error", [r"outbox\.last_error is missing", "ADD COLUMN last_error TEXT"]),
        ("ALTER TABLE outbox ALTER payload TYPE bytea USING ''", [r"outbox\.payload is bytea, not", "OUTBOX_COLUMNS"]),
        ("ALTER TABLE purchases ALTER is_active DROP DEFAULT, ALTER is_active TYPE text", [r"is_active is text"]),
        ("ALTER TABLE purchases ADD tutor text NOT NULL", [r"tutor must have a value", "SET DEFAULT"]),
        ("ALTER TABLE processed_events DROP CONSTRAINT processed_events_pkey", ["not unique", "ADD UNIQUE"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_that_lacks_something(change: str, said: list[str], database_url: str, shop: Shop) -> None:
    if "is_active TYPE" in change:
        shop.rows("DROP INDEX purchases_active_student_course_key")
    shop.rows(change)
    fails(78, *said, done=finish("run", "--drain", url=database_url))
    fails(78, *said, done=finish("run", url=database_url))


def test_all_that_is_missing_is_told_at_once(database_url: str, shop: Shop) -> None:
    shop.rows("DROP TABLE workers")
    shop.rows("ALTER TABLE outbox DROP COLUMN crashes")
    fails(78, "workers", r"outbox\.crashes", done=finish("run", "--drain", url=database_url))


def test_a_role_without_rights_and_the_remedy_that_helps(role: str, database_url: str, shop: Shop) -> None:
    """Carry out what the sentences say, and it runs."""
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    shop.paid()
    for _ in range(3):
        done = finish("run", "--drain", url=url)
        if done.code == 0:
            break
        sentence = fails(78, "GRANT", done=done)
        for grant in re.findall(r"GRANT [^;]+;", sentence):
            shop.rows(re.sub(r"<the worker's role>|CURRENT_USER", f'"{role}"', grant))
    assert done.code == 0, done.stderr
    assert (shop.count("outbox"), shop.count("purchases")) == (0, 1)


def test_one_privilege_missing(role: str, database_url: str, shop: Shop) -> None:
    shop.rows(f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{role}"')
    shop.rows(f'REVOKE DELETE ON outbox FROM "{role}"')
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    sentence = fails(78, "no DELETE on public.outbox", "GRANT DELETE", done=finish("run", "--drain", url=url))
    assert "purchases" not in sentence


def test_a_right_that_is_lost_while_it_runs_is_told_with_its_remedy(role: str, database_url: str, shop: Shop) -> None:
    shop.rows(f'GRANT ALL ON ALL TABLES IN SCHEMA public TO "{role}"')
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    with start("run", url=url) as process:
        process.wait_for("worker_started")
        shop.rows(f'REVOKE DELETE ON outbox FROM "{role}"')
        _, event = shop.paid()
        told = process.wait_for("schema_problems")
        assert told["level"] == "ERROR"
        assert re.search(r"no DELETE on public\.outbox\n.*GRANT DELETE ON public\.outbox TO ", told["problems"])
        shop.rows(f'GRANT DELETE ON outbox TO "{role}"')
        eventually(lambda: shop.outcome_of(event) == "created", "it goes on by itself")
        process.signal()
        assert process.wait() == 0


def test_a_unique_key_that_is_lost_while_it_runs_is_told_with_its_remedy(database_url: str, shop: Shop) -> None:
    with start("run", url=database_url) as process:
        process.wait_for("worker_started")
        shop.rows("ALTER TABLE purchases DROP CONSTRAINT purchases_payment_id_key")
        refunded = shop.refund(shop.payment())
        paused = process.wait_for("paused")
        assert (paused["level"], paused["failure"]) == ("ERROR", "pause")
        told = process.wait_for("schema_problems")
        assert "public.purchases.payment_id is not unique" in told["problems"]
        _, confirmed = shop.paid()
        eventually(lambda: shop.outcome_of(confirmed) == "created", "purchases are made meanwhile")
        (remedy,) = re.findall(r"ALTER TABLE [^;]+;", told["problems"])
        shop.rows(remedy)
        eventually(lambda: shop.outcome_of(refunded) == "revoked", "it goes on by itself")
        process.signal()
        assert process.wait() == 0


@pytest.mark.parametrize("command", ["status --json", "audit", "dead-letters list"])
def test_who_only_looks_needs_to_read_and_no_more(command: str, role: str, database_url: str, shop: Shop) -> None:
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    sentence = fails(78, "GRANT SELECT ON public.dead_letters", done=finish(*command.split(), url=url))
    assert not re.search("INSERT|UPDATE|DELETE", sentence)
    for grant in re.findall(r"GRANT [^;]+;", sentence):
        shop.rows(grant)
    done = finish(*command.split(), url=url)
    assert done.code == 0, done
    assert command != "status --json" or done.object["guard"] == "index"


def test_migrate_as_the_workers_role(role: str, database_url: str) -> None:
    url = url_of(database_url, username=role, password="right")  # noqa: S106
    fails(78, "permission denied", "migrate runs as the owner of the tables", done=finish("migrate", url=url))


def test_an_empty_outbox_is_not_late(database_url: str, shop: Shop) -> None:
    shop.paid(due_in="1 hour")
    found = finish("status", "--json", url=database_url).object
    assert found["backlog"] == {"due": 0, "waiting": 1, "oldest_due_seconds": 0.0}
    assert found["metrics"]["outbox_oldest_due_seconds"] == 0.0


# --- signals


def close_gate(shop: Shop, holder: psycopg.Connection[Any]) -> None:
    """Every insert into ``purchases`` waits until the holder lets go."""
    shop.rows(
        f"CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({GATE}); RETURN NEW; END $$"
    )
    shop.rows("CREATE TRIGGER gate BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION wait_at_gate()")
    holder.execute("SELECT pg_advisory_lock(%s)", [GATE])


def is_at_gate(shop: Shop) -> bool:
    return bool(
        shop.scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'outbox-worker' AND wait_event = 'advisory'"
        )
    )


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_idle(number: int, times: int, database_url: str, shop: Shop) -> None:
    with start("run", url=database_url) as process:
        process.wait_for("worker_started")
        for _ in range(times):
            process.signal(number)
        assert process.wait(10) == 0, process.stderr
        process.wait_for("worker_stopped")
        assert "Traceback" not in process.stderr
    assert shop.rows("SELECT stopped_at IS NOT NULL FROM workers") == [(True,)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_within_a_batch_it_finishes_the_batch_and_no_other(
    number: int, database_url: str, shop: Shop, connect: Connect
) -> None:
    holder = connect(autocommit=True)
    close_gate(shop, holder)
    shop.pay_many(10)
    with start("run", url=database_url, batch_size=4, database_deadline_seconds=60) as process:
        eventually(lambda: is_at_gate(shop), "the batch is under way")
        process.signal(number)
        process.wait_for("worker_stopping", patience=10)
        assert process.popen.poll() is None
        holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])
        assert process.wait() == 0, process.stderr
        assert "Traceback" not in process.stderr
    assert (shop.count("purchases"), shop.count("outbox"), shop.count("processed_events")) == (4, 6, 4)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_does_not_wait_for_the_batch(
    numbers: tuple[int, int], database_url: str, shop: Shop, connect: Connect
) -> None:
    """What was not committed is rolled back, and no event is charged."""
    holder = connect(autocommit=True)
    close_gate(shop, holder)
    shop.pay_many(10)
    before = shop.rows("SELECT * FROM outbox ORDER BY id")
    with start("run", url=database_url, database_deadline_seconds=60) as process:
        eventually(lambda: is_at_gate(shop), "the batch is under way")
        process.signal(numbers[0])
        process.wait_for("worker_stopping", patience=10)
        process.signal(numbers[1])
        assert process.wait(10) == 0, process.stderr
        assert "Traceback" not in process.stderr
    holder.execute("SELECT pg_advisory_unlock(%s)", [GATE])
    eventually(lambda: not is_at_gate(shop), "the server notices")
    assert shop.rows("SELECT * FROM outbox ORDER BY id FOR UPDATE") == before
    assert shop.count("purchases") == 0
    assert finish("run", "--drain", url=database_url).code == 0
    assert shop.count("purchases") == 10


# --- what people see


@pytest.mark.parametrize("columns", [80, 50, 250])
@pytest.mark.parametrize("command", ["status", "audit", "dead-letters list"])
def test_nothing_is_cut_or_broken_on_a_terminal(command: str, columns: int, database_url: str, shop: Shop) -> None:
    """Where a table is too wide, each row is a block of its own; an id stays one word that can be copied."""
    lost = shop.payment(currency="USD")
    letter = shop.dead_letter(shop.payment())
    shop.paid()
    shown = finish_on_terminal(*command.split(), url=database_url, columns=columns)
    assert "…" not in shown
    assert "Traceback" not in shown
    ids = {"audit": [lost.id, lost.student_id, lost.course_id], "dead-letters list": [letter], "status": []}[command]
    for each in ids:
        assert str(each) in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= columns
    if command != "status":
        assert (len(re.findall(f"^.*{ids[0]}.*$", shown, re.MULTILINE)[0].split()) > 2) is (columns == 250)


# --- what scripts read


def is_moment(value: str) -> bool:
    """RFC 3339 in UTC."""
    return value.endswith("Z") and datetime.fromisoformat(value).tzinfo is not None


def test_status_as_an_object(both_guards: str, database_url: str, shop: Shop) -> None:
    assert finish("run", "--drain", url=database_url).code == 0
    shop.pay_many(3, due_in="-100 seconds")
    shop.paid(due_in="1 hour")
    shop.dead_letter()
    done = finish("status", "--json", url=database_url)
    assert done.code == 0, done.stderr
    found = done.object
    assert found.keys() >= {"time", "guard", "backlog", "dead_letters", "events_per_second", "workers", "metrics"}
    assert is_moment(found["time"])
    assert found["guard"] == both_guards
    assert (found["backlog"]["due"], found["backlog"]["waiting"]) == (3, 1)
    assert 100 <= found["backlog"]["oldest_due_seconds"] < 160
    assert found["dead_letters"] == {"open": 1}
    assert isinstance(found["events_per_second"], int | float)
    (worker,) = found["workers"]
    assert UUID(worker["id"])
    assert isinstance(worker["pid"], int)
    assert (worker["state"], worker["guard"], worker["settled"]) == ("stopped", both_guards, 0)
    assert is_moment(worker["started_at"])
    assert worker["silent_seconds"] >= 0
    assert all(isinstance(value, int | float) for value in found["metrics"].values())
    assert found["metrics"][f'outbox_guard{{mode="{both_guards}"}}'] == 1
    assert found["metrics"]["outbox_due_events"] == 3


def test_status_is_watched_through_an_outage_until_ctrl_c(database_url: str, shop: Shop) -> None:
    with start("status", "--watch", "--json", url=database_url, stdout=subprocess.PIPE) as watching:
        assert watching.popen.stdout is not None
        assert json.loads(watching.popen.stdout.readline())["backlog"]["due"] == 0
        shop.pay_many(3)
        assert json.loads(watching.popen.stdout.readline())["backlog"]["due"] == 3
        shop.rows("ALTER TABLE workers RENAME TO elsewhere")
        eventually(lambda: "public.workers" in watching.stderr, "told")
        shop.rows("ALTER TABLE elsewhere RENAME TO workers")
        assert json.loads(watching.popen.stdout.readline())["backlog"]["due"] == 3
        watching.signal(signal.SIGINT)
        assert watching.wait() == 0
        assert "Traceback" not in watching.stderr


def test_audit_as_an_object(database_url: str, shop: Shop) -> None:
    first = shop.payment(amount="10.00")
    shop.purchase(first)
    shop.payment(student=first.student_id, course=first.course_id, amount="0.10")
    shop.payment(student=first.student_id, course=first.course_id, amount="0.20")
    shop.paid(amount="5.50", currency="USD")
    lost = shop.payment(amount="1234567.80")
    refunded = shop.payment(status="refunded")
    shop.purchase(refunded)
    done = finish("audit", "--json", url=database_url)
    found = done.object
    assert (done.code, found["ok"]) == (1, False)
    assert found.keys() == {
        "ok",
        "counts",
        "money",
        "unexplained",
        "refunded_but_active",
        "unknown_statuses",
        "dated_ahead",
    }
    counts = {"active": 1, "revoked": 0, "duplicate": 2, "in_flight": 1, "dead": 0, "waived": 0, "unexplained": 1}
    assert found["counts"] == counts
    assert found["money"].keys() == counts.keys()
    assert found["money"]["active"] == {"EUR": "10.00"}
    assert found["money"]["duplicate"] == {"EUR": "0.30"}
    assert found["money"]["in_flight"] == {"USD": "5.50"}
    assert found["money"]["unexplained"] == {"EUR": "1234567.80"}
    (unexplained,) = found["unexplained"]
    assert UUID(unexplained["payment_id"]) == lost.id
    assert (unexplained["amount"], unexplained["currency"]) == ("1234567.80", "EUR")
    assert (UUID(unexplained["student_id"]), UUID(unexplained["course_id"])) == lost.pair
    assert is_moment(unexplained["created_at"])
    assert [UUID(each["payment_id"]) for each in found["refunded_but_active"]] == [refunded.id]


def test_payments_of_a_status_that_is_not_known_are_told(database_url: str, shop: Shop) -> None:
    """Nothing is granted for them, so nothing can be said of them either; that much must be said."""
    shop.rows("ALTER TABLE payments DROP CONSTRAINT payments_status_check")
    for status in ("PAID", "captured", "PAID", "pending", "failed", "refunded", "succeeded"):
        shop.purchase(shop.payment(status=status)) if status == "succeeded" else shop.payment(status=status)
    assert finish("audit", "--json", url=database_url).object["unknown_statuses"] == {"PAID": 2, "captured": 1}
    assert "PAID (2), captured (1)." in finish("audit", url=database_url).stdout


def test_payments_of_the_future_are_told(database_url: str, shop: Shop) -> None:
    for moment in ("infinity", "2999-01-01"):
        shop.rows("UPDATE payments SET created_at = %s WHERE id = %s", moment, shop.payment().id)
    assert finish("audit", "--json", url=database_url).object["dated_ahead"] == 2
    shown = finish("audit", url=database_url).stdout
    assert "Not judged, because they are dated in the future: 2 payment(s)." in shown
    shop.rows("UPDATE payments SET status = 'refunded'")
    assert "future" not in finish("audit", url=database_url).stdout


def test_audit_of_a_shop_that_owes_nothing(database_url: str, shop: Shop) -> None:
    shop.pay_many(3)
    assert finish("run", "--drain", url=database_url).code == 0
    done = finish("audit", "--json", url=database_url)
    assert (done.code, done.object["ok"]) == (0, True)
    assert done.object["counts"]["active"] == 3
    told = finish("audit", url=database_url)
    assert told.code == 0
    assert "Nothing is owed" in told.stdout


def test_dead_letters_as_an_object(database_url: str, shop: Shop) -> None:
    payment, _ = shop.paid(payload={"currency": "USD"})
    shop.paid(payload={"payment_id": None})
    closed = shop.dead_letter(state="discarded")
    assert finish("run", "--drain", url=database_url).code == 0
    listed = finish("dead-letters", "list", "--json", url=database_url)
    assert listed.code == 0
    letters = listed.object["dead_letters"]
    assert {letter["reason"] for letter in letters} == {"payment_mismatch", "invalid_payload"}
    (mismatch,) = [letter for letter in letters if letter["reason"] == "payment_mismatch"]
    assert UUID(mismatch["event_id"])
    assert UUID(mismatch["payment_id"]) == payment.id
    assert (mismatch["attempts"], mismatch["state"], mismatch["event_type"]) == (1, "open", "PURCHASE_CONFIRMED")
    assert "currency" in mismatch["detail"]
    assert is_moment(mismatch["dead_at"])
    assert is_moment(mismatch["created_at"])
    by_reason = finish("dead-letters", "list", "--json", "--reason", "payment_mismatch", url=database_url)
    assert by_reason.object["dead_letters"] == [mismatch]
    discarded = finish("dead-letters", "list", "--json", "--state", "discarded", url=database_url)
    assert [UUID(letter["event_id"]) for letter in discarded.object["dead_letters"]] == [closed]
    assert len(finish("dead-letters", "list", "--json", "--limit", "1", url=database_url).object["dead_letters"]) == 1
    assert finish("dead-letters", "list", "--json", "--reason", "crashed_worker", url=database_url).object == {
        "dead_letters": [],
        "next": None,
    }


def test_stdout_is_for_results_and_stderr_for_records(database_url: str, shop: Shop) -> None:
    shop.paid(payload={"payment_id": PASSWORD})
    done = finish("run", "--drain", url=database_url, log_level="DEBUG")
    assert (done.code, done.stdout, done.sentences()) == (0, "", "")
    assert all(is_moment(record["time"]) and record["level"] and record["message"] for record in done.records)
    assert PASSWORD not in done.stderr, "a payload's text is in the log"
