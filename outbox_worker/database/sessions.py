"""Finds out whether the server is a standby, and whether new sessions are read-only by default."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

# what: whether the server is a standby, and the age of the newest transaction that it has replayed
# lock: none
_STANDBY = text(
    "SELECT pg_is_in_recovery() AS is_standby, pg_last_xact_replay_timestamp() AS replayed_until,"
    " CAST(date_part('epoch', clock_timestamp() - pg_last_xact_replay_timestamp()) AS float) AS behind_seconds"
)

# what: where default_transaction_read_only was set to on (new sessions are read-only) · lock: none
_READ_ONLY = text(
    "SELECT source, quote_ident(session_user) AS role, quote_ident(current_database()) AS database FROM pg_settings"
    " WHERE name = 'default_transaction_read_only' AND reset_val = 'on'"
)

_PLACES = {
    "user": "for the role {role}",
    "database user": "for the role {role} in the database {database}",
    "database": "for the database {database}",
    "client": "in OUTBOX_DATABASE_URL or PGOPTIONS",
}
"""Maps ``pg_settings.source`` to the place where ``default_transaction_read_only`` was set.

For any other source, the parameter was set in the configuration of the server.
"""


@dataclass(frozen=True, slots=True)
class Standby:
    """Says how up to date a standby is.

    The standby has every transaction that was committed until ``replayed_until``.
    """

    replayed_until: datetime | None
    """The field is None if the standby has replayed no transaction since its start."""
    behind_seconds: float | None
    """The age of ``replayed_until``. The standby is at most this many seconds behind the primary.

    If the primary was idle, the standby is less behind.
    """


@dataclass(frozen=True, slots=True)
class ReadOnlyDefault:
    """The place where ``default_transaction_read_only`` was set to on, and a remedy."""

    place: str
    remedy: str
    """The statement that makes sessions of this role writable.

    If no statement can do this, the field contains a sentence with the remedy.
    """


def find_standby(session: Session | Connection) -> Standby | None:
    """Return how up to date a standby is. Return None if the server is a primary."""
    row = session.execute(_STANDBY).one()
    return Standby(row.replayed_until, row.behind_seconds) if row.is_standby else None


def find_read_only_default(session: Session | Connection) -> ReadOnlyDefault | None:
    """Return where ``default_transaction_read_only`` was set to on.

    Return None if the parameter is off.
    """
    row = session.execute(_READ_ONLY).one_or_none()
    if row is None:
        return None
    place = _PLACES.get(row.source, "for the server").format(role=row.role, database=row.database)
    if row.source == "client":
        return ReadOnlyDefault(place, "remove the option there")
    statement = f"ALTER ROLE {row.role} IN DATABASE {row.database} SET default_transaction_read_only = off;"
    return ReadOnlyDefault(place, statement)
