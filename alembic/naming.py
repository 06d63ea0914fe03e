"""What the revisions call things. It is as frozen as they are, and like them it imports nothing of the program.

``env.py`` loads this file by its path and puts one ``Naming`` into the attribute ``naming`` of alembic's configuration;
a revision takes it from there. The folder is no package, because one called ``alembic`` would hide the library, and the
file is not on the path for modules, where another ``naming`` may be.

Annotations are evaluated here: ``dataclass`` looks postponed ones up in ``sys.modules``, where a module that is loaded
by its path is not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import sqlalchemy as sa
from alembic.util import CommandError
from sqlalchemy.dialects import postgresql


class RevisionRefused(CommandError):
    """A person must settle something before the revision can run; the message says what. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class TableNaming:
    """What the database calls one table and its columns, and what the migrations call what they make beside them."""

    schema: str
    table: str
    columns: Mapping[str, str]
    """By their keys, the columns that have another name in the database."""

    owned: ClassVar[str] = "purchase-outbox-worker: created by its migrations"
    """Comment on the tables that our migrations made."""
    pair_index: ClassVar[str] = "purchases_active_student_course_key"
    """The unique index of the branch ``unique_index``."""
    pair_lookup_index: ClassVar[str] = "purchases_active_student_course_idx"
    """Finds a pair's purchase while that unique index is not there."""
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
        """Whether our migrations made the table; otherwise it is adopted: never altered, never dropped."""
        asked = sa.text("SELECT obj_description(to_regclass(:name), 'pg_class') = :owned")
        return bool(bind.scalar(asked, {"name": self.relation, "owned": self.owned}))

    def refuse(self, reason: str) -> NoReturn:
        raise RevisionRefused(reason)


@dataclass(frozen=True, slots=True)
class Naming:
    """The names that the user gives in the settings."""

    schema: str
    tables: Mapping[str, str]
    """By their roles, the tables that have another name; it may bring its own schema: ``billing.payment``."""
    columns: Mapping[str, str]
    """By role and key, as in ``payments.student_id``, the columns that have another name."""

    def of(self, role: str) -> TableNaming:
        schema, _, table = self.tables.get(role, role).rpartition(".")
        mine = {key.removeprefix(f"{role}."): name for key, name in self.columns.items() if key.startswith(f"{role}.")}
        return TableNaming(schema or self.schema, table, mine)
