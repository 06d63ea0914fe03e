"""Migrations up and down, on empty databases, on full ones, on those of another application, and twice at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from alembic.config import Config

from outbox_worker import migration
from outbox_worker.database import Database
from outbox_worker.errors import Refused, SchemaError, SettingError
from outbox_worker.guard import GuardWatch, probe_guard
from outbox_worker.handlers import build_handlers
from outbox_worker.migration import VERSION_TABLE, Migrated
from outbox_worker.model import COLUMNS, Guard, Outcome
from outbox_worker.outbox import Outbox
from outbox_worker.pacing import Pacing
from outbox_worker.processor import Processor
from outbox_worker.purchases import PurchaseRepository
from outbox_worker.schema import NOTIFY_CHANNEL, NOTIFY_TRIGGER, PAIR_INDEX, PAIR_LOOKUP_INDEX, build_tables
from outbox_worker.settings import load_settings
from outbox_worker.telemetry import Telemetry
from tests.support import ROOT, catalogue, servers
from tests.support.factories import Shop, drain_all, make_payments

OWN = {f"public.{role}" for role in COLUMNS}


class Site:
    """One database under migration, with a connection to look at it."""

    def __init__(self, url: str, connection: psycopg.Connection[Any]) -> None:
        self.url = url
        self.connection = connection
        self.settings: dict[str, Any] = {}

    def migrate(self, *options: str) -> Migrated:
        settings = load_settings(database_url=self.url, **self.settings)
        database = Database(settings, deadline_seconds=None)
        try:
            return migration.upgrade(database, settings, build_tables(settings), options)
        finally:
            database.close()

    def alembic(self, run: Callable[[Config, str], None], revision: str) -> None:
        """Plain alembic's command in this process."""
        settings = load_settings(database_url=self.url, **self.settings)
        database = Database(settings, deadline_seconds=None)
        try:
            with database.engine.connect() as connection:
                config = Config(ROOT / "alembic.ini")
                config.attributes.update(connection=connection, settings=settings)
                run(config, revision)
        finally:
            database.close()

    def downgrade(self, branch: str) -> None:
        self.alembic(command.downgrade, f"{branch}@base")

    def make_named_payments(self) -> None:
        """The payments service's table, under the name that the settings give it."""
        settings = load_settings(database_url=self.url, **self.settings)
        database = Database(settings, deadline_seconds=None)
        try:
            make_payments(database, build_tables(settings))
        finally:
            database.close()

    def drain(self) -> dict[Outcome, int]:
        """What becomes of the events that are due."""
        settings = load_settings(database_url=self.url, **self.settings)
        database, tables, telemetry = Database(settings, deadline_seconds=10), build_tables(settings), Telemetry()
        watch, repository = GuardWatch(tables.purchases, telemetry.guard_changed), PurchaseRepository(tables)
        policy = settings.retry_policy
        handlers, outbox = build_handlers(repository, policy), Outbox(tables, None)
        try:
            with database.transaction() as session:
                watch.probe(session)
            return drain_all(
                Processor(database, outbox, repository, handlers, watch, telemetry, policy, Pacing(100, 60))
            )
        finally:
            database.close()

    def guard(self) -> Guard:
        settings = load_settings(database_url=self.url, **self.settings)
        database = Database(settings, deadline_seconds=None)
        try:
            with database.transaction() as session:
                return probe_guard(session, build_tables(settings).purchases).guard
        finally:
            database.close()

    def execute(self, statement: str, *values: Any) -> list[Any]:
        cursor = self.connection.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []

    def tables(self) -> set[str]:
        return catalogue.tables(self.connection)

    def own_tables(self) -> set[str]:
        return self.tables() - {f"public.{VERSION_TABLE}"}

    def snapshot(self) -> dict[str, Any]:
        return catalogue.snapshot(self.connection)

    def indexes(self, table: str = "purchases") -> dict[str, bool]:
        """Names, and whether each is valid."""
        return {row[0]: row[2] for row in catalogue.describe(self.connection, table)["indexes"]}

    def revisions(self) -> set[str]:
        return {revision for (revision,) in self.execute(f"SELECT version_num FROM {VERSION_TABLE}")}


@pytest.fixture
def make_site(make_url: Callable[[str | None], str], request: pytest.FixtureRequest) -> Callable[[str | None], Site]:
    def make(template: str | None) -> Site:
        url = make_url(template)
        connection = psycopg.connect(servers.libpq(url), autocommit=True)
        request.addfinalizer(connection.close)
        return Site(url, connection)

    return make


@pytest.fixture
def empty(make_site: Callable[[str | None], Site]) -> Site:
    """A database without a table."""
    return make_site(None)


@pytest.fixture
def migrated(make_site: Callable[[str | None], Site]) -> Site:
    """core@head, no option."""
    return make_site("lock")


@pytest.fixture
def stock(migrated: Site) -> Shop:
    """Rows for the migrated database."""
    return Shop(migrated.connection)


def fill(shop: Shop) -> None:
    """At least one row in every table."""
    payment, event_id = shop.paid()
    shop.purchase(payment)
    shop.mark(event_id)
    shop.dead_letter(payment)
    shop.rows("INSERT INTO workers (id, host, pid, version, guard) VALUES (%s, 'h', 1, '0', 'index')", uuid4())
    shop.rows(
        "INSERT INTO backfill_runs (id, kind, cutoff, is_full, host, pid, actor)"
        " VALUES (%s, 'operator', clock_timestamp(), true, 'h', 1, 'somebody')",
        uuid4(),
    )


# --- core


def test_an_empty_database_gets_all_tables_and_says_so(empty: Site) -> None:
    done = empty.migrate()
    assert empty.own_tables() == OWN
    assert len(done.created) == len(OWN)
    assert done.adopted == ()
    assert empty.guard() is Guard.LOCK


def test_twice_changes_nothing(empty: Site) -> None:
    empty.migrate("unique_index", "notify")
    before = empty.snapshot()
    done = empty.migrate("unique_index", "notify")
    assert done.created == ()
    assert empty.snapshot() == before


def test_a_table_that_was_dropped_is_not_said_to_be_created(migrated: Site) -> None:
    migrated.execute("DROP TABLE dead_letters")
    with pytest.raises(SchemaError, match=r"no public\.dead_letters"):
        migrated.migrate()
    assert migrated.own_tables() == OWN - {"public.dead_letters"}


def test_a_new_table_of_a_given_name_is_told_apart(empty: Site) -> None:
    """Where a table that exists was meant, its name was mistyped: people must see that an empty one was made."""
    empty.settings = {"tables": "outbox=events"}
    assert empty.migrate().named == ("public.events",)


def test_payments_that_are_named_and_absent_stop_it_before_anything_is_made(empty: Site) -> None:
    """An empty table in the place of a mistyped one would turn every event into a dead letter."""
    empty.settings = {"tables": "payments=paymentz"}
    with pytest.raises(SettingError, match=r"public\.paymentz.*Nothing was changed"):
        empty.migrate("unique_index")
    assert empty.tables() == set()


def test_the_version_table_is_our_own_and_the_shops_is_left_alone(empty: Site) -> None:
    empty.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    empty.execute("INSERT INTO alembic_version VALUES ('the_shops')")
    before = empty.snapshot()["public.alembic_version"]
    empty.migrate()
    assert empty.revisions() == {"core_0003"}
    assert empty.snapshot()["public.alembic_version"] == before
    empty.downgrade("core")
    assert empty.snapshot()["public.alembic_version"] == before


def test_down_on_empty_tables_leaves_nothing(migrated: Site) -> None:
    migrated.downgrade("core")
    assert migrated.own_tables() == set()
    assert migrated.revisions() == set()
    migrated.migrate()
    assert migrated.own_tables() == OWN


def test_down_on_full_tables_loses_no_row_and_up_again_finds_them(migrated: Site, stock: Shop) -> None:
    fill(stock)
    before = migrated.snapshot()
    migrated.downgrade("core")
    migrated.migrate()
    assert migrated.snapshot() == before


def test_an_installation_of_the_first_revision_gets_what_came_since(migrated: Site, stock: Shop) -> None:
    """Our own tables are altered by the migrations; that they do not fit before is no reason to refuse."""
    fill(stock)
    stock.rows("ALTER TABLE workers DROP COLUMN succeeded_at")
    stock.rows("DROP TABLE backfill_runs")
    stock.rows("UPDATE outbox_worker_alembic_version SET version_num = 'core_0001' WHERE version_num = 'core_0003'")
    assert migrated.migrate().created == ("public.backfill_runs",)
    assert stock.rows("SELECT succeeded_at FROM workers") == [(None,)]


def test_a_table_of_ours_that_was_spoilt_is_told_after_the_migrations(migrated: Site, stock: Shop) -> None:
    stock.rows("ALTER TABLE workers DROP COLUMN guard")
    with pytest.raises(SchemaError, match=r"yet tables do not fit.*\n.*workers\.guard is missing"):
        migrated.migrate()


@pytest.mark.parametrize("kept", COLUMNS)
def test_down_keeps_just_the_table_that_holds_a_row(migrated: Site, stock: Shop, kept: str) -> None:
    fill(stock)
    for role in set(COLUMNS) - {kept}:
        stock.rows(f"DELETE FROM {role}")
    migrated.downgrade("core")
    assert migrated.own_tables() == {f"public.{kept}"}
    assert stock.count(kept) == 1


# --- adoption

SHOPS_PURCHASES = """
    CREATE TABLE purchases (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        student_id uuid NOT NULL,
        course_id uuid NOT NULL,
        payment_id uuid CONSTRAINT one_per_payment UNIQUE,
        amount numeric(10,2) NOT NULL,
        currency char(3) NOT NULL DEFAULT 'USD',
        is_active boolean NOT NULL DEFAULT true,
        created_at timestamptz NOT NULL DEFAULT now(),
        deactivated_at timestamptz,
        sales_channel varchar(20) NOT NULL DEFAULT 'web' CHECK (sales_channel <> ''),
        tenant int NOT NULL DEFAULT 1
    );
    CREATE INDEX shop_by_course ON purchases (course_id, created_at DESC) WHERE is_active;
    COMMENT ON TABLE purchases IS 'the shop''s own';
    CREATE FUNCTION shop_touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER touch BEFORE UPDATE ON purchases FOR EACH ROW EXECUTE FUNCTION shop_touch();
    INSERT INTO purchases (student_id, course_id, payment_id, amount)
    SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 9.90 FROM generate_series(1, 3);
"""


@pytest.fixture
def adopting(empty: Site) -> Site:
    """A database in which another application made ``purchases``."""
    empty.execute(SHOPS_PURCHASES)
    return empty


def test_an_adopted_table_stays_as_it_was(adopting: Site) -> None:
    before = adopting.snapshot()["public.purchases"]
    done = adopting.migrate()
    assert done.adopted == ("public.purchases",)
    assert set(done.created) == OWN - {"public.purchases"}
    assert adopting.snapshot()["public.purchases"] == before


def test_an_adopted_table_is_never_dropped_even_when_empty(adopting: Site) -> None:
    adopting.execute("TRUNCATE purchases")
    before = adopting.snapshot()
    adopting.migrate()
    adopting.downgrade("core")
    after = adopting.snapshot()
    after.pop(f"public.{VERSION_TABLE}")
    assert after == before


def test_an_adopted_table_takes_the_index_only_when_asked(adopting: Site) -> None:
    adopting.migrate()
    before = adopting.snapshot()["public.purchases"]
    adopting.migrate("unique_index")
    added = set(adopting.indexes()) - {row[0] for row in before["indexes"]}
    assert added == {PAIR_INDEX}
    assert adopting.guard() is Guard.INDEX


def test_up_and_down_leave_an_adopted_table_as_it_was(adopting: Site) -> None:
    adopting.migrate()
    before = adopting.snapshot()["public.purchases"]
    adopting.migrate("unique_index")
    adopting.downgrade("unique_index")
    assert adopting.snapshot()["public.purchases"] == before


def test_the_worker_can_settle_into_an_adopted_table(adopting: Site) -> None:
    adopting.migrate("unique_index")
    shop = Shop(adopting.connection)
    payment = shop.payment()
    shop.purchase(payment)
    assert shop.scalar("SELECT sales_channel FROM purchases WHERE payment_id = %s", payment.id) == "web"


SHOPS_PAYMENTS = """
    CREATE TABLE payments (
        id uuid PRIMARY KEY,
        user_id bigint NOT NULL,
        course_id text NOT NULL,
        amount numeric(10,2) NOT NULL,
        currency char(3) NOT NULL,
        status text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
"""


@pytest.mark.parametrize("options", [(), ("unique_index",)], ids=["lock", "index"])
def test_students_and_courses_may_be_numbers_and_texts(empty: Site, options: tuple[str, ...]) -> None:
    """Purchases are made to fit the payments that are there; what nobody reads is not asked for."""
    empty.execute(SHOPS_PAYMENTS)
    empty.settings = {"columns": "payments.student_id=user_id"}
    assert empty.migrate(*options).adopted == ("public.payments",)
    empty.execute(
        "INSERT INTO payments (id, user_id, course_id, amount, currency, status)"
        " SELECT gen_random_uuid(), n / 2, 'SQL', 9.90, 'EUR', 'succeeded' FROM generate_series(0, 9) AS n"
    )
    empty.execute(
        "INSERT INTO outbox (event_id, event_type, payload) SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED',"
        " jsonb_build_object('payment_id', id, 'student_id', user_id, 'course_id', course_id) FROM payments"
    )
    assert empty.drain() == {Outcome.CREATED: 5, Outcome.DUPLICATE_PAYMENT: 5}
    assert empty.execute("SELECT student_id, course_id FROM purchases ORDER BY 1") == [(n, "SQL") for n in range(5)]
    empty.execute(
        "INSERT INTO outbox (event_id, event_type, payload) SELECT gen_random_uuid(), 'PURCHASE_CONFIRMED',"
        " jsonb_build_object('payment_id', gen_random_uuid(), 'course_id', 'sql') FROM payments LIMIT 1"
    )
    empty.execute(
        "INSERT INTO payments (id, user_id, course_id, amount, currency, status)"
        " SELECT CAST(payload ->> 'payment_id' AS uuid), 9, 'SQL', 9.90, 'EUR', 'succeeded' FROM outbox"
    )
    assert empty.drain() == {Outcome.DEAD: 1}, "another text is another course"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ALTER TABLE payments ALTER amount TYPE int", r"payments\.amount is int4, not numeric.*not cents"),
        ("ALTER TABLE payments RENAME user_id TO buyer_id", r"payments\.user_id is missing\n.*did you mean buyer_id"),
        ("ALTER TABLE payments ALTER created_at TYPE text", r"created_at is text, not timestamp"),
        ("CREATE TABLE purchases (LIKE payments)", r"purchases\.student_id is missing"),
        (
            "CREATE TABLE purchases (id uuid DEFAULT gen_random_uuid(), student_id uuid, course_id uuid,"
            " payment_id uuid, amount numeric, currency text, is_active bool, created_at timestamptz,"
            " deactivated_at timestamptz)",
            r"payments\.user_id is int8 and public\.purchases\.student_id is uuid(.|\n)*course_id is text",
        ),
    ],
    ids=["cents", "another name", "another type", "purchases of another form", "pairs of another kind"],
)
def test_tables_that_do_not_fit_stop_it_before_anything_is_made(empty: Site, change: str, said: str) -> None:
    empty.execute(SHOPS_PAYMENTS)
    empty.execute(change)
    empty.settings = {"columns": "payments.student_id=user_id"}
    before = empty.tables()
    with pytest.raises(SchemaError, match=said):
        empty.migrate()
    assert empty.tables() == before


# --- unique_index


def test_the_unique_index_replaces_the_look_up_index_and_back(migrated: Site) -> None:
    before = migrated.snapshot()
    assert PAIR_LOOKUP_INDEX in migrated.indexes()
    migrated.migrate("unique_index")
    assert migrated.indexes()[PAIR_INDEX] is True
    assert PAIR_LOOKUP_INDEX not in migrated.indexes()
    assert migrated.guard() is Guard.INDEX
    migrated.downgrade("unique_index")
    assert migrated.snapshot() == before
    assert migrated.guard() is Guard.LOCK


def test_duplicates_stop_the_unique_index_and_are_listed(migrated: Site, stock: Shop) -> None:
    twice, thrice = uuid4(), uuid4()
    course = uuid4()
    for student, times in ((twice, 2), (thrice, 3)):
        for _ in range(times):
            stock.purchase(student=student, course=course)
        stock.purchase(student=student, course=course, active=False)
    once = stock.payment()
    stock.purchase(once)
    before = migrated.snapshot()
    with pytest.raises(Refused) as caught:
        migrated.migrate("unique_index")
    told = str(caught.value)
    assert f"student {twice}, course {course}: 2 active purchases" in told
    assert f"student {thrice}, course {course}: 3 active purchases" in told
    assert str(once.student_id) not in told
    assert "and more" not in told
    assert migrated.snapshot() == before


def test_many_duplicates_are_not_all_listed(migrated: Site, stock: Shop) -> None:
    stock.rows(
        "INSERT INTO purchases (student_id, course_id, amount, currency)"
        " SELECT md5(CAST(i AS text))::uuid, md5('c')::uuid, 0, 'EUR'"
        " FROM generate_series(1, 21) i, generate_series(1, 2) n"
    )
    with pytest.raises(Refused) as caught:
        migrated.migrate("unique_index")
    assert str(caught.value).count("2 active purchases") == 20
    assert "and more" in str(caught.value)


def test_once_the_duplicates_are_gone_the_index_is_built(migrated: Site, stock: Shop) -> None:
    gift = stock.payment()
    stock.purchase(gift)
    extra = stock.purchase(student=gift.student_id, course=gift.course_id)
    with pytest.raises(Refused):
        migrated.migrate("unique_index")
    stock.rows("UPDATE purchases SET is_active = false WHERE id = %s", extra)
    migrated.migrate("unique_index")
    assert migrated.guard() is Guard.INDEX


@pytest.fixture
def leftover(migrated: Site, stock: Shop) -> Site:
    """An INVALID index under our name, as a build leaves it that failed half-way; the duplicates are gone since."""
    pair = stock.payment()
    stock.purchase(pair)
    extra = stock.purchase(student=pair.student_id, course=pair.course_id)
    with pytest.raises(psycopg.errors.UniqueViolation):
        migrated.execute(
            f"CREATE UNIQUE INDEX CONCURRENTLY {PAIR_INDEX} ON purchases (student_id, course_id) WHERE is_active"
        )
    assert migrated.indexes()[PAIR_INDEX] is False
    stock.rows("UPDATE purchases SET is_active = false WHERE id = %s", extra)
    return migrated


def test_an_invalid_leftover_is_rebuilt(leftover: Site) -> None:
    assert leftover.guard() is Guard.LOCK
    leftover.migrate("unique_index")
    assert leftover.indexes()[PAIR_INDEX] is True
    assert leftover.guard() is Guard.INDEX


@pytest.mark.parametrize("option", ["unique_index", "notify"])
def test_an_option_that_was_lost_since_is_put_up_again(migrated: Site, option: str) -> None:
    """The version table remembers what was done, not what is there."""
    assert (migrated.migrate(option).built, migrated.migrate(option).found) == ((option,), (option,))
    before = migrated.snapshot()
    lost = {"unique_index": f"DROP INDEX {PAIR_INDEX}", "notify": f"DROP TRIGGER {NOTIFY_TRIGGER} ON outbox"}
    migrated.execute(lost[option])
    assert migrated.migrate(option).built == (option,)
    assert migrated.snapshot() == before


def test_a_trigger_that_was_disabled_is_enabled_again(migrated: Site) -> None:
    migrated.migrate("notify")
    before = migrated.snapshot()
    migrated.execute(f"ALTER TABLE outbox DISABLE TRIGGER {NOTIFY_TRIGGER}")
    assert migrated.migrate("notify").built == ("notify",)
    assert migrated.execute("SELECT tgenabled FROM pg_trigger WHERE tgname = %s", NOTIFY_TRIGGER) == [("O",)]
    assert migrated.snapshot() == before


@pytest.mark.parametrize("name", [PAIR_INDEX, PAIR_LOOKUP_INDEX])
def test_an_index_of_our_name_on_another_table_is_left_alone(adopting: Site, name: str) -> None:
    adopting.execute(f"CREATE TABLE notes (id int); CREATE INDEX {name} ON notes (id)")
    before = adopting.snapshot()["public.notes"]
    if name == PAIR_INDEX:
        with pytest.raises(Refused, match=f"{PAIR_INDEX} exists and is another index, on notes"):
            adopting.migrate("unique_index")
    else:
        adopting.migrate("unique_index")
    assert adopting.snapshot()["public.notes"] == before


def test_an_index_of_our_name_on_another_table_is_not_ours_either(migrated: Site) -> None:
    migrated.execute(f"CREATE TABLE notes (id int); CREATE INDEX {PAIR_INDEX} ON notes (id)")
    before = migrated.snapshot()
    with pytest.raises(Refused, match=f"{PAIR_INDEX} exists and is another index, on notes"):
        migrated.migrate("unique_index")
    assert migrated.snapshot() == before


@pytest.mark.parametrize("name", [PAIR_INDEX, PAIR_LOOKUP_INDEX])
def test_a_shops_own_index_of_our_name_is_left_alone(adopting: Site, name: str) -> None:
    adopting.execute(f"CREATE INDEX {name} ON purchases (course_id)")
    before = adopting.indexes()
    if name == PAIR_INDEX:
        with pytest.raises(Refused, match=f"{PAIR_INDEX} exists and is another index, on purchases"):
            adopting.migrate("unique_index")
        assert adopting.indexes() == before
    else:
        adopting.migrate("unique_index")
        assert adopting.indexes() == before | {PAIR_INDEX: True}


def test_a_lost_index_that_duplicates_keep_from_coming_back_changes_nothing(migrated: Site, stock: Shop) -> None:
    migrated.migrate("unique_index")
    migrated.execute(f"DROP INDEX {PAIR_INDEX}")
    pair = stock.payment()
    stock.purchase(pair)
    stock.purchase(student=pair.student_id, course=pair.course_id)
    before = migrated.snapshot()["public.purchases"]
    for _ in range(2):
        with pytest.raises(Refused, match="more than one active purchase"):
            migrated.migrate("unique_index")
        assert migrated.snapshot()["public.purchases"] == before


def test_an_invalid_leftover_and_duplicates_change_nothing(leftover: Site, stock: Shop) -> None:
    leftover.execute(f"DROP INDEX {PAIR_INDEX}")
    stock.rows("UPDATE purchases SET is_active = true")
    with pytest.raises(psycopg.errors.UniqueViolation):
        leftover.execute(
            f"CREATE UNIQUE INDEX CONCURRENTLY {PAIR_INDEX} ON purchases (student_id, course_id) WHERE is_active"
        )
    before = leftover.snapshot()
    with pytest.raises(Refused):
        leftover.migrate("unique_index")
    assert leftover.snapshot() == before


@pytest.mark.parametrize(
    ("columns", "predicate"),
    [
        ("student_id, course_id", "is_active"),
        ("student_id, course_id", "(is_active = true)"),
        ("student_id, course_id", "is_active IS TRUE"),
        ("course_id, student_id", "(is_active = true)"),
    ],
)
def test_an_index_of_another_form_is_recognised_and_not_made_twice(
    migrated: Site, columns: str, predicate: str
) -> None:
    migrated.execute(f"CREATE UNIQUE INDEX the_seeds ON purchases ({columns}) WHERE {predicate}")
    migrated.migrate("unique_index")
    assert PAIR_INDEX not in migrated.indexes()
    assert migrated.indexes()["the_seeds"] is True
    assert migrated.guard() is Guard.INDEX
    migrated.downgrade("unique_index")
    assert migrated.indexes()["the_seeds"] is True


@pytest.mark.parametrize(
    "definition",
    [
        "UNIQUE INDEX other ON purchases (student_id, course_id) WHERE is_active AND amount > 0",
        "UNIQUE INDEX other ON purchases (student_id, course_id, currency) WHERE is_active",
        "UNIQUE INDEX other ON purchases (student_id, payment_id) WHERE is_active",
        "UNIQUE INDEX other ON purchases (student_id, (course_id::text)) WHERE is_active",
        "UNIQUE INDEX other ON purchases (student_id, course_id) WHERE NOT is_active",
        "UNIQUE INDEX other ON purchases (student_id, course_id)",
        "INDEX other ON purchases (student_id, course_id) WHERE is_active",
    ],
)
def test_an_index_that_is_no_guard_is_not_taken_for_one(migrated: Site, definition: str) -> None:
    migrated.execute(f"CREATE {definition}")
    assert migrated.guard() is Guard.LOCK
    migrated.migrate("unique_index")
    assert migrated.indexes()[PAIR_INDEX] is True
    assert migrated.guard() is Guard.INDEX


# --- notify


def test_notify_tells_of_events_at_their_commit(migrated: Site, stock: Shop) -> None:
    migrated.migrate("notify")
    with psycopg.connect(servers.libpq(migrated.url), autocommit=True) as listener:
        listener.execute(f"LISTEN {NOTIFY_CHANNEL}")
        stock.pay_many(3)
        told = list(listener.notifies(timeout=5, stop_after=1))
        assert [(note.channel, note.payload) for note in told] == [(NOTIFY_CHANNEL, "public.outbox")]
        migrated.downgrade("notify")
        stock.pay_many(3)
        assert list(listener.notifies(timeout=0.2)) == []  # one statement told once, and none tells now


# --- branches


def has_index(site: Site) -> bool:
    return site.guard() is Guard.INDEX


def has_trigger(site: Site) -> bool:
    return bool(catalogue.describe(site.connection, "outbox")["triggers"])


STATES = {"unique_index": has_index, "notify": has_trigger}
ORDERS = list(permutations(STATES))


@pytest.mark.parametrize("up", ORDERS, ids="-".join)
@pytest.mark.parametrize("down", ORDERS, ids="-".join)
def test_options_are_independent_in_each_order(migrated: Site, up: tuple[str, ...], down: tuple[str, ...]) -> None:
    before = migrated.snapshot()
    here: set[str] = set()
    for option in up:
        migrated.migrate(option)
        here.add(option)
        assert {name for name, holds in STATES.items() if holds(migrated)} == here
    for option in down:
        migrated.downgrade(option)
        here.remove(option)
        assert {name for name, holds in STATES.items() if holds(migrated)} == here
    assert migrated.snapshot() == before


@pytest.mark.parametrize("option", STATES)
def test_core_goes_down_before_an_option(make_site: Callable[[str | None], Site], option: str) -> None:
    """Whoever goes back does not have to know an order."""
    site = make_site(None)
    site.migrate(option)
    site.downgrade("core")
    site.downgrade(option)
    assert site.own_tables() == set()
    assert site.revisions() == set()


def test_all_heads_at_once(empty: Site) -> None:
    """``alembic upgrade heads`` takes the branches in an order of its own."""
    empty.alembic(command.upgrade, "heads")
    assert empty.own_tables() == OWN
    assert empty.guard() is Guard.INDEX
    assert has_trigger(empty)


# --- two at once


PROCESS = """
import sys
from outbox_worker import migration
from outbox_worker.database import Database
from outbox_worker.schema import build_tables
from outbox_worker.settings import load_settings
from outbox_worker.telemetry import Telemetry
settings = load_settings(database_url=sys.argv[1])
database = Database(settings, deadline_seconds=None)
print("ready", flush=True)
sys.stdin.readline()
print(len(migration.upgrade(database, settings, build_tables(settings), ("unique_index", "notify")).created))
"""


def test_two_processes_at_once_on_an_empty_database(empty: Site, request: pytest.FixtureRequest) -> None:
    """Processes, because alembic's own globals forbid two threads."""
    both = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, empty.url],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        request.addfinalizer(process.kill)
        both.append(process)
    for process in both:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert sorted(int(created) for created, _ in told) == [0, len(OWN)]
    assert empty.own_tables() == OWN
    assert empty.guard() is Guard.INDEX


def test_a_second_migration_does_not_hinder_the_first_ones_concurrent_build(migrated: Site) -> None:
    """CREATE INDEX CONCURRENTLY waits for every older snapshot; one that waits for our lock must hold none."""
    with ThreadPoolExecutor(2) as pool, psycopg.connect(servers.libpq(migrated.url)) as holder:
        holder.execute("LOCK TABLE purchases IN SHARE MODE")  # the first build waits here, lock in hand
        both = [pool.submit(migrated.migrate, "unique_index") for _ in range(2)]
        deadline = monotonic() + 10
        building = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ~ 'CONCURRENTLY'"
        while not (migrated.execute(f"{building} AND wait_event_type = 'Lock' AND pid <> pg_backend_pid()")[0][0]):
            assert monotonic() < deadline, "nobody builds"
        holder.rollback()
        for each in both:
            each.result(timeout=30)
    assert migrated.indexes()[PAIR_INDEX] is True
    assert migrated.guard() is Guard.INDEX


# --- plain alembic


def test_plain_alembic_is_enough_to_run(empty: Site) -> None:
    """The command as a user types it at the top of a checkout."""
    done = subprocess.run(
        [Path(sys.executable).with_name("alembic"), "upgrade", "core@head"],
        cwd=ROOT,
        env=os.environ | {"OUTBOX_DATABASE_URL": empty.url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert empty.own_tables() == OWN
    assert empty.revisions() == {"core_0003"}


def test_plain_alembic_reads_the_settings(empty: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", empty.url)
    monkeypatch.setenv("OUTBOX_TABLES", "payments=billing.payment")
    command.upgrade(Config(ROOT / "alembic.ini"), "core@head")
    assert empty.own_tables() == OWN - {"public.payments"} | {"billing.payment"}
    command.downgrade(Config(ROOT / "alembic.ini"), "core@base")
    assert empty.own_tables() == set()


def test_plain_alembic_without_a_database_says_what_to_set() -> None:
    with pytest.raises(SettingError, match="OUTBOX_DATABASE_URL is not set"):
        command.upgrade(Config(ROOT / "alembic.ini"), "core@head")


def test_there_is_no_offline_mode() -> None:
    with pytest.raises(SystemExit, match="offline"):
        command.upgrade(Config(ROOT / "alembic.ini"), "core@head", sql=True)


# --- other names


def test_every_table_and_column_in_a_schema_of_its_own(empty: Site) -> None:
    empty.settings = {
        "schema": "work",
        "tables": {role: f'billing.The "{role}"' if role == "payments" else f"The {role}" for role in COLUMNS},
        "columns": {f"{role}.{key}": f"Select {key}" for role, keys in COLUMNS.items() for key in keys},
    }
    empty.make_named_payments()
    done = empty.migrate("unique_index", "notify")
    assert len(done.created) == len(COLUMNS) - 1
    assert done.adopted == ('billing."The ""payments"""',)
    expected = {'billing.The "payments"'} | {f"work.The {role}" for role in set(COLUMNS) - {"payments"}}
    assert empty.tables() == expected | {f"work.{VERSION_TABLE}"}
    assert empty.guard() is Guard.INDEX
    assert empty.migrate("unique_index", "notify").created == ()
    for branch in ("notify", "unique_index", "core"):
        empty.downgrade(branch)
    assert empty.tables() == {f"work.{VERSION_TABLE}", 'billing.The "payments"'}
