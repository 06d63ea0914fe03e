"""Lets the main thread wait for stop signals, and for SIGHUP, which reloads the settings.

The signal handler only sets a flag. The interpreter also writes a byte into a pipe. This byte wakes
the waiting thread. This module uses no ``threading.Event``. A signal handler that sets an event can
deadlock with a thread that calls ``wait``.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

from outbox_worker import interrupts

_WAKE = b"\0"
_CLOSED = -1


class Signals:
    """Receives signals for the main thread inside a ``with`` block.

    A stop signal sets this object like a ``threading.Event``. The signals in ``more`` stop the
    process, like SIGTERM and SIGINT. The signal ``reload`` only wakes the main thread. The method
    ``take_reload`` returns whether the reload signal has arrived.
    """

    def __init__(self, *more: signal.Signals, reload: signal.Signals | None = None) -> None:
        self._signals = (*interrupts.SIGNALS, *more, *([reload] if reload else []))
        self._reload = reload
        self._is_reload_asked = False
        self._received = 0
        self._reader, self._writer = os.pipe()

    def __enter__(self) -> Self:
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._receive) for number in self._signals}
        self._received += interrupts.take()  # count signals that arrived during the imports
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
        """Return whether the reload signal has arrived since the last call."""
        asked, self._is_reload_asked = self._is_reload_asked, False
        return asked

    def is_set(self) -> bool:
        """Return whether a stop signal has arrived."""
        return self._received > 0

    def is_hurried(self) -> bool:
        """Return whether a second stop signal has arrived."""
        return self._received > 1

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for a signal or ``wake``. Return whether a stop signal has arrived."""
        if not self.is_set():
            self.pause(timeout)
        return self.is_set()

    def pause(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds for the next signal or ``wake``, even after a stop signal."""
        if select.select([self._reader], [], [], timeout)[0]:
            os.read(self._reader, 1024)

    def wake(self) -> None:
        """Wake the main thread. Any thread may call this method. After the ``with`` block, the method does nothing."""
        with suppress(OSError):
            os.write(self._writer, _WAKE)


def make_signals() -> Signals:
    """Return the signals of the daemon.

    SIGHUP reloads the settings. In a terminal, SIGHUP stops the process instead.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        return Signals(signal.SIGHUP)
    return Signals(reload=signal.SIGHUP)
