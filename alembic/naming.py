"""Names that the revisions use. Do not change them: like the revisions, this file imports nothing of the program.

``env.py`` loads this file by its path and puts one ``Naming`` into the attribute ``naming`` of alembic's configuration,
from which the revisions take it. The folder is no package, because a package ``alembic`` would hide the library.

There is no ``from __future__ import annotations``: ``dataclass`` looks postponed annotations up in ``sys.modules``, and
a module that was loaded by its path is not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy.dialects import postgresql


class RevisionRefused(CommandError):
    """The revision cannot run before a person has done something; the message says what. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class TableNaming:
    """Names of one table and its columns in the database, and of the indexes and the trigger that migrations make."""

    schema: str
    table: str
    columns: Mapping[str, str]
    """The columns that have another name in the database, by key."""

    owned: ClassVar[str] = "purchase-outbox-worker: created by its migrations"
    """Comment on the tables that our migrations made."""
    pair_index: ClassVar[str] = "purchases_active_student_course_key"
    """The unique index of the branch ``unique_index``."""
    pair_lookup_index: ClassVar[str] = "purchases_active_student_course_idx"
    """The plain index that finds a pair's purchase as long as the unique index does not exist."""
    notify_channel: ClassVar[str] = "outbox_worker"
    notify_trigger: ClassVar[str] = "outbox_worker_notify"
    """The trigger of the branch ``notify``, and its function."""

    def column(self, key: str) -> str:
        return self.columns.get(key, key)

    @property
    def relation(self) -> str:
        """The qualified name, quoted, as SQL and ``to_regclass`` take it."""
        preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
        return f"{preparer.quote_schema(self.schema)}.{preparer.quote(self.table)}"

    def is_owned(self, bind: sa.Connection) -> bool:
        """Whether our migrations made the table. An adopted one is never altered or dropped."""
        asked = sa.text("SELECT obj_description(to_regclass(:name), 'pg_class') = :owned")
        return bool(bind.scalar(asked, {"name": self.relation, "owned": self.owned}))

    def refuse(self, reason: str) -> NoReturn:
        raise RevisionRefused(reason)


@dataclass(frozen=True, slots=True)
class Naming:
    """Names that the user gave in the settings."""

    schema: str
    tables: Mapping[str, str]
    """The tables that have another name, by role; a name may include a schema: ``billing.payment``."""
    columns: Mapping[str, str]
    """The columns that have another name, by role and key: ``payments.student_id``."""

    def of(self, role: str) -> TableNaming:
        schema, _, table = self.tables.get(role, role).rpartition(".")
        mine = {key.removeprefix(f"{role}."): name for key, name in self.columns.items() if key.startswith(f"{role}.")}
        return TableNaming(schema or self.schema, table, mine)
