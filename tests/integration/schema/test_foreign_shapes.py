"""Tables of another application whose form makes writes fail or lose rows.

Each problem is reported, and each remedy helps.
"""

from __future__ import annotations

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.diagnose.doctor.finding import Subject
from outbox_worker.diagnose.doctor.report import CHECKS
from outbox_worker.errors import Refused, SchemaError
from outbox_worker.model import Outcome
from outbox_worker.schema.concerns import find_concerns
from outbox_worker.schema.nullable import find_nullable
from outbox_worker.schema.privileges import STRUCTURE
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.requirements import check_schema, find_problems
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings, load_settings
from tests.support.factories import ProbedProcessor, Shop, drain_all
from tests.support.installations import Installation


def problems(database: Database, tables: Tables) -> list[SchemaProblem]:
    with database.transaction() as session:
        return find_problems(session, tables)


def concerns(database: Database, tables: Tables) -> list[SchemaProblem]:
    with database.transaction() as session:
        return find_concerns(session, tables)


def paste(shop: Shop, remedy: str) -> None:
    """Run the statements of a remedy one after the other, as a person does."""
    for each in remedy.removeprefix("as its owner: ").split("; "):
        shop.connection.execute(each, prepare=False)


def verdicts(database: Database, settings: Settings, name: str) -> list[tuple[str, str, str]]:
    """Return what one check of the doctor says."""
    with database.snapshot() as session:
        subject = Subject(session, settings, build_tables(settings), database)
        return [(str(each.verdict), each.evidence, each.remedy) for each in CHECKS[name].look(subject)]


def partition(shop: Shop, table: str, by: str) -> None:
    """Replace the table by a partitioned table."""
    bounds = "FOR VALUES WITH (MODULUS 1, REMAINDER 0)" if "HASH" in by else "DEFAULT"
    shop.connection.execute(
        f"ALTER TABLE {table} RENAME TO plain;"
        f"CREATE TABLE {table} (LIKE plain INCLUDING DEFAULTS INCLUDING IDENTITY) PARTITION BY {by};"
        f"DROP TABLE plain CASCADE; CREATE TABLE part PARTITION OF {table} {bounds}",
        prepare=False,
    )


# --- foreign keys to the outbox


@pytest.mark.parametrize(
    ("action", "why"),
    [("CASCADE", "also deletes the row"), ("NO ACTION", "refuses to remove"), ("SET NULL", "overwrites")],
)
def test_a_foreign_key_to_the_outbox(shop: Shop, database: Database, tables: Tables, action: str, why: str) -> None:
    wanted = ("processed_events", "dead_letters")
    for table in wanted:
        shop.rows(
            f'ALTER TABLE {table} ADD CONSTRAINT "of An event" FOREIGN KEY (event_id) REFERENCES outbox (event_id)'
            f" ON DELETE {action}"
        )
    found = problems(database, tables)
    assert [each.finding.partition(": ")[0] for each in found] == [
        f'public.{table} has the foreign key "of An event" to public.outbox' for table in wanted
    ]
    for each in found:
        assert why in each.finding
        paste(shop, each.remedy)
    assert problems(database, tables) == []


def test_the_foreign_key_of_a_partition(shop: Shop, database: Database, tables: Tables) -> None:
    """The foreign key of a partition is reported.

    A foreign key that PostgreSQL does not enforce is not.
    """
    if shop.connection.info.server_version >= 180000:
        shop.rows("ALTER TABLE processed_events ADD FOREIGN KEY (event_id) REFERENCES outbox (event_id) NOT ENFORCED")
    partition(shop, "dead_letters", "HASH (event_id)")
    shop.rows("ALTER TABLE dead_letters ADD PRIMARY KEY (event_id)")
    shop.rows("ALTER TABLE part ADD FOREIGN KEY (event_id) REFERENCES outbox (event_id) ON DELETE CASCADE")
    (found,) = problems(database, tables)
    assert found.remedy == "ALTER TABLE public.part DROP CONSTRAINT part_event_id_fkey;"
    paste(shop, found.remedy)
    assert problems(database, tables) == []


def test_a_foreign_key_of_purchases_only_if_it_deletes_purchases(
    shop: Shop, database: Database, tables: Tables
) -> None:
    shop.rows("ALTER TABLE purchases ADD of_event uuid REFERENCES outbox (event_id) ON DELETE SET NULL")
    shop.rows("ALTER TABLE purchases ADD FOREIGN KEY (payment_id) REFERENCES payments ON DELETE CASCADE")
    assert problems(database, tables) == []
    shop.rows("ALTER TABLE purchases ADD by_event uuid REFERENCES outbox (event_id) ON DELETE CASCADE")
    (found,) = problems(database, tables)
    paste(shop, found.remedy)
    assert problems(database, tables) == []


def test_an_outbox_that_the_role_may_not_see_hides_no_other_problem(shop: Shop, database: Database) -> None:
    shop.rows("CREATE SCHEMA closed; ALTER TABLE outbox SET SCHEMA closed; GRANT SELECT ON payments TO pg_monitor")
    elsewhere = build_tables(load_settings(tables={"outbox": "closed.outbox"}))
    with database.transaction() as session:
        session.connection().exec_driver_sql("SET LOCAL ROLE pg_monitor")
        found = find_problems(session, elsewhere, STRUCTURE)
    assert [each.finding for each in found] == ["no USAGE on the schema closed"]


# --- rules


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("ON INSERT TO {} DO ALSO INSERT INTO log DEFAULT VALUES", "PostgreSQL refuses"),
        ("ON INSERT TO {} DO INSTEAD NOTHING", "writes no row"),
        ("ON UPDATE TO {} DO INSTEAD NOTHING", "PostgreSQL refuses"),
        ("ON UPDATE TO {} WHERE false DO ALSO NOTHING", "PostgreSQL refuses"),
    ],
)
def test_a_rule_stops_the_worker(
    shop: Shop, database: Database, tables: Tables, settings: Settings, rule: str, why: str
) -> None:
    wanted = ("purchases", "processed_events", "dead_letters", "workers")
    shop.rows("CREATE TABLE log (n int)")
    for table in wanted:
        shop.rows(f'CREATE RULE "my Rule" AS {rule.format(table)}')
    found = problems(database, tables)
    assert [each.finding.partition(" ON ")[0] for each in found] == [
        f'public.{table} has the rule "my Rule"' for table in wanted
    ]
    assert [verdict for verdict, *_ in verdicts(database, settings, "swallowed_writes")] == ["ok"]
    assert {remedy for *_, remedy in verdicts(database, settings, "tables")} == {each.remedy for each in found}
    for each in found:
        assert why in each.finding
        paste(shop, each.remedy)
    assert problems(database, tables) == []


def test_a_disabled_rule_is_told_exactly_if_it_refuses(
    shop: Shop, database: Database, tables: Tables, processor: ProbedProcessor
) -> None:
    """A disabled rule ON UPDATE makes PostgreSQL refuse ON CONFLICT.

    A disabled rule ON INSERT does not.
    """
    for command in ("INSERT", "UPDATE"):
        shop.rows(f"CREATE RULE r{command} AS ON {command} TO processed_events DO ALSO SELECT 1")
        shop.rows(f"ALTER TABLE processed_events DISABLE RULE r{command}")
    with pytest.raises(Exception, match="ON CONFLICT"):
        shop.rows(
            "INSERT INTO processed_events (event_id, event_type, outcome) VALUES (gen_random_uuid(), 'x', 'created')"
            " ON CONFLICT DO NOTHING"
        )
    (found,) = problems(database, tables)
    assert "rupdate ON UPDATE" in found.finding
    paste(shop, found.remedy)
    assert problems(database, tables) == []
    shop.paid()
    assert drain_all(processor) == {Outcome.CREATED: 1}


def test_rules_that_leave_the_write_alone_are_no_problem(
    shop: Shop, database: Database, tables: Tables, processor: ProbedProcessor
) -> None:
    shop.rows("CREATE RULE r1 AS ON INSERT TO dead_letters DO ALSO NOTHING")
    shop.rows("CREATE RULE r2 AS ON DELETE TO purchases DO INSTEAD NOTHING")
    shop.rows("CREATE RULE r3 AS ON UPDATE TO payments DO INSTEAD NOTHING")
    assert problems(database, tables) == []
    shop.confirm(shop.payment("failed"))
    shop.rows("UPDATE outbox SET attempts = 9")
    assert drain_all(processor) == {Outcome.DEAD: 1}


# --- generated columns


COMPUTED = (
    ("outbox", "attempts", "int GENERATED ALWAYS AS IDENTITY"),
    ("outbox", "last_error", "text GENERATED ALWAYS AS (event_type) STORED"),
    ("purchases", "currency", "text GENERATED ALWAYS AS ('EUR') STORED"),
    ("purchases", "deactivated_at", "timestamptz GENERATED ALWAYS AS ('epoch') STORED"),
    ("processed_events", "payment_id", "uuid GENERATED ALWAYS AS (event_id) STORED"),
    ("dead_letters", "attempts", "int GENERATED ALWAYS AS IDENTITY"),
    ("workers", "guard", "text GENERATED ALWAYS AS (host) STORED"),
    ("backfill_runs", "pid", "int GENERATED ALWAYS AS IDENTITY"),
)
"""Columns that the worker writes."""


def test_a_written_column_that_postgresql_computes(shop: Shop, database: Database, tables: Tables) -> None:
    for table, column, expression in COMPUTED:
        shop.rows(f"ALTER TABLE {table} DROP COLUMN {column}, ADD COLUMN {column} {expression}")
    found = problems(database, tables)
    assert [each.finding.partition(" is ")[0] for each in found] == [
        f"column public.{table}.{column}" for table, column, _ in COMPUTED
    ]
    for each in found:
        paste(shop, each.remedy)
    assert problems(database, tables) == []


def test_a_virtual_column_keeps_its_values(shop: Shop, database: Database, tables: Tables) -> None:
    if shop.connection.info.server_version < 180000:
        pytest.skip("PostgreSQL has virtual generated columns since version 18")
    shop.mark(shop.paid()[1])
    shop.rows("ALTER TABLE processed_events DROP COLUMN outcome")
    shop.rows("ALTER TABLE processed_events ADD outcome text GENERATED ALWAYS AS ('cre' || 'ated') VIRTUAL")
    (found,) = problems(database, tables)
    paste(shop, found.remedy)
    assert problems(database, tables) == []
    assert shop.rows("SELECT outcome FROM processed_events") == [("created",)]


def test_computed_columns_that_the_worker_does_not_write(shop: Shop, database: Database, tables: Tables) -> None:
    shop.rows("ALTER TABLE purchases DROP COLUMN id, ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY")
    shop.rows("ALTER TABLE payments DROP COLUMN currency, ADD COLUMN currency text GENERATED ALWAYS AS ('EUR') STORED")
    shop.rows("ALTER TABLE purchases ADD COLUMN own text GENERATED ALWAYS AS ('x') STORED")
    shop.rows("ALTER TABLE dead_letters DROP COLUMN note, ADD COLUMN note text GENERATED ALWAYS AS (reason) STORED")
    assert problems(database, tables) == []


# --- each of these shapes stops ``migrate``


def test_migrate_refuses_adopted_tables_of_such_a_form(empty: Installation) -> None:
    empty.execute("CREATE TABLE outbox (event_id uuid UNIQUE)")
    empty.execute(
        "CREATE TABLE processed_events (event_id uuid PRIMARY KEY REFERENCES outbox (event_id) ON DELETE CASCADE)"
    )
    empty.execute("CREATE RULE r AS ON UPDATE TO processed_events DO ALSO SELECT 1")
    with pytest.raises(SchemaError, match=r"has the rule r ON UPDATE(.|\n)*has the foreign key"):
        empty.migrate()


# --- event ids that two events can share


def test_an_outbox_without_a_unique_event_id(
    shop: Shop, database: Database, tables: Tables, settings: Settings
) -> None:
    assert concerns(database, tables) == []
    shop.rows("ALTER TABLE outbox DROP CONSTRAINT outbox_event_id_key")
    (found,) = concerns(database, tables)
    assert "public.outbox has no unique index on event_id" in found.finding
    assert ("warning", found.finding, found.remedy) in verdicts(database, settings, "tables")
    assert problems(database, tables) == []
    assert found.remedy.startswith("CREATE UNIQUE INDEX CONCURRENTLY ON public.outbox (event_id);")
    paste(shop, found.remedy)
    assert concerns(database, tables) == []
    assert [verdict for verdict, *_ in verdicts(database, settings, "tables")] == ["ok"]


def test_which_index_keeps_event_ids_apart(shop: Shop, database: Database, tables: Tables) -> None:
    shop.rows("ALTER TABLE outbox DROP CONSTRAINT outbox_event_id_key")
    shop.rows("CREATE UNIQUE INDEX ON outbox (event_id) WHERE attempts = 0")
    shop.rows("CREATE UNIQUE INDEX ON outbox (event_id, event_type)")
    shop.rows("CREATE INDEX ON outbox (event_id)")
    assert len(concerns(database, tables)) == 1
    for index in (
        "ALTER TABLE outbox ADD CONSTRAINT enough UNIQUE (event_id) DEFERRABLE",
        "ALTER TABLE outbox ADD CONSTRAINT enough UNIQUE (event_id) INCLUDE (id)",
        "CREATE UNIQUE INDEX enough ON outbox (event_id) WHERE event_id IS NOT NULL",
    ):
        shop.rows(index)
        assert concerns(database, tables) == [], index
        if index.startswith("ALTER"):
            shop.rows("ALTER TABLE outbox DROP CONSTRAINT enough")


@pytest.mark.parametrize(
    ("by", "remedy"),
    [
        ("HASH (event_id)", "CREATE UNIQUE INDEX ON public.outbox (event_id);"),
        ("RANGE (due_at)", "public.outbox is partitioned by other columns"),
    ],
)
def test_the_event_ids_of_a_partitioned_outbox(
    shop: Shop, database: Database, tables: Tables, by: str, remedy: str
) -> None:
    partition(shop, "outbox", by)
    (found,) = concerns(database, tables)
    assert found.remedy.startswith(remedy)
    if "CREATE" in remedy:
        paste(shop, found.remedy)
        assert concerns(database, tables) == []


# --- partitioned tables


def test_indexes_of_partitioned_tables_are_not_built_concurrently(
    shop: Shop, database: Database, settings: Settings
) -> None:
    partition(shop, "outbox", "RANGE (due_at)")
    told = [remedy for _, evidence, remedy in verdicts(database, settings, "indexes") if "public.outbox" in evidence]
    assert told == [f"CREATE INDEX ON public.outbox ({columns});" for columns in ("due_at, id", "id")]
    for each in told:
        paste(shop, each)
    assert [verdict for verdict, *_ in verdicts(database, settings, "indexes")] == ["ok"]


def test_an_invalid_index_of_a_partitioned_table(shop: Shop, database: Database, settings: Settings) -> None:
    partition(shop, "outbox", "RANGE (due_at)")
    shop.rows("CREATE INDEX half ON ONLY outbox (due_at)")
    ((_, _, remedy),) = verdicts(database, settings, "invalid_indexes")
    paste(shop, remedy.partition("or: ")[2])
    assert [verdict for verdict, *_ in verdicts(database, settings, "invalid_indexes")] == ["ok"]


def test_partitioned_purchases_stay_with_the_lock(migrated: Installation) -> None:
    shop = Shop(migrated.connection)
    partition(shop, "purchases", "HASH (payment_id)")
    shop.rows("ALTER TABLE purchases ADD UNIQUE (payment_id)")
    before = migrated.snapshot()
    with pytest.raises(Refused, match=r"public\.purchases is partitioned.*stays with the guard lock"):
        migrated.migrate("unique_index")
    assert migrated.snapshot() == before
    settings = load_settings(database_url=migrated.url)
    database = Database(settings, deadline_seconds=10)
    ((verdict, evidence, remedy),) = verdicts(database, settings, "guard")
    database.close()
    assert (verdict, evidence.partition(":")[0]) == ("warning", "lock")
    assert remedy.startswith("public.purchases is partitioned")
    migrated.migrate()
    shop.paid()
    assert migrated.drain() == {Outcome.CREATED: 1}


def test_an_index_of_other_rows_on_partitioned_purchases(shop: Shop, database: Database, tables: Tables) -> None:
    partition(shop, "purchases", "HASH (student_id)")
    shop.rows("CREATE UNIQUE INDEX ON purchases (student_id, course_id)")
    assert [each.remedy.partition(",")[0] for each in concerns(database, tables)] == ["public.purchases is partitioned"]


def test_a_partitioned_table_that_cannot_have_the_key(shop: Shop, database: Database, tables: Tables) -> None:
    partition(shop, "processed_events", "RANGE (processed_at)")
    (found,) = problems(database, tables)
    assert "processed_events.event_id is not unique, and the table is partitioned by other columns" in found.finding
    assert "ALTER TABLE" not in found.remedy
    partition(shop, "processed_events", "HASH (event_id)")
    (found,) = problems(database, tables)
    paste(shop, found.remedy)
    assert problems(database, tables) == []


# --- views


def test_a_view_is_not_a_table(shop: Shop, database: Database, tables: Tables) -> None:
    wanted = ("purchases", "processed_events", "dead_letters")
    for table in wanted:
        shop.rows(f"ALTER TABLE {table} RENAME TO {table}_behind; CREATE VIEW {table} AS TABLE {table}_behind")
    found = problems(database, tables)
    assert [(each.finding, each.remedy) for each in found] == [
        (
            f"public.{table} is a view, not a table: it can have no unique key",
            f"it is a view: name the table behind it in OUTBOX_TABLES ({table}=…)",
        )
        for table in wanted
    ]
    with database.transaction() as session:
        assert all("ALTER TABLE" not in each.remedy for each in find_nullable(session, tables))
        behind = build_tables(load_settings(tables={table: f"{table}_behind" for table in wanted}))
        assert find_problems(session, behind) == []


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_an_outbox_that_is_a_view(
    shop: Shop, database: Database, tables: Tables, settings: Settings, kind: str
) -> None:
    shop.rows("ALTER TABLE outbox RENAME TO behind; ALTER TABLE behind DROP COLUMN crashes")
    shop.rows(f"CREATE {kind} outbox AS TABLE behind")
    with database.transaction() as session:
        found = [*find_problems(session, tables), *find_nullable(session, tables), *find_concerns(session, tables)]
    assert len(found) == 2
    assert all(f"it is a {kind.lower()}: name the table behind it" in each.remedy for each in found)
    assert all("ALTER TABLE" not in each.remedy for each in found)
    assert [verdict for verdict, *_ in verdicts(database, settings, "indexes")] == ["ok"]


def test_a_view_of_the_outbox_can_be_settled(shop: Shop, processor: ProbedProcessor) -> None:
    """A view is accepted: PostgreSQL passes the writes on to the table behind the view."""
    shop.rows("ALTER TABLE outbox RENAME TO behind; CREATE VIEW outbox AS TABLE behind")
    shop.paid()
    assert drain_all(processor) == {Outcome.CREATED: 1}


def test_payments_may_be_a_view(shop: Shop, database: Database, tables: Tables, settings: Settings) -> None:
    """The worker only reads the view. Only a row with NULL is reported."""
    payment = shop.payment()
    shop.rows("ALTER TABLE payments RENAME TO behind; ALTER TABLE behind ALTER status DROP NOT NULL")
    shop.rows("CREATE VIEW payments AS TABLE behind")
    with database.transaction() as session:
        assert check_schema(session, tables).payments is tables.payments
        assert find_nullable(session, tables) == []
    assert [verdict for verdict, *_ in verdicts(database, settings, "indexes")] == ["ok"]
    shop.rows("UPDATE behind SET status = NULL")
    with database.transaction() as session:
        (found,) = find_nullable(session, tables)
    assert "has rows in which a value is NULL: status" in found.finding
    assert shop.rows(found.remedy[found.remedy.index("SELECT") :])[0][0] == payment.id
