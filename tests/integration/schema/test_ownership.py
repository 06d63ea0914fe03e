"""A role without the privilege to migrate is told who owns what. The printed remedy works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from outbox_worker.errors import SchemaError
from outbox_worker.schema.migrate import VERSION_TABLE
from outbox_worker.schema.tables import OWNERSHIP_LIST
from tests.support import servers
from tests.support.installations import Installation

PASSWORD = "right"  # noqa: S105 - of roles that live as long as a test
Roles = dict[str, str]


@pytest.fixture
def roles(server: servers.Server) -> Iterator[Roles]:
    """Make the roles ``owner`` and ``migrator``, whose names need quotes. Drop them at the end."""
    suffix = uuid4().hex[:8]
    made = {role: f'The "{role}" {suffix}' for role in ("owner", "migrator")}
    with psycopg.connect(servers.libpq(server.url), autocommit=True) as connection:
        for name in made.values():
            connection.execute(
                sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), sql.Literal(PASSWORD))
            )
    yield made
    with psycopg.connect(servers.libpq(server.url), autocommit=True) as connection:
        for name in made.values():
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.fixture
def owned(empty: Installation, roles: Roles) -> Iterator[Installation]:
    """Make a schema that belongs to the owner, without any migration."""
    execute(empty, "CREATE SCHEMA work AUTHORIZATION {owner}", roles)
    empty.settings = {"schema": "work"}
    yield empty
    execute(empty, "DROP OWNED BY {owner}, {migrator}", roles)


def execute(site: Installation, statement: str, roles: Roles) -> None:
    site.connection.execute(sql.SQL(statement).format(**{role: sql.Identifier(name) for role, name in roles.items()}))


def as_role(site: Installation, name: str) -> Installation:
    url = make_url(site.url).set(username=name, password=PASSWORD).render_as_string(hide_password=False)
    other = Installation(url, site.connection)
    other.settings = site.settings
    return other


def refused(site: Installation, *options: str) -> str:
    before = site.snapshot()
    with pytest.raises(SchemaError) as caught:
        site.migrate(*options)
    assert "Nothing was changed" in str(caught.value)
    assert site.snapshot() == before
    return str(caught.value)


def follow(site: Installation, told: str) -> int:
    """Run every remedy as it is printed. Return how many there were."""
    found: list[str] = re.findall(r": (GRANT .*;)$", told, re.MULTILINE)
    for statement in found:
        site.connection.execute(statement)
    return len(found)


def test_a_schema_of_another_role(owned: Installation, roles: Roles) -> None:
    site = as_role(owned, roles["migrator"])
    told = refused(site)
    quoted = {role: '"' + name.replace('"', '""') + '"' for role, name in roles.items()}
    assert f"the schema work belongs to {quoted['owner']}, and {quoted['migrator']} may not create" in told
    assert follow(site, told) == 1
    assert site.migrate("unique_index", "notify").built == ("unique_index", "notify")


def test_tables_of_another_role(owned: Installation, roles: Roles) -> None:
    as_role(owned, roles["owner"]).migrate()
    site = as_role(owned, roles["migrator"])
    assert follow(site, refused(site)) == 1, "USAGE on the schema comes first: without it nothing else can be seen"
    told = refused(site, "unique_index", "notify")
    for table in (VERSION_TABLE, OWNERSHIP_LIST, "purchases", "outbox"):
        assert f"the table work.{table} belongs to " in told
    assert follow(site, told) == 4
    assert site.migrate("unique_index", "notify").built == ("unique_index", "notify")


def test_a_table_that_a_newer_version_alters(owned: Installation, roles: Roles) -> None:
    as_role(owned, roles["owner"]).migrate()
    execute(owned, "GRANT USAGE, CREATE ON SCHEMA work TO {migrator}", roles)
    execute(owned, f"GRANT ALL ON work.{VERSION_TABLE}, work.{OWNERSHIP_LIST} TO {{migrator}}", roles)
    owned.execute("ALTER TABLE work.workers DROP COLUMN succeeded_at")
    owned.execute(f"UPDATE work.{VERSION_TABLE} SET version_num = 'core_0001'")
    owned.execute("DROP TABLE work.backfill_runs")
    site = as_role(owned, roles["migrator"])
    told = refused(site)
    assert re.findall("the table (\\S+) belongs", told) == ["work.workers"]
    assert follow(site, told) == 1
    assert site.migrate().created == ("work.backfill_runs",)


def test_a_database_without_the_schema(empty: Installation, roles: Roles) -> None:
    empty.settings = {"schema": "work"}
    site = as_role(empty, roles["migrator"])
    told = refused(site)
    assert "there is no schema work" in told
    assert follow(site, told) == 1
    site.migrate()
    execute(empty, "DROP OWNED BY {migrator}", roles)


def test_public_belongs_to_the_owner_of_the_database(empty: Installation, roles: Roles) -> None:
    execute(empty, "REVOKE CREATE ON SCHEMA public FROM PUBLIC", roles)
    site = as_role(empty, roles["migrator"])
    told = refused(site)
    assert "pg_database_owner" not in told
    assert follow(site, told) == 1
    site.migrate("unique_index")
    execute(empty, "DROP OWNED BY {migrator}", roles)


def test_nobody_is_advised_to_become_a_superuser(migrated: Installation, roles: Roles) -> None:
    site = as_role(migrated, roles["migrator"])
    execute(migrated, "GRANT USAGE, CREATE ON SCHEMA public TO {migrator}", roles)
    told = refused(site, "unique_index")
    assert re.search(r"the table public\.purchases belongs to (\S+), .*\n    → run migrate as \1$", told, re.MULTILINE)
    assert follow(site, told) == 2, "write to the version table and to the list of our tables"
    site.migrate()
    execute(migrated, "DROP OWNED BY {migrator}", roles)
