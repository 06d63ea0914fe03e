"""Events set aside: every worker omits them, and no report expects them to be settled."""

from __future__ import annotations

from uuid import uuid4

from outbox_worker.database.engine import Database
from outbox_worker.diagnose.doctor.report import examine
from outbox_worker.diagnose.status import read_status
from outbox_worker.model import Guard
from outbox_worker.reconcile.audit import Audit
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.store.set_aside import FIRST_SECONDS, LATER_SECONDS, SetAside
from outbox_worker.store.workers import Workers, read_set_aside
from tests.support.factories import ProbedProcessor, Shop

REFUSAL = "DELETE on public.outbox: refused"


def join(database: Database, tables: Tables, *, stopped: bool = False, **set_aside: str) -> Workers:
    """Make a worker that has set these events aside and has written so in its row."""
    worker = Workers(tables, uuid4())
    worker.set_aside.add({int(key.removeprefix("e")): told for key, told in set_aside.items()}, 0.0)
    with database.transaction() as session:
        worker.join(session, Guard.INDEX)
        worker.beat(session, Guard.INDEX, {}, stopped=stopped)
    return worker


def known_to(database: Database, worker: Workers) -> list[int]:
    with database.transaction() as session:
        worker.learn_set_aside(session)
    return list(worker.set_aside.ids)


def counts(database: Database, tables: Tables) -> dict[str, int]:
    return {kind.value: count for kind, count in Audit.start(database, tables).run().counts.items() if count}


def told(database: Database, tables: Tables) -> dict[int, str]:
    with database.transaction() as session:
        return read_set_aside(session, tables)


def test_what_one_worker_sets_aside_all_omit_while_it_runs(
    shop: Shop, database: Database, tables: Tables, processor: ProbedProcessor
) -> None:
    shop.pay_many(3)
    one, other = join(database, tables, e2=REFUSAL), join(database, tables)
    assert known_to(database, other) == [2]
    processor._pacing.set_aside.learn(other.set_aside.ids)
    assert processor.process_batch().settled == 2
    assert [row.id for row in shop.rows("SELECT id FROM outbox")] == [2]
    assert processor.process_batch().claimed == 0
    now = shop.scalar("SELECT now()")
    with database.transaction() as session:
        assert not processor.outbox.has_due(session, now, set_aside=[2])
        assert processor.outbox.has_due(session, now)
        assert processor.outbox.backlog(session, set_aside=[2]).due == 0
        one.beat(session, Guard.INDEX, {}, stopped=True)
    assert known_to(database, other) == []
    assert told(database, tables) == {2: REFUSAL}, "until another worker starts, nobody tries it again"
    join(database, tables)
    assert told(database, tables) == {}


def test_an_event_that_is_gone_is_not_told(shop: Shop, database: Database, tables: Tables) -> None:
    shop.pay_many(1)
    join(database, tables, e1=REFUSAL, e7=REFUSAL)
    assert told(database, tables) == {1: REFUSAL}


def test_an_event_set_aside_explains_no_payment_and_is_told(
    shop: Shop, database: Database, tables: Tables, settings: Settings
) -> None:
    shop.pay_many(2)
    assert counts(database, tables) == {"in_flight": 2}
    join(database, tables, e2=REFUSAL)
    assert counts(database, tables) == {"in_flight": 1, "unexplained": 1}
    status = read_status(database, tables, None)
    assert (status.set_aside, status.backlog.due) == ({2: REFUSAL}, 1)
    assert status.metrics()["outbox_set_aside_events"] == 1
    (found,) = [check for check in examine(settings).checks if check.name == "set_aside"]
    assert (found.verdict, REFUSAL in found.evidence) == ("problem", True)


def test_doctor_names_what_swallows_and_what_is_behind(shop: Shop, settings: Settings) -> None:
    shop.connection.execute(
        "CREATE FUNCTION soft() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER soft BEFORE DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION soft();"
        "CREATE RULE odd AS ON UPDATE TO outbox WHERE OLD.id = 7 DO INSTEAD NOTHING;"
        "CREATE SEQUENCE behind OWNED BY purchases.amount; ALTER TABLE purchases ALTER amount SET DEFAULT"
        " nextval('behind'); SELECT nextval('behind'); INSERT INTO purchases (student_id, course_id, amount, currency)"
        " VALUES (gen_random_uuid(), gen_random_uuid(), 9, 'EUR');"
        "ALTER TABLE purchases REPLICA IDENTITY NOTHING; CREATE PUBLICATION published FOR TABLE purchases",
        prepare=False,
    )
    found = {(check.name, str(check.verdict)): f"{check.evidence} {check.remedy}" for check in examine(settings).checks}
    assert "the trigger soft on public.outbox swallows DELETE" in found["swallowed_writes", "problem"]
    assert "the rule odd on public.outbox may swallow UPDATE" in found["swallowed_writes", "warning"]
    sequence, identity = found["sequences", "problem"], found["replica_identity", "problem"]
    for remedy in (sequence, identity):
        shop.rows(remedy.partition("as its owner: ")[2])
    again = {check.name: str(check.verdict) for check in examine(settings).checks}
    assert (again["sequences"], again["replica_identity"]) == ("ok", "ok")


def test_an_event_is_tried_again_soon_at_first_and_then_rarely() -> None:
    aside = SetAside()
    for began, seconds in ((0.0, FIRST_SECONDS), (100.0, LATER_SECONDS), (1000.0, LATER_SECONDS)):
        aside.add({5: REFUSAL}, began)
        aside.release_old(began + seconds - 1)
        assert (list(aside.ids), aside.refusals()) == ([5], {"5": REFUSAL})
        aside.release_old(began + seconds)
        assert (list(aside.ids), aside.refusals()) == ([], {})
    aside.forget({5})
    aside.add({5: REFUSAL}, 5000.0)
    aside.release_old(5000.0 + FIRST_SECONDS)
    assert list(aside.ids) == []
