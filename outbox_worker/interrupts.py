"""Raises KeyboardInterrupt when SIGTERM or SIGINT arrives, again if Python swallowed the first one.

If a signal handler raises an exception inside a callback, the interpreter swallows the exception.
An example is a weakref callback of the import system. Therefore the handler also counts the signal.
A timer raises a swallowed KeyboardInterrupt again. This module imports only ``signal`` and ``sys``.
``__main__`` can therefore install the handlers before all other imports.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGAIN_SECONDS = 0.01
"""How long the timer waits before it raises a swallowed KeyboardInterrupt again. By then, the callback has ended."""


class _Arrivals:
    """The number of signals that arrived since ``install`` or since the last ``take``."""

    count = 0


def install() -> None:
    """Install the handlers. If the parent process made this process ignore SIGINT, SIGINT stays ignored."""
    sys.unraisablehook = _raise_again_later
    signal.signal(signal.SIGALRM, _raise)
    signal.signal(signal.SIGTERM, _receive)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _receive)


def check() -> None:
    """Raise KeyboardInterrupt if a signal has arrived, even if the KeyboardInterrupt of the handler was swallowed."""
    if _Arrivals.count:
        raise KeyboardInterrupt


def take() -> int:
    """Return the number of signals that have arrived.

    The caller must handle these signals. The function ``check`` does not report them again.
    """
    signal.setitimer(signal.ITIMER_REAL, 0)
    count, _Arrivals.count = _Arrivals.count, 0
    return count


def ignore() -> None:
    """Ignore all further signals. They must not change the exit status of a process that ends."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _receive(_number: int, _frame: FrameType | None) -> None:
    _Arrivals.count += 1
    raise KeyboardInterrupt


def _raise(_number: int, _frame: FrameType | None) -> None:
    check()


def _raise_again_later(swallowed: sys.UnraisableHookArgs) -> None:
    """Raise a swallowed KeyboardInterrupt again a moment later. Let Python print every other swallowed exception."""
    if issubclass(swallowed.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    else:
        sys.__unraisablehook__(swallowed)
