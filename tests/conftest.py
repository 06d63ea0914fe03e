"""Fixtures for tests with a real PostgreSQL. Each test gets a clone of a migrated template
database.

``database_url`` is the URL of the clone. ``shop`` writes payments and events, ``processor`` settles
them, and ``drain`` settles until the outbox is empty. ``both_guards`` runs a test with and without
the unique index. ``site`` is a server that a test can break.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import psycopg
import pytest
from loguru import logger

from outbox_worker.database.engine import Database
from outbox_worker.decision import Limits, RetryPolicy
from outbox_worker.embedded import server as embedded
from outbox_worker.errors import OutboxWorkerError
from outbox_worker.model import Outcome
from outbox_worker.schema import migrate as migration
from outbox_worker.schema.requirements import check_schema
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings, load_settings
from outbox_worker.settle.handlers import HANDLED_TYPES
from outbox_worker.settle.isolation import Isolation
from outbox_worker.settle.pacing import Pacing
from outbox_worker.settle.processor import Processor
from outbox_worker.store.doors import Doors
from outbox_worker.store.guard import GuardWatch
from outbox_worker.store.workers import Workers
from outbox_worker.telemetry.reporter import Telemetry
from tests.support import servers
from tests.support.factories import Clerk, ProbedProcessor, Shop, drain_all
from tests.support.makers import MakeDatabase, MakeProcessor
from tests.support.sites import ROLE, Site

_HOLDER = pytest.StashKey[servers.Holder]()
_count = itertools.count(1)
_doors = functools.lru_cache(maxsize=4)(Doors.of)
"""Caches the statements of the worker, because rendering them took a quarter of the time of most
tests. They have no state. Each processor gets copies."""


def pytest_configure(config: pytest.Config) -> None:
    """Remove the developer's settings from the environment. Own the server, except in an xdist
    worker."""
    if not hasattr(config, "workerinput"):
        try:
            config.stash[_HOLDER] = servers.Holder(servers.choose(os.environ))
        except LookupError as error:
            raise pytest.UsageError(str(error)) from None
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell does so in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(200_000, 20, 100)  # collecting less often saves a tenth of the time
    for name in [name for name in os.environ if name.startswith("OUTBOX_") and not name.startswith("OUTBOX_TEST_")]:
        del os.environ[name]


def pytest_report_header(config: pytest.Config) -> str:
    return f"postgres: {config.stash[_HOLDER].source.describe()}" if _HOLDER in config.stash else ""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the address of the server to a new xdist worker."""
    server = _started(node.config)
    node.workerinput["outbox_server"] = (server.url, server.run)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _HOLDER in config.stash:
        config.stash[_HOLDER].close()


def _started(config: pytest.Config) -> servers.Server:
    """Start the server. If this fails, end the run with one message instead of an error per
    test."""
    try:
        return config.stash[_HOLDER].get()
    except (OutboxWorkerError, psycopg.OperationalError) as error:
        pytest.exit(f"no PostgreSQL for the tests: {error}", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> servers.Server:
    """The server of this run. ``.create(name, template)`` and ``.drop(name)`` create and drop
    databases."""
    given = getattr(request.config, "workerinput", None)
    return servers.Server(*given["outbox_server"]) if given else _started(request.config)


@pytest.fixture(params=["index", "lock"])
def both_guards(request: pytest.FixtureRequest) -> str:
    """Runs the test once with the unique index and once without it."""
    guard: str = request.param
    return guard


@pytest.fixture
def guard_kind(request: pytest.FixtureRequest) -> str:
    """The template that ``database_url`` clones. The default is ``index``. ``both_guards`` or an
    indirect parameter changes it."""
    if "both_guards" in request.fixturenames:
        return str(request.getfixturevalue("both_guards"))
    return str(getattr(request, "param", "index"))


@pytest.fixture
def make_url(server: servers.Server) -> Iterator[Callable[[str | None], str]]:
    """Create more databases. ``make_url("index" | "lock")`` clones a template, and
    ``make_url(None)`` creates an empty database."""
    with ExitStack() as stack:

        def make(template: str | None) -> str:
            name = f"{server.run}_{os.getpid()}_{next(_count)}"
            stack.callback(server.drop, name)
            return server.create(name, template)

        yield make


@pytest.fixture
def database_url(make_url: Callable[[str | None], str], guard_kind: str) -> str:
    """The URL of a migrated database for this test alone."""
    return make_url(guard_kind)


@pytest.fixture
def settings(database_url: str) -> Settings:
    return load_settings(database_url=database_url)


@pytest.fixture(scope="session")
def tables() -> Tables:
    """The tables with their default names. They have no state, so all tests share them."""
    return build_tables(Settings())


@pytest.fixture
def make_database(settings: Settings) -> Iterator[MakeDatabase]:
    """Makes more engines on the test's database, and closes them at the end."""
    with ExitStack() as stack:

        def make(*, connections: int = 4, deadline_seconds: float | None = 10) -> Database:
            database = Database(settings, connections=connections, deadline_seconds=deadline_seconds)
            stack.callback(database.close)
            return database

        yield make


@pytest.fixture
def database(make_database: MakeDatabase) -> Database:
    return make_database()


@pytest.fixture
def connect(database_url: str) -> Iterator[Callable[..., psycopg.Connection[Any]]]:
    """Opens connections to the test's database, and closes them at the end. Example:
    ``connect(autocommit=True)``."""
    with ExitStack() as stack:

        def make(**options: Any) -> psycopg.Connection[Any]:
            connection = psycopg.connect(servers.libpq(database_url), **options)
            stack.callback(connection.close)
            return connection

        yield make


@pytest.fixture
def shop(connect: Callable[..., psycopg.Connection[Any]]) -> Shop:
    return Shop(connect(autocommit=True))


@pytest.fixture(scope="session")
def site_template() -> Iterator[Site]:
    """A migrated server that does not run. ``site`` copies it."""
    given = os.environ.get("OUTBOX_TEST_PG_BIN")
    binaries = embedded.find_binaries(Path(given) if given else None)
    directory = servers.make_directory()
    made = Site(directory / "pg", binaries)
    settings = load_settings(database_url=made.url("postgres"))
    database = Database(settings, deadline_seconds=None)
    migration.upgrade(database, settings, build_tables(settings), ["unique_index"])
    database.close()
    made.execute(f"CREATE ROLE {ROLE} LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}")
    made.execute("ALTER SYSTEM SET fsync = off")  # tests kill processes, not machines
    embedded.stop_server(made.directory)
    yield made
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def site(site_template: Site) -> Iterator[Site]:
    """A migrated server for this test alone. The test can break it."""
    directory = servers.make_directory()
    made = Site(directory / "pg", site_template.binaries)
    shutil.copytree(site_template.directory, made.directory)
    yield made
    embedded.stop_server(made.directory)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def clerk(shop: Shop, database_url: str) -> Iterator[Clerk]:
    clerk = Clerk(shop, database_url)
    yield clerk
    clerk.close()


@pytest.fixture
def make_processor(settings: Settings, tables: Tables, database: Database) -> MakeProcessor:
    """Builds processors as the worker does. Each processor has a GuardWatch of its own that has
    probed the guard once."""
    default_database = database

    def make(
        batch_size: int = 1000,
        unknown_types: Literal["bury", "ignore"] = "bury",
        policy: RetryPolicy | None = None,
        database: Database | None = None,
        isolation: Isolation | None = None,
    ) -> ProbedProcessor:
        used, policy = database or default_database, policy or settings.retry_policy
        telemetry = Telemetry()
        watch = GuardWatch(tables.purchases, telemetry.guard_changed)
        with default_database.transaction() as session:
            found = check_schema(session, tables)
        default_database.close()  # leaves only the processor's connections open
        watch.know(found)
        with used.transaction() as session:
            watch.probe(session)
        doors = Doors._make(map(copy.copy, _doors(found, None if unknown_types == "bury" else HANDLED_TYPES)))
        isolation = isolation or Isolation(used, Workers(found, uuid4()))
        pacing = Pacing(Limits(policy, batch_size, 60))
        made = ProbedProcessor(used, doors, watch, telemetry, pacing, isolation, lambda: None)
        made.database, made.telemetry, made.watch, made.isolation = used, telemetry, watch, isolation
        made.path, made.outbox, made.repository = doors
        made.note_verdicts()
        return made

    return make


@pytest.fixture
def processor(make_processor: MakeProcessor) -> ProbedProcessor:
    return make_processor()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for workers that run at the same time. The test ends when all threads have ended."""
    with ThreadPoolExecutor(max_workers=8) as executor:
        yield executor


@pytest.fixture
def records() -> Iterator[list[dict[str, Any]]]:
    """A list that receives the fields of every log record."""
    found: list[dict[str, Any]] = []
    sink = logger.add(lambda message: found.append(message.record["extra"]), level="DEBUG")
    yield found
    logger.remove(sink)


@pytest.fixture
def drain() -> Callable[[Processor], Counter[Outcome]]:
    """``factories.drain_all``: settles until a claim is empty, and returns the count of each
    outcome."""
    return drain_all
