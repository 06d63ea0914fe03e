"""Measures for how long the vacuum horizon has not moved.

The horizon is the oldest transaction that an open transaction or a replication slot still needs.
VACUUM cannot remove rows that were deleted after the horizon. Every claim must therefore skip the
index entries of these rows.
"""

from __future__ import annotations

import time

from sqlalchemy import text
from sqlalchemy.orm import Session

# what: the oldest transaction id that makes VACUUM keep dead rows of this database. The result is
# NULL if no transaction has written after the oldest one
# lock: none · index: none (one row per connection, slot and prepared transaction; every role may read these columns)
# The query skips processes of the server itself (autovacuum). These processes have no user and keep
# no dead rows
_OLDEST = text("""
    SELECT CAST(held AS text) FROM (
        SELECT unnest(ARRAY[backend_xid, backend_xmin]) FROM pg_stat_activity
        WHERE pid <> pg_backend_pid() AND usesysid IS NOT NULL AND coalesce(datname = current_database(), true)
        UNION ALL SELECT xmin FROM pg_replication_slots
        UNION ALL SELECT transaction FROM pg_prepared_xacts WHERE database = current_database()
    ) AS holders (held)
    WHERE age(held) > 0 ORDER BY age(held) DESC LIMIT 1
""")


class HorizonWatch:
    """Remembers since when the horizon has not moved.

    Some database roles cannot read when a transaction began.
    """

    def __init__(self) -> None:
        self._oldest: str | None = None
        self._since = 0.0

    def stood_still_seconds(self, session: Session) -> float:
        """Return for how many seconds all calls have found the same horizon. Return 0 if there is no horizon."""
        oldest, now = session.scalar(_OLDEST), time.monotonic()
        if oldest is None or oldest != self._oldest:
            self._oldest, self._since = oldest, now
        return now - self._since
