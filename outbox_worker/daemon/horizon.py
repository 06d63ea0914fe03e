"""Measures how long the vacuum horizon has stood still: rows that died since then stay, and claims walk over them."""

from __future__ import annotations

import time

from sqlalchemy import text
from sqlalchemy.orm import Session

# what: the oldest transaction that keeps dead rows of this database; NULL where nothing was written since it began
# lock: none · bounded by the server's connections, slots and prepared transactions, whose columns here all may see
# guard: server processes of their own (autovacuum) have no user, and hold nothing
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
    """Remembers since when the oldest transaction is the same: not every role may see when it began."""

    def __init__(self) -> None:
        self._oldest: str | None = None
        self._since = 0.0

    def stood_still_seconds(self, session: Session) -> float:
        """Seconds by this process's clock, at most since its first look; 0 if nothing holds the horizon."""
        oldest, now = session.scalar(_OLDEST), time.monotonic()
        if oldest is None or oldest != self._oldest:
            self._oldest, self._since = oldest, now
        return now - self._since
