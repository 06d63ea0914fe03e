"""Cuts a connection if the answer to a statement does not arrive in time.

Other time-outs do not notice some outages. Keepalives and ``tcp_user_timeout`` do not notice a
firewall or proxy that acknowledges packets and then drops them. The server's own time-outs have no
effect if the client cannot reach the server.
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
"""The client waits this many seconds longer than ``statement_timeout``.

The server must have time to cancel the statement first. The server's error message says more than
the error for a lost connection.
"""
_LOOK_SECONDS = 0.25


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that the watchdog cuts if an answer takes longer than ``answer_seconds``.

    If ``answer_seconds`` is None, the connection has no limit. If the watchdog cuts the connection,
    the waiting call raises psycopg.OperationalError without a SQLSTATE. Psycopg raises the same
    error for every lost connection.
    """

    answer_seconds: float | None = None
    waiting_since: float | None = None

    def wait(self, *given: Any, **named: Any) -> Any:
        """Record the start of the wait, then wait for the answer. Psycopg calls this method for every round trip."""
        self.waiting_since = time.monotonic()
        try:
            return super().wait(*given, **named)
        finally:
            self.waiting_since = None


class _Watchdog:
    """A thread that watches all bounded connections of the process. The first connection starts the thread."""

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
    """Make the watchdog cut this connection if an answer takes longer than ``answer_seconds``."""
    connection.answer_seconds = answer_seconds
    _watchdog.watch(connection)
    return connection


def _cut(connection: BoundedConnection) -> None:
    """Shut the socket down. The thread that waits for an answer then wakes up and gets an error."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
