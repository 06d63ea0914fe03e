"""A deadline on the client's side: a connection on which no answer comes in time is cut.

Keepalives and ``tcp_user_timeout`` do not notice a middlebox that acknowledges packets and drops them, and a time-out
of the server cannot help if the server is not reached.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import Any
from weakref import WeakSet

import psycopg

GRACE_SECONDS = 1.0
"""The server's own time-out, of the same length, has the better error message: give it time to come first."""
_LOOK_SECONDS = 0.25


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is cut if an answer takes longer than ``answer_seconds``; None: no limit.

    The waiting call then raises psycopg.OperationalError without a SQLSTATE, as for any other lost connection.
    """

    answer_seconds: float | None = None
    waiting_since: float | None = None

    def wait(self, *given: Any, **named: Any) -> Any:
        """Wait as psycopg does for each round trip, and note since when."""
        self.waiting_since = time.monotonic()
        try:
            return super().wait(*given, **named)
        finally:
            self.waiting_since = None


class _Watchdog:
    """One thread that watches all bounded connections of the process; it starts with the first."""

    def __init__(self) -> None:
        self._watched: WeakSet[BoundedConnection] = WeakSet()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, connection: BoundedConnection) -> None:
        with self._lock:
            self._watched.add(connection)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deadline", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        turn = threading.Event()
        while not turn.wait(_LOOK_SECONDS):
            with self._lock:
                watched = list(self._watched)
            now = time.monotonic()
            for connection in watched:
                since, bound = connection.waiting_since, connection.answer_seconds
                if since is not None and bound is not None and now - since > bound:
                    _cut(connection)


_watchdog = _Watchdog()


def bounded(connection: BoundedConnection, answer_seconds: float) -> BoundedConnection:
    """Cut this connection if an answer takes longer than ``answer_seconds``."""
    connection.answer_seconds = answer_seconds
    _watchdog.watch(connection)
    return connection


def _cut(connection: BoundedConnection) -> None:
    """Shut the socket down: the thread that waits on it wakes up and finds the connection lost."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
