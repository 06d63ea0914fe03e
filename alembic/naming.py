"""Defines the names that the revisions use. Do not change these names, because old revisions depend on them.

This file and the revisions import nothing from ``outbox_worker``. ``env.py`` loads this file by its path and stores a
``Naming`` in ``context.config.attributes["naming"]``, where the revisions find it. The directory is not a package,
because a package with the name ``alembic`` would hide the library.

This file must not contain ``from __future__ import annotations``. With this import, ``dataclass`` would search for this
module in ``sys.modules``, but a module that was loaded by its path is not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy.dialects import postgresql


class RevisionRefused(CommandError):
    """A refusal to run a revision. The message says what a person must do first. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class TableNaming:
    """The names of one table, its columns, and the indexes and the trigger that the migrations create."""

    schema: str
    table: str
    columns: Mapping[str, str]
    """The columns that have other names in the user's database: a mapping from key to name."""
    list_schema: str
    """The schema of the list of our tables, ``ownership_list``."""

    owned: ClassVar[str] = "purchase-outbox-worker: created by its migrations"
    """The comment on tables that our migrations created."""
    pair_index: ClassVar[str] = "purchases_active_student_course_key"
    """The unique index of the branch ``unique_index``."""
    pair_lookup_index: ClassVar[str] = "purchases_active_student_course_idx"
    """The plain index that finds the purchase of a pair while the unique index does not exist."""
    ownership_list: ClassVar[str] = "outbox_worker_tables"
    """The table that lists the tables that our migrations created. The revision ``core_0005`` creates it."""
    notify_channel: ClassVar[str] = "outbox_worker"
    notify_trigger: ClassVar[str] = "outbox_worker_notify"
    """The name of the trigger of the branch ``notify``, and of the function of the trigger."""

    def column(self, key: str) -> str:
        return self.columns.get(key, key)

    @property
    def relation(self) -> str:
        """The qualified name of the table for SQL and ``to_regclass``, quoted if needed."""
        return _qualified(self.schema, self.table)

    @property
    def list_relation(self) -> str:
        """The qualified name of the list of our tables, quoted if needed."""
        return _qualified(self.list_schema, self.ownership_list)

    def is_owned(self, bind: sa.Connection) -> bool:
        """Return whether our migrations created the table. The migrations never alter or drop a table of others.

        The comment of the table decides, or the list of our tables, which also survives a restore without comments.
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

    def refuse(self, reason: str) -> NoReturn:
        raise RevisionRefused(reason)


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of the schema, tables and columns that the user set in the settings."""

    schema: str
    tables: Mapping[str, str]
    """The tables that have other names: a mapping from role to name. A name may contain a schema."""
    columns: Mapping[str, str]
    """The columns that have other names: a mapping from role and key, such as ``payments.student_id``, to name."""

    def of(self, role: str) -> TableNaming:
        schema, _, table = self.tables.get(role, role).rpartition(".")
        mine = {key.removeprefix(f"{role}."): name for key, name in self.columns.items() if key.startswith(f"{role}.")}
        return TableNaming(schema or self.schema, table, mine, self.schema)


def _qualified(schema: str, name: str) -> str:
    preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    return f"{preparer.quote_schema(schema)}.{preparer.quote(name)}"
