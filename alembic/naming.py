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

    owned: ClassVar[str] = "purchase-outbox-worker: created by its migrations"
    """The comment on tables that our migrations created."""
    pair_index: ClassVar[str] = "purchases_active_student_course_key"
    """The unique index of the branch ``unique_index``."""
    pair_lookup_index: ClassVar[str] = "purchases_active_student_course_idx"
    """The plain index that finds the purchase of a pair while the unique index does not exist."""
    notify_channel: ClassVar[str] = "outbox_worker"
    notify_trigger: ClassVar[str] = "outbox_worker_notify"
    """The name of the trigger of the branch ``notify``, and of the function of the trigger."""

    def column(self, key: str) -> str:
        return self.columns.get(key, key)

    @property
    def relation(self) -> str:
        """The qualified name of the table for SQL and ``to_regclass``, quoted if needed."""
        preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
        return f"{preparer.quote_schema(self.schema)}.{preparer.quote(self.table)}"

    def is_owned(self, bind: sa.Connection) -> bool:
        """Return whether our migrations created the table. The migrations never alter or drop a table of others."""
        asked = sa.text("SELECT obj_description(to_regclass(:name), 'pg_class') = :owned")
        return bool(bind.scalar(asked, {"name": self.relation, "owned": self.owned}))

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
        return TableNaming(schema or self.schema, table, mine)
