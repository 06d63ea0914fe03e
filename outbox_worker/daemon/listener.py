"""Listens for the notifications that the option ``notify`` sends when a producer commits new events.

The listener is optional. A claim loop that polls the outbox also finds every event.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import func, select

from outbox_worker.daemon.bell import Bell
from outbox_worker.database.engine import Database, connect_directly
from outbox_worker.database.retry import wait_out_outage
from outbox_worker.schema.tables import NOTIFY_CHANNEL, Tables
from outbox_worker.settings import Settings

TEST_SECONDS = 60.0
"""The seconds between two tests whether notifications arrive."""
_PATIENCE_SECONDS = 2.0


class Listener(threading.Thread):
    """Opens the direct connection that listens for notifications, and lends it to the ``bell``.

    The claim loops sleep at the ``bell``. While the connection is lost, no notifications arrive.
    Therefore the listener also rings the bell once after LISTEN. At each connect and then every
    ``TEST_SECONDS``, the listener sends a test notification through the worker's database. While
    the test notifications arrive, the claim loops poll less often.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        tables: Tables,
        bell: Bell,
        stop: threading.Event,
        on_trouble: Callable[[BaseException, float], None],
    ) -> None:
        super().__init__(daemon=True)
        self._connect = partial(connect_directly, settings)
        self._database, self._bell, self._stop_serving = database, bell, stop
        self._payload = f"{tables.outbox.schema}.{tables.outbox.name}"
        self._on_trouble = on_trouble

    def run(self) -> None:
        wait_out_outage(self._listen, self._stop_serving, self._on_trouble)

    def _listen(self) -> None:
        with self._connect() as connection:
            connection.execute(f"LISTEN {NOTIFY_CHANNEL}")
            while not self._stop_serving.is_set():
                self._bell.is_heard = self._hears(connection)
                self._bell.is_needed.clear()
                with self._bell.listening(connection, self._payload):
                    self._bell.ring()
                    self._stop_serving.is_set() or self._bell.is_needed.wait(TEST_SECONDS)

    def _hears(self, connection: psycopg.Connection[Any]) -> bool:
        """Send a notification through the worker's database.

        Return whether the notification arrives at the connection in time.
        """
        token = str(uuid4())
        with self._database.transaction() as session:
            session.execute(select(func.pg_notify(NOTIFY_CHANNEL, token)))
        over = time.monotonic() + _PATIENCE_SECONDS
        while (left := over - time.monotonic()) > 0:
            if token in {notice.payload for notice in connection.notifies(timeout=left, stop_after=1)}:
                return True
        return False
