"""Rows of dead workers: who takes them over, and which crashes count against an event."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import text

from outbox_worker import decision
from outbox_worker.database.engine import Database
from outbox_worker.decision import HEARTBEATS_BEFORE_JUDGING
from outbox_worker.model import Guard
from outbox_worker.schema.tables import Tables
from outbox_worker.store import workers as workers_store
from outbox_worker.store.processes import has_note, leave_note, remove_note
from outbox_worker.store.queries import database_time
from outbox_worker.store.workers import Contact, Takeover, Workers
from tests.support.factories import Shop

HERE = socket.gethostname()
ELSEWHERE = "another-host"
ENDED = os.getpid()
"""The id of this process. An earlier process with this id must have ended."""
DEADLINE = 0.3
SILENT = 0.5
"""A silence of half a second instead of half a minute. The server of a test can be younger."""
SURE = Contact(heartbeats=HEARTBEATS_BEFORE_JUDGING)


class Scene:
    """One event, and the rows of workers as their processes left them."""

    def __init__(self, shop: Shop, database: Database, tables: Tables) -> None:
        self.shop, self.database, self.tables = shop, database, tables
        self.judge = Workers(tables, uuid4())
        shop.paid()
        self.event: int = shop.scalar("SELECT id FROM outbox")

    def accuser(self, host: str = HERE, pid: int = ENDED, changed: Mapping[str, str] | None = None) -> UUID:
        """Write the row of a worker that died right after it accused the event.

        ``changed`` holds SQL for columns of the row.
        """
        key = uuid4()
        row = {
            "seen_at": "now() - interval '1 second'",
            "isolated_event": str(self.event),
            "isolated_at": "now() - interval '1 second'",
            "isolated_timeline": "'00000001'",
        } | dict(changed or {})
        self.shop.rows(
            f"INSERT INTO workers (id, host, pid, version, guard, {', '.join(row)})"
            f" VALUES (%s, %s, %s, '0', 'index', {', '.join(row.values())})",
            key,
            host,
            pid,
        )
        return key

    def look(self, contact: Contact = SURE, **options: Any) -> Takeover:
        with self.database.transaction() as session:
            return self.judge.take_over_dead_workers(session, contact, DEADLINE, **options)

    def crashes(self) -> int:
        return int(self.shop.scalar("SELECT crashes FROM outbox WHERE id = %s", self.event))

    def row(self, key: UUID) -> Any:
        (found,) = self.shop.rows("SELECT succeeded_at, isolated_event FROM workers WHERE id = %s", key)
        return found


@pytest.fixture
def scene(shop: Shop, database: Database, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(decision, "WORKER_SILENT_AFTER_SECONDS", SILENT)
    return Scene(shop, database, tables)


@pytest.fixture(scope="module")
def running() -> Iterator[int]:
    """Return the id of another running process of this host."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate()


@pytest.mark.parametrize("host", [HERE, ELSEWHERE])
def test_a_proven_death_is_counted_once(scene: Scene, host: str) -> None:
    dead = scene.accuser(host)
    (found,) = scene.look().dead
    assert (found.host, found.isolated, found.is_counted) == (host, scene.event, True)
    assert scene.crashes() == 1
    assert scene.row(dead).succeeded_at is not None
    assert scene.look().dead == []
    assert scene.crashes() == 1


DOUBTS = {
    "the server has restarted since": {"isolated_at": "pg_postmaster_start_time() - interval '1 second'"},
    "the server has failed over since": {"isolated_timeline": "'00000002'"},
    "it lived for long after the accusation": {"isolated_at": "now() - interval '1.5 seconds'"},
    "its heartbeat is much older than the accusation": {"isolated_at": "now() - interval '0.5 seconds'"},
}


@pytest.mark.parametrize("host", [HERE, ELSEWHERE])
@pytest.mark.parametrize("doubt", DOUBTS)
def test_in_doubt_nothing_is_counted(scene: Scene, doubt: str, host: str) -> None:
    """The row of the dead worker is still taken over. The new worker starts carefully."""
    changed = DOUBTS[doubt]
    if "restarted" in doubt:
        changed = changed | {"seen_at": changed["isolated_at"]}
    dead = scene.accuser(host, changed=changed)
    (found,) = scene.look().dead
    assert (found.isolated, found.is_counted) == (scene.event, False)
    assert scene.crashes() == 0
    assert scene.row(dead).succeeded_at is not None
    assert scene.row(dead).isolated_event is None


@pytest.mark.parametrize("host", [HERE, ELSEWHERE])
def test_a_judge_that_had_no_database_after_the_accusation_counts_nothing(scene: Scene, host: str) -> None:
    """In the same outage, the worker can have stopped cleanly without a chance to write it down."""
    scene.accuser(host)
    contact = Contact()
    contact.lost()
    with scene.database.transaction() as session:
        contact.answered(database_time(session))
    contact.heartbeats = HEARTBEATS_BEFORE_JUDGING
    assert [each.is_counted for each in scene.look(contact).dead] == [False]
    assert scene.crashes() == 0


def test_an_outage_before_the_accusation_is_no_doubt(scene: Scene) -> None:
    contact = Contact()
    contact.lost()
    with scene.database.transaction() as session:
        contact.answered(database_time(session) - timedelta(minutes=5))
    scene.accuser()
    assert [each.is_counted for each in scene.look(contact).dead] == [True]


def test_silence_proves_nothing_to_a_judge_without_heartbeats(scene: Scene) -> None:
    dead = scene.accuser(ELSEWHERE)
    for heartbeats in range(HEARTBEATS_BEFORE_JUDGING):
        found = scene.look(Contact(heartbeats=heartbeats))
        assert (found.dead, found.is_undecided) == ([], True)
        assert scene.row(dead).succeeded_at is None
    assert [each.is_counted for each in scene.look().dead] == [True]


def test_a_process_that_has_ended_is_judged_at_once(scene: Scene) -> None:
    scene.accuser()
    assert [each.is_counted for each in scene.look(Contact()).dead] == [True]


def test_a_process_that_runs_is_not_dead(scene: Scene, running: int) -> None:
    """If the process is silent for long, its row is taken over. But the event did not kill it."""
    scene.accuser(pid=running, changed={"seen_at": "now()", "isolated_at": "now()"})
    assert scene.look().dead == []
    scene.shop.rows(
        "UPDATE workers SET seen_at = now() - interval '1 second', isolated_at = now() - interval '1 second'"
    )
    assert [each.is_counted for each in scene.look().dead] == [False]
    assert scene.crashes() == 0


def test_a_worker_that_withdrew_on_its_host_only_is_not_charged(scene: Scene) -> None:
    dead = scene.accuser()
    leave_note(dead)
    assert [each.is_counted for each in scene.look().dead] == [False]
    assert scene.crashes() == 0
    assert not has_note(dead), "the note has done its work"


def test_a_new_accusation_makes_the_old_note_void(scene: Scene) -> None:
    key = uuid4()
    leave_note(key)
    with scene.database.transaction() as session:
        Workers(scene.tables, key).accuse(session, Guard.INDEX, scene.event)
    assert not has_note(key)
    remove_note(key)


def test_an_event_that_is_gone_is_not_missed(scene: Scene) -> None:
    dead = scene.accuser()
    scene.shop.rows("DELETE FROM outbox")
    assert [each.is_counted for each in scene.look().dead] == [False]
    assert scene.row(dead).succeeded_at is not None


def test_while_another_worker_settles_the_event_the_death_is_counted_later(scene: Scene, connect: Any) -> None:
    dead = scene.accuser()
    other: psycopg.Connection[Any] = connect()
    other.execute("SELECT FROM outbox FOR UPDATE")
    found = scene.look()
    assert (found.dead, found.is_undecided) == ([], True)
    assert scene.row(dead).succeeded_at is None
    other.rollback()
    assert [each.is_counted for each in scene.look().dead] == [True]
    assert scene.crashes() == 1


def test_an_outbox_that_refuses_to_count_hinders_nothing(scene: Scene) -> None:
    scene.accuser()
    scene.shop.rows(
        "CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;"
        "CREATE TRIGGER forbid BEFORE UPDATE ON outbox FOR EACH ROW EXECUTE FUNCTION forbid()"
    )
    assert [each.is_counted for each in scene.look().dead] == [False]


def test_a_count_that_is_null_is_none(scene: Scene) -> None:
    scene.shop.rows("ALTER TABLE outbox ALTER crashes DROP NOT NULL")
    scene.shop.rows("UPDATE outbox SET crashes = NULL")
    scene.accuser()
    scene.look()
    assert scene.crashes() == 1


def test_two_judges_count_one_death(scene: Scene, connect: Any) -> None:
    """The other judge has locked the row of the dead worker, and counts the crash."""
    dead = scene.accuser()
    other: psycopg.Connection[Any] = connect()
    other.execute("SELECT FROM workers FOR UPDATE")
    assert scene.look().dead == []
    other.execute("UPDATE workers SET succeeded_at = now()")
    other.commit()
    assert scene.look().dead == []
    assert scene.crashes() == 0
    assert scene.row(dead).isolated_event == scene.event


def test_each_start_goes_carefully_for_one_worker_that_isolated_nothing(scene: Scene) -> None:
    nothing = {"isolated_event": "NULL", "isolated_at": "NULL", "isolated_timeline": "NULL"}
    for _ in range(2):
        scene.accuser(changed=nothing)
    scene.accuser(ELSEWHERE, changed=nothing)
    accused = [scene.accuser(), scene.accuser(ELSEWHERE)]
    found = scene.look()
    assert sorted(each.isolated is None for each in found.dead) == [False, False, True]
    assert all(scene.row(key).succeeded_at for key in accused)
    assert scene.crashes() == 2
    assert scene.look(only_accusers=True).dead == []
    assert [len(scene.look(Contact()).dead) for _ in range(3)] == [1, 1, 0]


# --- a worker that was taken for dead, and lives


def join(scene: Scene) -> tuple[Workers, UUID]:
    key = uuid4()
    workers = Workers(scene.tables, key)
    with scene.database.transaction() as session:
        workers.join(session, Guard.INDEX)
    with scene.database.transaction() as session:
        assert workers.accuse(session, Guard.INDEX, scene.event)
    return workers, key


def fall_silent(scene: Scene, key: UUID) -> None:
    silent = "host = %s, seen_at = now() - interval '1 second', isolated_at = now() - interval '1 second'"
    scene.shop.rows(f"UPDATE workers SET {silent} WHERE id = %s", ELSEWHERE, key)


@pytest.mark.parametrize("sign", ["beat", "accuse", "withdraw"])
def test_whoever_lives_takes_back_the_death_that_was_counted(scene: Scene, sign: str) -> None:
    """The worker was stopped for a while, or it alone had no database.

    The worker's next sign of life takes the counted crash back.
    """
    workers, key = join(scene)
    fall_silent(scene, key)
    assert [each.is_counted for each in scene.look().dead] == [True]
    assert scene.crashes() == 1
    with scene.database.transaction() as session:
        match sign:
            case "beat":
                assert workers.beat(session, Guard.INDEX, {})
            case "accuse":
                assert workers.accuse(session, Guard.INDEX, scene.event)
            case _:
                workers.withdraw(session)
    assert scene.crashes() == 0
    assert scene.row(key) == (None, scene.event if sign == "accuse" else None)
    fall_silent(scene, key)
    again = scene.look()
    assert [each.is_counted for each in again.dead] == [sign == "accuse"], "from now on it can be judged again"


def test_only_what_was_counted_is_taken_back(scene: Scene) -> None:
    workers, key = join(scene)
    fall_silent(scene, key)
    scene.shop.rows("UPDATE outbox SET crashes = 2")
    scene.shop.rows("UPDATE workers SET isolated_timeline = 'another'")
    assert [each.is_counted for each in scene.look().dead] == [False]
    with scene.database.transaction() as session:
        workers.beat(session, Guard.INDEX, {})
    assert scene.crashes() == 2
    assert scene.row(key).succeeded_at is None


def test_what_cannot_be_taken_back_now_is_taken_back_later(scene: Scene, connect: Any) -> None:
    workers, key = join(scene)
    fall_silent(scene, key)
    scene.look()
    other: psycopg.Connection[Any] = connect()
    other.execute("SELECT FROM outbox FOR UPDATE")
    with scene.database.transaction() as session:
        assert workers.beat(session, Guard.INDEX, {}) is None
        assert not workers.accuse(session, Guard.INDEX, scene.event), "it would overwrite what must be taken back"
    assert scene.row(key).succeeded_at is not None
    other.rollback()
    with scene.database.transaction() as session:
        assert workers.beat(session, Guard.INDEX, {})
    assert scene.crashes() == 0


def test_a_last_heartbeat_withdraws(scene: Scene) -> None:
    workers, key = join(scene)
    with scene.database.transaction() as session:
        workers.beat(session, Guard.INDEX, {}, stopped=True)
    assert scene.row(key).isolated_event is None
    assert scene.look().dead == []


def test_if_a_server_does_not_tell_its_timeline_its_start_time_must_do(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_store, "_TIMELINE", text("SELECT pg_no_such_function()"))
    _, key = join(scene)
    fall_silent(scene, key)
    assert [each.is_counted for each in scene.look().dead] == [True]
