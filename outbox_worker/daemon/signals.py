"""Signals as something the main thread can wait for: those that end the process, and the one to read settings again.

A handler only sets a flag; the byte that the interpreter writes into a pipe wakes the waiting thread. (Setting a
``threading.Event`` inside a handler can deadlock with a thread that is just entering ``wait``.)
"""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_WAKE = b"\0"
_CLOSED = -1


class Signals:
    """Context manager for the main thread. Looks like a ``threading.Event`` that the first signal to stop sets.

    ``more`` stop, too; ``reload`` only wakes, and is told by ``take_reload``.
    """

    def __init__(self, *more: signal.Signals, reload: signal.Signals | None = None) -> None:
        self._signals = (*STOP_SIGNALS, *more, *([reload] if reload else []))
        self._reload = reload
        self._is_reload_asked = False
        self._received = 0
        self._reader, self._writer = os.pipe()

    def __enter__(self) -> Self:
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._receive) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reader)
        os.close(self._writer)
        self._writer = _CLOSED

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == self._reload:
            self._is_reload_asked = True
        else:
            self._received += 1

    def take_reload(self) -> bool:
        """Whether a reload was asked for since the last call."""
        asked, self._is_reload_asked = self._is_reload_asked, False
        return asked

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._received > 0

    def is_hurried(self) -> bool:
        """Whether a second one has come."""
        return self._received > 1

    def wait(self, timeout: float) -> bool:
        """Wait for a signal or a ``wake``, at most ``timeout`` seconds; whether a signal has come."""
        if not self.is_set():
            self.pause(timeout)
        return self.is_set()

    def pause(self, timeout: float) -> None:
        """Wait for the next signal or ``wake``, whatever came before."""
        if select.select([self._reader], [], [], timeout)[0]:
            os.read(self._reader, 1024)

    def wake(self) -> None:
        """End the main thread's wait, from any thread; nothing where nobody waits any more."""
        with suppress(OSError):
            os.write(self._writer, _WAKE)


def make_signals() -> Signals:
    """For the daemon. SIGHUP asks it to read its settings again; on a terminal it says that the terminal is gone."""
    if sys.stdin is not None and sys.stdin.isatty():
        return Signals(signal.SIGHUP)
    return Signals(reload=signal.SIGHUP)
