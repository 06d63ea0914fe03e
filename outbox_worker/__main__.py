"""Runs the command line, and chooses the exit status if a signal arrives or stdout cannot be written."""

from __future__ import annotations

import errno
import os
import sys
from io import TextIOWrapper

from outbox_worker import interrupts

_ENDED_BY_SIGNALS = {"run", "demo"}
"""Commands that exit with status 0 after a signal. All other commands exit with ``_INTERRUPTED``."""
_INTERRUPTED = 130
_STDOUT_FAILED = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EDQUOT)


def main() -> None:
    """Run the command line and exit with its status. SIGTERM has the same effect as Ctrl-C."""
    try:
        status = _run_until_interrupted()
    except KeyboardInterrupt:  # a second signal arrived while the first one was handled
        status = _interrupted()
    if status == _INTERRUPTED and _ENDED_BY_SIGNALS & set(sys.argv[1:2]):
        status = 0
    _forget_interrupts()
    raise SystemExit(status)


def _run_until_interrupted() -> int:
    try:
        interrupts.install()
        _prepare_streams()
        status = _run()
        interrupts.ignore()
    except KeyboardInterrupt:
        return _interrupted()
    return status


def _interrupted() -> int:
    """Ignore all further signals, and return the exit status of an interrupted command.

    If a second signal arrives during this call, the result is the same.
    """
    try:
        interrupts.ignore()
    except KeyboardInterrupt:
        interrupts.ignore()
    return _INTERRUPTED


def _forget_interrupts() -> None:
    """Make ``python -m outbox_worker`` end with an exit status, and not by SIGINT.

    CPython ends by SIGINT if a KeyboardInterrupt left the last code that ``exec`` or ``eval`` ran
    from a string. CPython does so even if a caller caught the KeyboardInterrupt. Dataclasses run
    code from strings (``run_eval_code_obj`` in ``pythonrun.c``).
    """
    exec("")  # noqa: S102 - an empty string


def _run() -> int:
    try:
        from outbox_worker.cli.app import run_command  # noqa: PLC0415 - slow, a signal can arrive

        interrupts.check()
        status = run_command()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _STDOUT_FAILED:
            from outbox_worker.cli.app import fail_unforeseen  # noqa: PLC0415 - only after an error

            return fail_unforeseen(error)
        if error.errno != errno.EPIPE:  # EPIPE only means that the reader has closed the pipe
            sys.stderr.write(f"outbox-worker: The output could not be written: {error.strerror}.\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        return 1
    return status


def _prepare_streams() -> None:
    """Open /dev/null in place of a stdout or stderr that a supervisor has closed.

    Also make stdout write a question mark for each character that its encoding lacks. By default,
    Python raises an error for a missing character.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - stays open until exit
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
