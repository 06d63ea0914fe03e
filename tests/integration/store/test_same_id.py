"""Ids that are equal by their columns' types belong to one student, however they are written."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import select

from outbox_worker.database.engine import Database
from outbox_worker.model import Guard, Outcome
from outbox_worker.reconcile.audit import Audit
from outbox_worker.schema.requirements import with_types_as_found
from outbox_worker.schema.tables import Tables
from outbox_worker.store.identity import pair_key
from tests.support.factories import Shop, drain_all
from tests.support.guarding import without_index
from tests.support.interleaving import PATIENCE, errors
from tests.support.makers import MakeDatabase, MakeProcessor
from tests.support.same_ids import KINDS, Kind, every_kind, pay, retype
from tests.support.watching import on_commit

PUBLIC = "hashtextextended(CAST(student_id AS text) || ':' || CAST(course_id AS text), 0)"

PUBLIC_KINDS = {"uuid", "int4 beside int8", "text beside varchar", "char", "char beside text"}


@every_kind
def test_two_ways_to_write_an_id_are_one_student(
    kind: Kind, both_guards: str, shop: Shop, database: Database, tables: Tables, make_processor: MakeProcessor
) -> None:
    """The ids are equal in one batch, in a later batch, and if a refund frees the course."""
    retype(shop, kind)
    first, _ = pay(shop, kind.one)
    pay(shop, kind.same)
    pay(shop, kind.other)
    pay(shop, kind.one, "another course")
    processor = make_processor()
    assert processor.watch.state.guard == (both_guards if kind.is_indexed else Guard.LOCK)
    assert drain_all(processor) == {Outcome.CREATED: 3, Outcome.DUPLICATE_PAYMENT: 1}
    pay(shop, kind.same)
    assert drain_all(processor) == {Outcome.DUPLICATE_PAYMENT: 1}
    shop.rows("UPDATE payments SET status = 'refunded' WHERE id = %s", first)
    shop.confirm(None, event_type="PURCHASE_REFUNDED", payload={"payment_id": str(first)})
    assert drain_all(processor) == {Outcome.REVOKED: 1}
    active = shop.rows("SELECT payment_id FROM purchases WHERE is_active AND course_id = 'SQL'")
    assert len(active) == 2
    assert (first,) not in active
    report = Audit.start(database, tables).run()
    assert (report.ok, report.counts["duplicate"], report.counts["active"]) == (True, 1, 3)  # type: ignore[index]
    assert errors(processor) == {}


def keys_are_right(shop: Shop, kind: Kind, database: Database, tables: Tables) -> None:
    """Check that equal ids have one key.

    If the texts decide, the key is the formula for other programs.
    """
    with database.transaction() as session:
        found = with_types_as_found(session, tables, ["payments", "purchases"])
        keys = session.scalars(
            select(pair_key(found.ids, tables.payments)).order_by(tables.payments.c.created_at)
        ).all()
    assert keys[0] == keys[1] != keys[2]
    assert found.ids.has_public_key == (kind.name in PUBLIC_KINDS)
    if found.ids.has_public_key:
        assert keys == [row[0] for row in shop.rows(f"SELECT {PUBLIC} FROM payments ORDER BY created_at")]


@without_index
@every_kind
def test_the_lock_knows_both_ways(
    kind: Kind,
    guard_kind: str,
    shop: Shop,
    tables: Tables,
    make_database: MakeDatabase,
    make_processor: MakeProcessor,
    pool: ThreadPoolExecutor,
) -> None:
    """One worker has written the purchase and waits before its COMMIT.

    The other worker must not write a second purchase.
    """
    assert guard_kind == "lock"
    retype(shop, kind)
    for due_in, student in (("-2 seconds", kind.one), ("-1 second", kind.same)):
        pay(shop, student, due_in=due_in)
    pay(shop, kind.other, due_in="1 hour")
    keys_are_right(shop, kind, make_database(), tables)
    slow, fast = (make_processor(batch_size=1, database=make_database()) for _ in range(2))
    reached, released = threading.Event(), threading.Event()

    def stand() -> None:
        reached.set()
        assert released.wait(PATIENCE)

    on_commit(slow.database, stand)
    slowly = pool.submit(slow.process_batch)
    assert reached.wait(PATIENCE)
    report = fast.process_batch()
    released.set()
    assert (report.claimed, report.outcomes()) == (1, {})
    assert slowly.result(PATIENCE).outcomes() == {Outcome.CREATED: 1}
    assert drain_all(fast) == {Outcome.DUPLICATE_PAYMENT: 1}
    assert shop.count("purchases") == 1
    assert errors(slow, fast) == {}


@without_index
def test_an_index_that_compares_by_another_rule_is_no_guard(
    guard_kind: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    """By the index's collation, the two ways to write the id are two students."""
    assert guard_kind == "lock"
    kind = next(each for each in KINDS if each.name == "loose")
    retype(shop, kind)
    shop.rows('CREATE UNIQUE INDEX other ON purchases (student_id COLLATE "C", course_id) WHERE is_active')
    for student in (kind.one, kind.same):
        pay(shop, student)
    processor = make_processor()
    assert processor.watch.state.guard is Guard.LOCK
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    shop.rows("CREATE UNIQUE INDEX same ON purchases (student_id, course_id) WHERE is_active")
    assert make_processor().watch.state.guard is Guard.INDEX
