"""Defines the names that the revisions use. Old revisions depend on these names: never change them.

This file and the revisions import nothing from ``outbox_worker``. ``env.py`` loads this file by its
path, and stores a ``Naming`` in ``context.config.attributes["naming"]``. The revisions read this
``Naming``. This directory is not a package. A package with the name ``alembic`` would hide the
library.

This file must not contain ``from __future__ import annotations``. With this import, ``dataclass``
would search for this module in ``sys.modules``. A module that was loaded by its path is not in
``sys.modules``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

_LOCK_MILLISECONDS = 500
"""The longest wait of ALTER TABLE for the lock of the table, in milliseconds.

The wait must be short. If ALTER TABLE waits, all new statements on the table also wait.
"""
_TRIES = 40
_LOCK_NOT_AVAILABLE = "55P03"

# what: the other processes that hold a lock on a table · lock: none · index: none, a function of the server
_HOLDERS = sa.text(
    """
    SELECT string_agg(DISTINCT CAST(pid AS text), ', ') FROM pg_locks
    WHERE relation = to_regclass(:relation) AND granted AND pid <> pg_backend_pid()
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """
)


class RevisionRefused(CommandError):
    """Raised if a revision must not run. The message says what a person must do first. The revision changed nothing."""


@dataclass(frozen=True, slots=True)
class TableNaming:
    """The names of one table, its columns, and the indexes and the trigger that the migrations create."""

    schema: str
    table: str
    columns: Mapping[str, str]
    """Maps the key of a column to its name in the user's database, if the name differs from the key."""
    list_schema: str
    """The schema that contains the table ``ownership_list``."""

    owned: ClassVar[str] = "purchase-outbox-worker: created by its migrations"
    """The comment on tables that our migrations created."""
    pair_index: ClassVar[str] = "purchases_active_student_course_key"
    """The name of the unique index that the branch ``unique_index`` builds."""
    pair_lookup_index: ClassVar[str] = "purchases_active_student_course_idx"
    """The name of the plain index that finds purchases by student and course.

    The worker needs this index only if no unique index exists.
    """
    ownership_list: ClassVar[str] = "outbox_worker_tables"
    """The name of the list of all tables that our migrations created.

    The revision ``core_0005`` creates the list.
    """
    notify_channel: ClassVar[str] = "outbox_worker"
    notify_trigger: ClassVar[str] = "outbox_worker_notify"
    """The name of the trigger and of the function that the branch ``notify`` creates."""

    def column(self, key: str) -> str:
        return self.columns.get(key, key)

    @property
    def relation(self) -> str:
        """The qualified name of the table for SQL and ``to_regclass``, quoted if needed."""
        return _qualified(self.schema, self.table)

    @property
    def list_relation(self) -> str:
        """The qualified name of the table ``ownership_list``, quoted if needed."""
        return _qualified(self.list_schema, self.ownership_list)

    def is_owned(self, bind: sa.Connection) -> bool:
        """Return whether our migrations created the table.

        The migrations never alter or drop a table of another application. A table is ours if it has
        our comment, or if ``ownership_list`` contains its name. The list is needed after a restore
        that lost the comments.
        """
        asked = sa.text(
            "SELECT obj_description(to_regclass(:name), 'pg_class') = :owned, to_regclass(:list) IS NOT NULL"
        )
        given = {"name": self.relation, "owned": self.owned, "list": self.list_relation}
        by_comment, has_list = bind.execute(asked, given).one()
        return bool(by_comment) or (has_list and self._is_listed(bind))

    def _is_listed(self, bind: sa.Connection) -> bool:
        listed = sa.table(
            self.ownership_list, sa.column("table_schema"), sa.column("table_name"), schema=self.list_schema
        )
        is_this = sa.and_(listed.c.table_schema == self.schema, listed.c.table_name == self.table)
        return bool(bind.scalar(sa.select(sa.exists().where(is_this))))

    def alter(self, bind: sa.Connection, actions: str) -> None:
        """Run ALTER TABLE. Wait only briefly for the lock, and try several times.

        Running workers therefore never wait long. If all tries fail, raises RevisionRefused. The
        message names the processes that hold the lock.
        """
        for _ in range(_TRIES):
            try:
                with bind.begin_nested():
                    bind.execute(sa.text(f"SET LOCAL lock_timeout = {_LOCK_MILLISECONDS}"))
                    bind.execute(sa.text(f"ALTER TABLE {self.relation} {actions}"))
                    bind.execute(sa.text("SET LOCAL lock_timeout = DEFAULT"))
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                    raise
                bind.execute(sa.text("SELECT pg_sleep(1)"))
            else:
                return
        holders = bind.scalar(_HOLDERS, {"relation": self.relation})
        self.refuse(
            f"{self.relation} was locked by other transactions in each of {_TRIES} tries"
            + (f" (now: processes {holders})" if holders else "")
            + ". The table was not changed. Run migrate again when no long transaction uses it."
        )

    def refuse(self, reason: str) -> NoReturn:
        raise RevisionRefused(reason)


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of the schema, tables and columns that the user set in the settings."""

    schema: str
    tables: Mapping[str, str]
    """Maps the role of a table to its name, if the name differs from the role.

    A name can contain a schema.
    """
    columns: Mapping[str, str]
    """Maps the role and key of a column, such as ``payments.student_id``, to its name, if the name differs."""

    def of(self, role: str) -> TableNaming:
        schema, _, table = self.tables.get(role, role).rpartition(".")
        mine = {key.removeprefix(f"{role}."): name for key, name in self.columns.items() if key.startswith(f"{role}.")}
        return TableNaming(schema or self.schema, table, mine, self.schema)


def _qualified(schema: str, name: str) -> str:
    preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    return f"{preparer.quote_schema(schema)}.{preparer.quote(name)}"
