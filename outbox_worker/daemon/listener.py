"""Wakes a claim loop when a producer commits new events: the trigger sends NOTIFY, and this module uses LISTEN.

The listener is optional, because a claim loop that polls also finds every event.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from outbox_worker.database.engine import connect_directly
from outbox_worker.database.retry import wait_out_outage
from outbox_worker.schema.tables import NOTIFY_CHANNEL, Tables
from outbox_worker.settings import Settings

_PATIENCE_SECONDS = 1.0


class Listener(threading.Thread):
    """Calls ``wake`` when notifications arrive on its own direct connection.

    While the connection is lost, no notifications arrive. So the listener also calls ``wake`` once after it has
    connected and sent LISTEN.
    """

    def __init__(
        self,
        settings: Settings,
        tables: Tables,
        stop: threading.Event,
        wake: Callable[[], None],
        on_trouble: Callable[[BaseException, float], None],
    ) -> None:
        super().__init__(daemon=True)
        self._connect = partial(connect_directly, settings)
        self._payload = f"{tables.outbox.schema}.{tables.outbox.name}"
        self._stop_serving = stop
        self._wake = wake
        self._on_trouble = on_trouble

    def run(self) -> None:
        wait_out_outage(self._listen, self._stop_serving, self._on_trouble)

    def _listen(self) -> None:
        with self._connect() as connection:
            connection.execute(f"LISTEN {NOTIFY_CHANNEL}")
            self._wake()
            while not self._stop_serving.is_set():
                heard = connection.notifies(timeout=_PATIENCE_SECONDS, stop_after=1)
                if any(notice.payload == self._payload for notice in heard):
                    self._wake()
