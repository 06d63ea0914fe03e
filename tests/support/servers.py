"""Provides the PostgreSQL of the tests: a given URL, Docker or the embedded server, in this order.

A run of the tests has one server. With pytest-xdist, the controller owns the server and passes its
address to the xdist workers. So the server runs exactly as long as the run, and needs no lock and
no shared directory.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psycopg
from psycopg import sql
from sqlalchemy import URL, make_url

from outbox_worker.database.engine import Database
from outbox_worker.embedded import server as embedded
from outbox_worker.schema import migrate as migration
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import load_settings
from tests.support.factories import Shop

DOCKER_IMAGE = "postgres:18"
QUIET = {"autovacuum_naptime": "1h", "checkpoint_timeout": "1h"}
"""Prevents background work during a test. By default, autovacuum visits a database every minute."""
HISTORY = {"track_commit_timestamp": "on"}
"""Records in which order transactions became visible (see ``history``)."""
VOLATILE = "postgres -c fsync=off -c synchronous_commit=off -c full_page_writes=off -c max_connections=200"
TEMPLATES: Mapping[str, tuple[str, ...]] = {"index": ("unique_index",), "lock": ()}
"""One migrated database per guard (how a second purchase is prevented). Each test gets a clone.
``empty`` needs no template."""


def libpq(url: str) -> str:
    """Return the URL in the form that psycopg accepts."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def with_database(url: str, name: str) -> str:
    """Return the URL of a different database on the same server."""
    return make_url(url).set(drivername="postgresql+psycopg", database=name).render_as_string(hide_password=False)


@dataclass(frozen=True)
class Server:
    """A running server: a URL whose role can create databases, and the name prefix of this run's
    databases."""

    url: str
    run: str

    def create(self, name: str, template: str | None = None) -> str:
        """Create a database, empty or as a clone of this run's template. Return its URL."""
        source = f"{self.run}_{template}" if template else "template0"
        self._execute("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY", name, source)
        return with_database(self.url, name)

    def drop(self, name: str) -> None:
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def make_templates(self) -> None:
        for guard, options in TEMPLATES.items():
            settings = load_settings(database_url=self.create(f"{self.run}_{guard}"))
            database = Database(settings, deadline_seconds=None)
            try:
                migration.upgrade(database, settings, build_tables(settings), options)
            finally:
                database.close()
            self._execute("ALTER DATABASE {} ALLOW_CONNECTIONS false", f"{self.run}_{guard}")

    def make_template(self, name: str, source: str, fill: Callable[[Shop], None]) -> None:
        """Create a template from a different template. The first caller creates it, and the others
        wait."""
        wanted = f"{self.run}_{name}"
        with psycopg.connect(libpq(self.url), autocommit=True) as connection:
            connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [wanted])
            if connection.execute("SELECT FROM pg_database WHERE datname = %s", [wanted]).rowcount:
                return
            url = self.create(f"{wanted}_half_made", source)
            with psycopg.connect(libpq(url), autocommit=True) as filling:
                fill(Shop(filling))
            self._execute("ALTER DATABASE {} ALLOW_CONNECTIONS false", f"{wanted}_half_made")
            self._execute("ALTER DATABASE {} RENAME TO {}", f"{wanted}_half_made", wanted)

    def drop_all(self) -> None:
        """Drop every database of this run."""
        with psycopg.connect(libpq(self.url)) as connection:
            names = connection.execute("SELECT datname FROM pg_database WHERE starts_with(datname, %s)", [self.run])
            for (name,) in names.fetchall():
                self.drop(name)

    def _execute(self, statement: str, *names: str) -> None:
        with psycopg.connect(libpq(self.url), autocommit=True, connect_timeout=10) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


class Source(Protocol):
    """A way to get a server."""

    def describe(self) -> str:
        """Return the source and the version for the header of the report. Start no server."""
        ...

    def start(self) -> str:
        """Start the server if the tests own it, and return its URL."""
        ...

    def stop(self) -> None: ...


def make_directory() -> Path:
    """Make a directory for a server. Use memory if it has room, because files cost a fifth of the
    time there."""
    memory = Path("/dev/shm")  # noqa: S108 - the directory inside is private
    has_room = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * 1024**3
    return Path(tempfile.mkdtemp(prefix="outbox-test-", dir=memory if has_room else None))


@dataclass
class Given:
    url: str

    def describe(self) -> str:
        url = make_url(self.url)
        return f"{url.host or url.query.get('host', 'local')}, {self._version()} (OUTBOX_TEST_DATABASE_URL)"

    def _version(self) -> str:
        try:
            with psycopg.connect(libpq(self.url), connect_timeout=5) as connection:
                return f"PostgreSQL {connection.info.parameter_status('server_version')}"
        except psycopg.Error:
            return "not reachable"

    def start(self) -> str:
        return self.url

    def stop(self) -> None:
        """Do nothing, because the tests do not own this server."""


@dataclass
class Docker:
    container: Any = None

    def describe(self) -> str:
        return f"Docker, {DOCKER_IMAGE}, durability off"

    def start(self) -> str:
        from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415 - slow, and only needed here

        with _leaks_forgiven():
            command = " ".join([VOLATILE, *(f"-c {name}={value}" for name, value in (QUIET | HISTORY).items())])
            self.container = PostgresContainer(DOCKER_IMAGE, driver="psycopg").with_command(command).start()
            url: str = self.container.get_connection_url()
        return url

    def stop(self) -> None:
        if self.container is not None:
            with _leaks_forgiven():
                self.container.stop()


@dataclass
class Embedded:
    bin_dir: Path | None
    directory: Path | None = None

    def describe(self) -> str:
        binaries = embedded.find_binaries(self.bin_dir)
        said = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"\d[\w.]*", said)
        return f"embedded, PostgreSQL {version.group() if version else said}, durability off ({binaries})"

    def start(self) -> str:
        self.directory = make_directory()
        where = embedded.ensure_server(self.directory / "pg", durable=False, bin_dir=self.bin_dir)
        query = {"host": where["host"], "port": where["port"]}
        url = URL.create("postgresql+psycopg", username=where["user"], database=where["dbname"], query=query)
        with psycopg.connect(**where, autocommit=True) as connection:  # type: ignore[arg-type]
            for name, value in (QUIET | HISTORY).items():
                connection.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), value))
        embedded.stop_server(self.directory / "pg")  # commit timestamps need a restart
        embedded.ensure_server(self.directory / "pg", durable=False, bin_dir=self.bin_dir)
        return url.render_as_string(hide_password=False)

    def stop(self) -> None:
        if self.directory is not None:
            embedded.stop_server(self.directory / "pg")
            shutil.rmtree(self.directory, ignore_errors=True)


def choose(environment: Mapping[str, str]) -> Source:
    """Return the source that the environment names, or the first available one. If the named source
    is not available, raise LookupError."""
    url, wanted = environment.get("OUTBOX_TEST_DATABASE_URL"), environment.get("OUTBOX_TEST_PG")
    bin_dir = environment.get("OUTBOX_TEST_PG_BIN")
    makers: dict[str, Callable[[], Source | None]] = {
        "url": lambda: Given(with_database(url, make_url(url).database or "postgres")) if url else None,
        "docker": lambda: Docker() if docker_answers() else None,
        "embedded": lambda: Embedded(Path(bin_dir) if bin_dir else None),
    }
    if wanted and wanted not in makers:
        raise LookupError(f"OUTBOX_TEST_PG={wanted}: choose url, docker or embedded")
    for name in [wanted] if wanted else [*makers]:
        source = makers[name]()
        if source is not None:
            return source
    missing = {"url": "OUTBOX_TEST_DATABASE_URL is not set", "docker": "Docker does not answer within 2 s"}
    raise LookupError(f"OUTBOX_TEST_PG={wanted}, but {missing[wanted or 'url']}")


def docker_answers() -> bool:
    """Ping Docker for at most 2 s. If the engine hangs, testcontainers fails only after a
    minute."""
    import docker  # type: ignore[import-untyped]  # noqa: PLC0415 - slow, and only needed here

    with _leaks_forgiven():
        try:
            client = docker.DockerClient.from_env(timeout=2)
        except docker.errors.DockerException:
            return False
        try:
            return bool(client.ping())
        except (docker.errors.DockerException, OSError):
            return False
        finally:
            client.close()


@contextlib.contextmanager
def _leaks_forgiven() -> Iterator[None]:
    """Ignore ResourceWarning, and collect garbage here, because the Docker client does not close
    its sockets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@dataclass
class Holder:
    """Holds the server of a run. The first call of ``get`` starts the server."""

    source: Source
    server: Server | None = field(default=None)

    def get(self) -> Server:
        if self.server is None:
            server = Server(self.source.start(), f"outbox_test_{secrets.token_hex(4)}")
            self.server = server
            server.make_templates()
        return self.server

    def close(self) -> None:
        """Drop all databases of this run and stop the server, even after a failed start."""
        server, self.server = self.server, None
        try:
            if server is not None:
                server.drop_all()
        finally:
            self.source.stop()
