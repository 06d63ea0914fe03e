"""Which conditions of a unique index mean "active": one database tries all forms in turn."""

from __future__ import annotations

from outbox_worker.database.engine import Database
from outbox_worker.model import Guard
from outbox_worker.schema.catalogue import pair_indexes, unfit_pair_indexes
from outbox_worker.schema.tables import Tables
from outbox_worker.store.guard import guard_in_force
from tests.support.factories import ProbedProcessor, Shop, drain_all
from tests.support.guarding import fallbacks, pay_twice, probe, without_index
from tests.support.makers import MakeProcessor

FUNCTIONS = """
    CREATE FUNCTION granted(flag boolean) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT flag IS TRUE';
    CREATE FUNCTION withdrawn(flag boolean) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT NOT flag'
"""
MEANS_ACTIVE = (
    "is_active",
    "is_active = true",
    "true = is_active",
    "is_active IS TRUE",
    "is_active IS NOT FALSE",
    "is_active AND true",
    "NOT (is_active = false)",
    "is_active <> false",
    "is_active::int = 1",
    "is_active::text = 'true'",
    "is_active::text LIKE 't%'",
    "CASE WHEN is_active THEN true ELSE false END",
    "coalesce(is_active, false)",
    "granted(is_active)",
)
MEANS_ANOTHER = (
    "NOT is_active",
    "is_active IS NULL",
    "is_active OR true",
    "is_active AND amount > 0",
    "is_active AND deactivated_at IS NULL",
    "deactivated_at IS NULL",
    "purchases IS NOT NULL",
    "withdrawn(is_active)",
)


def build(shop: Shop, condition: str, columns: str = "student_id, course_id") -> None:
    shop.rows("DROP INDEX IF EXISTS guard")
    shop.rows(f"CREATE UNIQUE INDEX guard ON purchases ({columns}) WHERE {condition}".replace("%", "%%"))


def unfit(database: Database, tables: Tables) -> dict[str, str | None]:
    with database.transaction() as session:
        return unfit_pair_indexes(session, tables.purchases)


@without_index
def test_a_condition_counts_by_its_meaning(guard_kind: str, shop: Shop, database: Database, tables: Tables) -> None:
    assert guard_kind == "lock"
    shop.rows(FUNCTIONS)
    found = {}
    for condition in (*MEANS_ACTIVE, *MEANS_ANOTHER):
        build(shop, condition)
        found[condition] = probe(database, tables).guard
        assert bool(unfit(database, tables)) is (found[condition] is Guard.LOCK), condition
    assert found == dict.fromkeys(MEANS_ACTIVE, Guard.INDEX) | dict.fromkeys(MEANS_ANOTHER, Guard.LOCK)


@without_index
def test_null_counts_where_the_column_allows_it(
    guard_kind: str, shop: Shop, database: Database, tables: Tables
) -> None:
    assert guard_kind == "lock"
    shop.rows("ALTER TABLE purchases ALTER COLUMN is_active DROP NOT NULL")
    for condition, guard in (("is_active IS NOT FALSE", Guard.LOCK), ("is_active IS TRUE", Guard.INDEX)):
        build(shop, condition)
        assert probe(database, tables).guard is guard


@without_index
def test_events_are_settled_by_an_index_whose_condition_is_written_oddly(
    guard_kind: str, shop: Shop, make_processor: MakeProcessor
) -> None:
    """The condition has a percent sign, which the driver reads as a placeholder.

    The columns of the index are reversed.
    """
    assert guard_kind == "lock"
    build(shop, "is_active::text LIKE 't%'", "course_id, student_id")
    processor: ProbedProcessor = make_processor()
    assert processor.watch.state.guard is Guard.INDEX
    first, _, _, later = pay_twice(shop)
    drain_all(processor)
    assert shop.outcome_of(later) == "duplicate_payment"
    assert [row.payment_id for row in shop.purchases(first.pair)] == [first.id]
    assert fallbacks(processor) == 0


@without_index
def test_a_role_that_may_not_insert_finds_the_same_guard(
    guard_kind: str, shop: Shop, database: Database, tables: Tables
) -> None:
    assert guard_kind == "lock"
    build(shop, "is_active AND true")
    shop.rows("CREATE ROLE looker_of_guards; GRANT SELECT ON purchases TO looker_of_guards")
    try:
        with database.snapshot() as session:
            session.connection().exec_driver_sql("SET LOCAL ROLE looker_of_guards")
            assert guard_in_force(session, tables) is Guard.INDEX
            assert pair_indexes(session, tables.purchases)
    finally:
        shop.rows("DROP OWNED BY looker_of_guards; DROP ROLE looker_of_guards")
