"""Lets the claim loops of one process sleep until an event is possibly due.

With the option ``notify``, a sleeping loop waits at the socket of the connection that listens for
notifications. Therefore no other thread must run between the producer's COMMIT and the claim.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg

_FIRST_RESTRAINT_SECONDS = 0.01
_LONGEST_RESTRAINT_SECONDS = 1.0


class Bell:
    """Wakes one sleeping claim loop for each notification and for each call of ``ring``.

    One sleeping loop holds the lock ``_turn`` and waits at the socket. All other loops wait for the
    lock ``_turn``. When the loop at the socket wakes up, this loop releases the lock. The next loop
    then waits at the socket.
    """

    def __init__(self) -> None:
        self._turn, self._reading = threading.Lock(), threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._rung, self._rope = os.pipe()
        os.set_blocking(self._rung, False)
        os.set_blocking(self._rope, False)
        weakref.finalize(self, _close, self._selector, self._rung, self._rope)
        self._selector.register(self._rung, selectors.EVENT_READ)
        self._connection: psycopg.Connection[Any] | None = None
        self._payload = ""
        self._loss: psycopg.Error | None = None
        self._is_silent = False
        self.is_heard = False
        """Whether notifications reach this process. The listener tests this from time to time."""
        self.is_needed = threading.Event()
        """Set if the connection is lost or the worker stops. The listener must then act."""
        self.restraint_seconds = 0.0
        """How long a loop waits after a notification before it looks for events. See ``looked``."""

    def ring(self) -> None:
        """Wake one sleeping loop. If no loop sleeps, the next sleep ends at once."""
        with suppress(BlockingIOError):  # if the pipe is full, the next sleep ends at once
            os.write(self._rope, b"!")

    def silence(self) -> None:
        """Wake all loops and let no loop sleep again, because the worker stops."""
        self._is_silent = True
        self.is_needed.set()
        self.ring()

    def wait(self, timeout: float) -> bool:
        """Sleep at most ``timeout`` seconds. Return whether the loop was woken."""
        over = time.monotonic() + timeout
        if not self._turn.acquire(timeout=timeout):
            return False
        try:
            while not self._is_silent:
                ready = {key.fd for key, _ in self._selector.select(max(0.0, over - time.monotonic()))}
                is_rung = self._rung in ready and self._has_rung()
                is_notified = bool(ready - {self._rung}) and self._has_notification()
                if is_rung or is_notified:
                    return True
                if not ready:
                    return False
            return True
        finally:
            self._turn.release()

    @contextmanager
    def listening(self, connection: psycopg.Connection[Any], payload: str) -> Iterator[None]:
        """Inside the ``with`` block, wake one loop for each notification with this payload.

        Inside the block, no other object must use the connection. If the connection is lost inside
        the block, raises the error of psycopg.
        """
        place = connection.fileno()
        with self._reading:
            self._connection, self._payload, self._loss = connection, payload, None
            self._selector.register(place, selectors.EVENT_READ)
        try:
            yield
        finally:
            with self._reading:
                self._connection = None
                self._selector.unregister(place)
        if self._loss is not None:
            raise self._loss

    def looked(self, *, in_vain: bool) -> None:
        """Record whether this worker found an event after a notification.

        If it found no event (``in_vain``), other workers were faster. This worker then doubles
        ``restraint_seconds``, up to one second. If many workers are notified of each event, only a
        few workers then look for the event at once.
        """
        doubled = max(_FIRST_RESTRAINT_SECONDS, self.restraint_seconds * 2)
        self.restraint_seconds = min(_LONGEST_RESTRAINT_SECONDS, doubled) if in_vain else 0.0

    def _has_rung(self) -> bool:
        with suppress(BlockingIOError):
            return bool(os.read(self._rung, 1024))
        return False

    def _has_notification(self) -> bool:
        """Read all notifications that have arrived. If the connection broke, wake the listener."""
        with self._reading:
            if self._connection is None:
                return False
            try:
                return self._payload in {notice.payload for notice in self._connection.notifies(timeout=0)}
            except psycopg.Error as error:
                self._loss, self._connection, self.is_heard = error, None, False
                self.is_needed.set()
                return True


def _close(selector: selectors.BaseSelector, *pipe: int) -> None:
    selector.close()
    for end in pipe:
        os.close(end)
