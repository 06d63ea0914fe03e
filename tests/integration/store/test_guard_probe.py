"""The guard: which index is one, and that an existing index is never taken for missing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import ProgrammingError

from outbox_worker.database.engine import Database
from outbox_worker.model import Guard, Outcome
from outbox_worker.schema.tables import Tables, build_tables, relation_name
from outbox_worker.settings import load_settings
from tests.support.factories import Shop, drain_all
from tests.support.guarding import (
    DEFERRABLE,
    FULL,
    SOUND,
    fallbacks,
    leave_invalid_index,
    pay_twice,
    probe,
    transactions,
    without_index,
)
from tests.support.makers import Connect, MakeDatabase, MakeProcessor

# --- the probe


SOUND_FORMS = {
    "plain": ("WHERE is_active", "is_active"),
    "seed": ("WHERE (is_active = true)", "(is_active = true)"),
    "is true": ("WHERE is_active IS TRUE", "(is_active IS TRUE)"),
    "include": ("INCLUDE (payment_id) WHERE is_active", "is_active"),
}


UNFIT = {
    "no index": [],
    "not unique": ["CREATE INDEX guard ON purchases (student_id, course_id) WHERE is_active"],
    "full": [FULL],
    "deferrable": [DEFERRABLE],
    "initially deferred": [f"{DEFERRABLE} INITIALLY DEFERRED"],
    "another predicate": [f"{SOUND} AND amount > 0"],
    "the inactive ones": ["CREATE UNIQUE INDEX guard ON purchases (student_id, course_id) WHERE NOT is_active"],
    "one column": ["CREATE UNIQUE INDEX guard ON purchases (student_id) WHERE is_active"],
    "three columns": ["CREATE UNIQUE INDEX guard ON purchases (student_id, course_id, amount) WHERE is_active"],
    "other columns": ["CREATE UNIQUE INDEX guard ON purchases (student_id, payment_id) WHERE is_active"],
    "an expression": ["CREATE UNIQUE INDEX guard ON purchases (student_id, CAST(course_id AS text)) WHERE is_active"],
    "another table": ["CREATE UNIQUE INDEX guard ON payments (student_id, course_id)"],
}


@without_index
@pytest.mark.parametrize("form", SOUND_FORMS)
def test_every_sound_form_is_the_guard_and_the_insert_infers_it(
    guard_kind: str, form: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    definition, predicate = SOUND_FORMS[form]
    shop.rows(f"CREATE UNIQUE INDEX guard ON purchases (student_id, course_id) {definition}")
    processor = make_processor()
    state = processor.watch.state
    assert (state.guard, state.predicate) == (Guard.INDEX, predicate)
    first, event, _, later = pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert (shop.outcome_of(event), shop.outcome_of(later)) == ("created", "duplicate_payment")
    assert [row.payment_id for row in shop.purchases(first.pair)] == [first.id]
    assert fallbacks(processor) == 0
    assert processor.watch.state is state


@without_index
@pytest.mark.parametrize("form", UNFIT)
def test_what_is_no_guard_leaves_the_lock_in_force(
    guard_kind: str, form: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    for statement in UNFIT[form]:
        shop.rows(statement)
    processor = make_processor()
    assert (processor.watch.state.guard, processor.watch.state.predicate) == (Guard.LOCK, "")
    if form in ("one column", "another table"):
        return  # these refuse more than a second active purchase of a pair
    first, event, _, later = pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert (shop.outcome_of(event), shop.outcome_of(later)) == ("created", "duplicate_payment")
    assert [row.payment_id for row in shop.purchases(first.pair)] == [first.id]
    assert fallbacks(processor) == 2, "one fast transaction, one careful"


@without_index
def test_columns_in_the_other_order_are_the_same_guard(
    guard_kind: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    shop.rows("CREATE UNIQUE INDEX guard ON purchases (course_id, student_id) WHERE is_active")
    processor = make_processor()
    assert processor.watch.state.guard is Guard.INDEX
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert fallbacks(processor) == 0


@without_index
@pytest.mark.parametrize("unfit", [FULL, f"{SOUND.replace(' sound ', ' odd ')} AND amount > 0"])
def test_a_sound_index_counts_whatever_stands_beside_it(
    guard_kind: str, unfit: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    shop.rows(SOUND)
    shop.rows(unfit)
    processor = make_processor()
    assert processor.watch.state.guard is Guard.INDEX
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert processor.watch.state.guard is Guard.INDEX
    assert fallbacks(processor) == 0


@without_index
def test_a_deferrable_arbiter_beside_a_sound_index_spoils_it(
    guard_kind: str, shop: Shop, database: Database, make_processor: MakeProcessor
) -> None:
    """The planner also takes a full constraint as arbiter.

    EXPLAIN works, but every execution raises 55000. A probe that trusted EXPLAIN alone would find
    the index again after every batch that fails on it.
    """
    assert guard_kind == "lock"
    shop.rows(SOUND)
    shop.rows(DEFERRABLE)
    processor = make_processor()
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert processor.watch.state.guard is Guard.LOCK
    with database.transaction() as session:
        assert processor.watch.probe(session).guard is Guard.LOCK


@without_index
def test_an_index_that_failed_over_duplicates_is_no_guard(
    guard_kind: str, shop: Shop, connect: Connect, make_processor: MakeProcessor
) -> None:
    assert guard_kind == "lock"
    gift, twin = shop.purchase(), shop.payment()
    first, _ = shop.paid()
    row = shop.rows("SELECT student_id, course_id FROM purchases WHERE id = %s", gift)[0]
    shop.purchase(student=row.student_id, course=row.course_id)
    with pytest.raises(psycopg.errors.UniqueViolation):
        connect(autocommit=True).execute(
            "CREATE UNIQUE INDEX CONCURRENTLY guard ON purchases (student_id, course_id) WHERE is_active"
        )
    assert shop.scalar("SELECT indisvalid FROM pg_index WHERE indexrelid = 'guard'::regclass") is False
    shop.confirm(shop.payment(student=first.student_id, course=first.course_id))
    shop.confirm(twin)
    processor = make_processor()
    assert processor.watch.state.guard is Guard.LOCK
    assert drain_all(processor) == {Outcome.CREATED: 2, Outcome.DUPLICATE_PAYMENT: 1}
    assert len(shop.purchases(first.pair)) == 1


@without_index
def test_an_invalid_index_that_enforces_already_is_no_guard_but_is_obeyed(
    guard_kind: str,
    shop: Shop,
    connect: Connect,
    pool: ThreadPoolExecutor,
    database: Database,
    tables: Tables,
    make_processor: MakeProcessor,
) -> None:
    assert guard_kind == "lock"
    leave_invalid_index(shop, connect, pool)
    processor = make_processor()
    assert processor.watch.state.guard is Guard.LOCK
    pay_twice(shop)
    assert drain_all(processor) == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    shop.rows("REINDEX INDEX CONCURRENTLY leftover")
    assert probe(database, tables).guard is Guard.INDEX


@without_index
@pytest.mark.parametrize("active", ["enabled", "is Active?", "select"])
@pytest.mark.parametrize("predicate", ["{}", "({} = true)", "{} IS TRUE"])
def test_an_index_on_renamed_columns(
    guard_kind: str, active: str, predicate: str, shop: Shop, database_url: str, make_database: MakeDatabase
) -> None:
    """The catalogue prints the user's names and quotes them where needed.

    The worker does the same.
    """
    assert guard_kind == "lock"
    names = {"student_id": "user_id", "course_id": "Course", "is_active": active}
    for column, name in names.items():
        shop.rows(f'ALTER TABLE purchases RENAME COLUMN {column} TO "{name}"')
    where = predicate.format(f'"{active}"')
    shop.rows(f'CREATE UNIQUE INDEX guard ON purchases (user_id, "Course") WHERE {where}')
    settings = load_settings(
        database_url=database_url, columns={f"purchases.{column}": name for column, name in names.items()}
    )
    tables = build_tables(settings)
    assert probe(make_database(), tables).guard is Guard.INDEX


def test_another_schemas_index_is_not_ours(shop: Shop, database_url: str, make_database: MakeDatabase) -> None:
    shop.rows("CREATE SCHEMA shop")
    shop.rows("CREATE TABLE shop.purchases (LIKE public.purchases)")
    tables = build_tables(load_settings(database_url=database_url, tables={"purchases": "shop.purchases"}))
    assert relation_name(tables.purchases) == "shop.purchases"
    assert probe(make_database(), tables).guard is Guard.LOCK


# --- an existing index must never be taken for missing


def test_thirty_batches_on_one_connection_never_miss_the_index(
    shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    """psycopg prepares after five executions. PostgreSQL plans generically after five more."""
    database = make_database(connections=1)
    processor = make_processor(database=database)
    for _ in range(30):
        shop.paid()
        pay_twice(shop)
        report = processor.process_batch()
        assert report.outcomes() == {Outcome.CREATED: 2, Outcome.DUPLICATE_PAYMENT: 1}
        assert report.guard is Guard.INDEX
    assert fallbacks(processor) == 0
    assert transactions(processor) == {"commit": 60.0}
    with database.transaction() as session:
        runs = session.execute(
            text(
                "SELECT generic_plans + custom_plans FROM pg_prepared_statements"
                " WHERE statement LIKE '%SKIP LOCKED%INSERT INTO public.purchases%ON CONFLICT%'"
            )
        ).scalars()
        assert max(runs, default=0) >= 20, "the insert was not prepared on this connection; the test proves nothing"


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan"])
def test_the_batch_insert_holds_under_a_generic_plan(
    mode: str, shop: Shop, make_database: MakeDatabase, make_processor: MakeProcessor
) -> None:
    set_mode = f"ALTER DATABASE %I SET plan_cache_mode = {mode}"
    shop.rows(f"DO $$ BEGIN EXECUTE format('{set_mode}', current_database()); END $$")
    database = make_database(connections=1)
    processor = make_processor(database=database)
    for _ in range(26):
        pay_twice(shop)
        assert processor.process_batch().outcomes() == {Outcome.CREATED: 1, Outcome.DUPLICATE_PAYMENT: 1}
    assert fallbacks(processor) == 0


def test_a_bound_predicate_would_be_caught_by_the_test_above(
    shop: Shop, tables: Tables, make_database: MakeDatabase
) -> None:
    """This is the statement that the product must not use: its predicate is a parameter."""
    purchases = tables.purchases
    where = purchases.c.is_active == bindparam("active", True, literal_execute=False)
    statement = insert(purchases).on_conflict_do_nothing(
        index_elements=[purchases.c.student_id, purchases.c.course_id], index_where=where
    )
    database, failed_at = make_database(connections=1), 0
    for run in range(1, 26):
        row = dict(zip(("student_id", "course_id"), shop.payment().pair, strict=True))
        try:
            with database.transaction() as session:
                session.execute(statement, {**row, "amount": 1, "currency": "EUR", "is_active": True})
        except ProgrammingError as error:
            assert isinstance(error.orig, psycopg.errors.InvalidColumnReference)  # noqa: PT017 - the loop goes on otherwise
            failed_at = run
            break
    assert 5 < failed_at <= 25
