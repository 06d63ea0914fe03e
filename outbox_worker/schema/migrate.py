"""Runs the migrations. The migrations create missing tables.

An optional branch of the migrations creates an index or a trigger. The migrations never alter an
existing table of another application.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, MetaData, Table, text
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.errors import Refused, SchemaError, SettingError
from outbox_worker.schema.catalogue import exists, is_owned, is_partitioned, notifies, pair_indexes
from outbox_worker.schema.ownership import find_missing_rights
from outbox_worker.schema.partitions import why_no_pair_index
from outbox_worker.schema.requirements import find_misfits, list_problems
from outbox_worker.schema.tables import Tables, relation_name
from outbox_worker.schema.waiting import telling_waits
from outbox_worker.settings import Settings

VERSION_TABLE = "outbox_worker_alembic_version"
OPTIONAL_BRANCHES = ("unique_index", "notify")
"""The optional branches of the migrations.

Each branch works without the other branch, and can run while applications use the database.
"""


@dataclass(frozen=True, slots=True)
class Migrated:
    """The result of ``upgrade``."""

    created: tuple[str, ...]
    named: tuple[str, ...]
    """The created tables whose names come from OUTBOX_TABLES.

    Perhaps the user thought that these tables already existed.
    """
    adopted: tuple[str, ...]
    """Existing tables of other applications. The migrations did not change these tables."""
    built: tuple[str, ...]
    """Optional branches whose index or trigger this call created."""
    found: tuple[str, ...]
    """Optional branches whose index or trigger already existed."""


def upgrade(database: Database, settings: Settings, tables: Tables, options: Sequence[str] = ()) -> Migrated:
    """Upgrade the database to ``core@head``, and to the head of every branch in ``options``.

    A caller can run this function repeatedly, even in two processes at the same time. If somebody
    dropped the index or trigger of an option, this function creates it again.

    Raises SettingError if OUTBOX_TABLES names a payments table that does not exist. Raises
    SchemaError if this role lacks a right, or if an existing table does not fit. Raises Refused if
    duplicates or partitions prevent ``unique_index``.
    """
    with database.engine.connect() as connection:
        with _alone(connection):
            _expect_rights(connection, settings, tables, options)
            before = {role for role, table in tables.by_role().items() if exists(connection, table)}
            _expect_named_payments(settings, tables, before)
            _expect_fitting_tables(connection, tables)
            _expect_possible_index(connection, tables, options)
            found = [option for option in options if _in_force(connection, tables, option)]
            connection.rollback()
            config = _config(connection, settings)
            with telling_waits(database.engine, connection):
                command.upgrade(config, "core@head")
                for option in options:
                    _put_up(connection, config, tables, option)
        return _report(connection, settings, tables, before, options, found)


def _expect_rights(connection: Connection, settings: Settings, tables: Tables, options: Sequence[str]) -> None:
    """Raise an error if this role lacks rights that the migrations need.

    Without this check, PostgreSQL would raise an error in the middle of the migration. PostgreSQL's
    error would not name the owner or a remedy.
    """
    versions = Table(VERSION_TABLE, MetaData(), schema=settings.schema_name)
    if missing := find_missing_rights(connection, tables, versions, options):
        raise SchemaError(f"This role may not migrate the database. Nothing was changed.\n{list_problems(missing)}")


def _expect_named_payments(settings: Settings, tables: Tables, present: set[str]) -> None:
    """Raise an error if OUTBOX_TABLES names a payments table that does not exist.

    The name probably contains a typing error. An empty new table would hide this error.
    """
    if "payments" in settings.tables and "payments" not in present:
        raise SettingError(
            f"OUTBOX_TABLES says that the payments are in {relation_name(tables.payments)}, but this database has no "
            "such table. Correct the name, or create the table first. Nothing was changed."
        )


def _expect_fitting_tables(connection: Connection, tables: Tables) -> None:
    """Raise an error if a table of another application does not fit.

    The migrations never alter tables of other applications.
    """
    if misfits := find_misfits(Session(connection), tables, of_others=True):
        raise SchemaError(f"Existing tables do not fit. Nothing was changed.\n{list_problems(misfits)}")


def _expect_possible_index(connection: Connection, tables: Tables, options: Sequence[str]) -> None:
    """Raise an error if the option ``unique_index`` is given, but purchases is partitioned.

    PostgreSQL would refuse to build the index.
    """
    purchases = tables.purchases
    if "unique_index" not in options or not is_partitioned(connection, purchases):
        return
    if not pair_indexes(connection, purchases):
        raise Refused(
            f"The unique index cannot be built: {why_no_pair_index(purchases)}. Run migrate without "
            "--with unique_index. Nothing was changed."
        )


def _in_force(connection: Connection, tables: Tables, option: str) -> bool:
    """Return whether the index or trigger of an option exists. Do not ask the version table."""
    if option == "unique_index":
        return bool(pair_indexes(connection, tables.purchases))
    return notifies(connection, tables.outbox)


def _put_up(connection: Connection, config: Config, tables: Tables, option: str) -> None:
    command.upgrade(config, f"{option}@head")
    if not _in_force(connection, tables, option):
        connection.rollback()
        command.stamp(config, f"{option}@base")
        command.upgrade(config, f"{option}@head")
    connection.rollback()


def _report(
    connection: Connection,
    settings: Settings,
    tables: Tables,
    before: set[str],
    options: Sequence[str],
    found: Sequence[str],
) -> Migrated:
    names = {role: relation_name(table) for role, table in tables.by_role().items()}
    present = {role: table for role, table in tables.by_role().items() if exists(connection, table)}
    if absent := [name for role, name in names.items() if role not in present]:
        raise SchemaError(
            f"The version table says that the migrations have run, but there is no {', '.join(absent)}. If the "
            "table was dropped, restore it. If it has another name, set OUTBOX_TABLES."
        )
    if misfits := find_misfits(Session(connection), tables):
        raise SchemaError(f"The migrations have run, but tables do not fit.\n{list_problems(misfits)}")
    created = [role for role in present if role not in before]
    adopted = [role for role, table in present.items() if not is_owned(connection, table)]
    return Migrated(
        created=tuple(names[role] for role in created),
        named=tuple(names[role] for role in created if role in settings.tables),
        adopted=tuple(names[role] for role in adopted),
        built=tuple(option for option in options if option not in found),
        found=tuple(found),
    )


def _config(connection: Connection, settings: Settings) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(connection=connection, settings=settings)
    return config


def _scripts() -> Path:
    """Return the directory of the revisions.

    The directory is in the installed package, or at the top of a checkout.
    """
    packaged = Path(__file__).parents[1] / "migrations"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "alembic"


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Make any other migration of the same database wait until this migration has ended."""
    key = {"key": VERSION_TABLE}
    _wait_for_turn(connection, key)
    try:
        yield
    finally:
        connection.rollback()
        connection.execute(text("SELECT pg_advisory_unlock(hashtextextended(:key, 0))"), key)
        connection.commit()


def _wait_for_turn(connection: Connection, key: dict[str, str]) -> None:
    """Try repeatedly to get the lock that only one migration at a time can have.

    A statement that waits for the lock would keep a snapshot open. CREATE INDEX CONCURRENTLY in the
    other migration would wait for this snapshot. The two migrations would then block each other.
    """
    while not connection.scalar(text("SELECT pg_try_advisory_lock(hashtextextended(:key, 0))"), key):
        connection.commit()
        time.sleep(0.1)
    connection.commit()
