"""Databases in other encodings than UTF8, and outputs that lack a character, cause no error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from tests.support import servers
from tests.support.commands import fails
from tests.support.factories import Shop
from tests.support.processes import finish, finish_in_shell, finish_script

PAYMENTS = (
    "CREATE TABLE payments (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), student_id text, course_id text,"
    " amount numeric DEFAULT 9.9, currency text DEFAULT 'EUR', status text DEFAULT 'succeeded',"
    " created_at timestamptz DEFAULT now() - interval '1 hour', updated_at timestamptz)"
)
ODD = "convert_from('\\xe9'::bytea, 'SQL_ASCII')"
"""A byte that is not valid UTF8."""
EVENTS = (
    "INSERT INTO outbox (event_id, event_type, payload) SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED',"
    " jsonb_build_object('payment_id', id, 'student_id', student_id, 'currency', currency) FROM payments"
)


@contextmanager
def database_in(server: servers.Server, encoding: str) -> Iterator[tuple[str, psycopg.Connection]]:
    name = f"{server.run}_{uuid4().hex[:8]}"
    with psycopg.connect(servers.libpq(server.url), autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        connection.execute(create.format(sql.Identifier(name), encoding))
    url = servers.with_database(server.url, name)
    try:
        with psycopg.connect(servers.libpq(url), autocommit=True, client_encoding=encoding) as connection:
            connection.execute(PAYMENTS)
            assert finish("migrate", url=url).code == 0
            yield url, connection
    finally:
        server.drop(name)


def test_bytes_that_are_no_utf8_stop_nothing(server: servers.Server) -> None:
    with database_in(server, "SQL_ASCII") as (url, connection):
        connection.execute(
            f"INSERT INTO payments (student_id, course_id) SELECT {ODD} || n, 'c' FROM generate_series(1, 3) n"
        )
        connection.execute(f"INSERT INTO payments (student_id, course_id, status) VALUES ('s', 'c', {ODD})")
        connection.execute(EVENTS)
        for kind, payment in ((f"'ODD' || {ODD}", "'x'"), ("'PURCHASE_CONFIRMED'", ODD)):
            connection.execute(
                "INSERT INTO outbox (event_id, event_type, payload) VALUES"
                f" (gen_random_uuid(), {kind}, jsonb_build_object('payment_id', {payment}))"
            )
        done = finish("run", "--drain", url=url, max_attempts=1)
        assert done.code == 0, done
        assert [record for record in done.records if record["event"] == "paused"] == []
        assert connection.execute("SELECT count(*) FROM purchases").fetchone() == (3,)
        reasons = connection.execute("SELECT reason FROM dead_letters ORDER BY reason").fetchall()
        assert [bytes(reason) for (reason,) in reasons] == [
            *(b"invalid_payload", b"payment_not_succeeded", b"unsupported_event_type")
        ]
        connection.execute(  # two students whose ids differ only in such a byte
            f"INSERT INTO payments (student_id, course_id) VALUES ({ODD}, 'd'), ({ODD.replace('xe9', 'xe8')}, 'd')"
        )
        found = finish("audit", "--json", url=url)
        assert found.code == 1, found
        assert {each["student_id"] for each in found.object["unexplained"]} == {"\\xe9", "\\xe8"}
        made = finish("backfill", "--json", "--actor", "李", url=url)
        assert made.code == 0, made
        assert made.object["counts"]["made"]["count"] == 2, "they are not taken for one"
        for command in (["status"], ["dead-letters", "list"], ["duplicates", "list"]):
            assert finish(*command, url=url).code == 0, command
        (told,) = [each for each in finish("doctor", "--json", url=url).object["checks"] if each["name"] == "encoding"]
        assert told["verdict"] == "warning"


@pytest.mark.parametrize(("encoding", "student"), [("LATIN1", "é"), ("EUC_JP", "日本")])
def test_the_server_converts_all_other_encodings(server: servers.Server, encoding: str, student: str) -> None:
    with database_in(server, encoding) as (url, connection):
        connection.execute("INSERT INTO payments (student_id, course_id) VALUES (%s, 'c')", [student])
        connection.execute(EVENTS)
        assert finish("run", "--drain", url=url).code == 0
        assert connection.execute("SELECT student_id FROM purchases").fetchall() == [(student,)]
        connection.execute("INSERT INTO payments (student_id, course_id) VALUES (%s, 'd')", [student])
        (owed,) = finish("backfill", "--dry-run", "--json", url=url).object["owed"]
        assert owed["student_id"] == student
        fails(1, "encoding of the database has no such character", done=finish("backfill", "--actor", "🙂", url=url))
        assert finish("backfill", "--actor", student, url=url).code == 0


# --- characters that stdout lacks


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict"])
def test_a_character_that_stdout_lacks_is_replaced(encoding: str, database_url: str, shop: Shop) -> None:
    shop.rows("UPDATE dead_letters SET event_type = '日本' WHERE event_id = %s", shop.dead_letter())
    command = f"PYTHONIOENCODING={encoding} $WORKER dead-letters list"
    done = finish_in_shell(command, database_url)
    assert (done.code, "\t??\t" in done.stdout) == (0, True), done
    found = finish_in_shell(f"{command} --json", database_url)
    assert found.code == 0, found
    assert found.object["dead_letters"][0]["event_type"] == "日本", "an object loses nothing"


# --- errors of the command


BROKEN = """
import sys
from outbox_worker.diagnose import status
def fail(*_):
    raise {error}
status.read_status = fail
sys.argv = ["outbox-worker", *sys.argv[1:]]
from outbox_worker.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "error", ["ZeroDivisionError('4711')", "FileNotFoundError(2, '4711', '/4711')", "OSError(5000, '4711')"]
)
def test_an_error_of_ours_is_70_and_one_sentence(error: str, database_url: str) -> None:
    done = finish_script(BROKEN.format(error=error), "status", "--json", url=database_url)
    assert done.code == 70, done
    assert done.stderr.startswith("outbox-worker: This is a bug. Please report it: ")
    assert "Traceback" not in done.stderr
    assert "4711" not in done.stderr.replace("/4711", "").split("\n")[0]
    assert os.linesep not in done.stdout


def test_a_name_that_is_no_text_is_no_error_of_ours(database_url: str) -> None:
    done = finish_in_shell("$WORKER why $(printf '\\351')", database_url)
    assert done.code == 1, done
