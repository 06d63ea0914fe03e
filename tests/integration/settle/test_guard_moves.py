"""A guard that changes while purchases are written: the unique index goes or comes between two writers of one pair."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from outbox_worker.model import Guard, Outcome
from tests.support.factories import Shop, drain_all
from tests.support.interleaving import AT_ONCE, PATIENCE, errors, poll
from tests.support.makers import Connect, MakeDatabase, MakeProcessor


def test_index_dropped(
    shop: Shop, connect: Connect, make_database: MakeDatabase, make_processor: MakeProcessor, pool: ThreadPoolExecutor
) -> None:
    index = shop.scalar(
        "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'purchases'::regclass AND indpred IS NOT NULL AND pg_get_expr(indpred, indrelid) ~ 'is_active'"
    )
    first, _ = shop.paid()
    second, event = shop.paid(student=first.student_id, course=first.course_id)
    shop.rows("DELETE FROM outbox WHERE event_id <> %s", event)
    shop.rows(
        "CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF current_setting('application_name') = 'outbox-worker' THEN PERFORM pg_advisory_xact_lock(77); END IF; RETURN NULL; END $$"
    )
    shop.rows("CREATE TRIGGER gate BEFORE INSERT ON purchases FOR EACH STATEMENT EXECUTE FUNCTION gate()")
    gate = connect(autocommit=True)
    gate.execute("SELECT pg_advisory_lock(77)")
    by_index = connect()
    by_index.execute(
        "INSERT INTO purchases (student_id, course_id, payment_id, amount, currency, is_active) VALUES (%s, %s, %s, 1, 'EUR', true)"
        " ON CONFLICT (student_id, course_id) WHERE is_active DO NOTHING",
        [*first.pair, first.id],
    )
    dropping = pool.submit(connect(autocommit=True).execute, f"DROP INDEX CONCURRENTLY {index}")
    poll(
        lambda: shop.scalar("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", index),
        "the index is invalid",
    )
    worker = make_processor(policy=AT_ONCE, database=make_database(connections=1))
    assert worker.watch.state.guard is Guard.LOCK
    settling = pool.submit(worker.process_batch)
    poll(
        lambda: (
            settling.done() or shop.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'")
        ),
        "at the gate",
    )
    assert not settling.done(), settling.result()
    by_index.commit()
    poll(lambda: not shop.scalar("SELECT indislive FROM pg_index WHERE indexrelid = to_regclass(%s)", index), "dead")
    gate.execute("SELECT pg_advisory_unlock(77)")
    print(settling.result(PATIENCE))
    dropping.result(PATIENCE)
    drain_all(worker)
    assert shop.doubled() == 0
    assert errors(worker) == {}
    assert shop.outcome_of(event) == "duplicate_payment"
