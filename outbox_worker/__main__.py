"""Runs the command line, and chooses the exit status if a signal arrives or stdout cannot be written."""

from __future__ import annotations

import errno
import os
import signal
import sys

_ENDED_BY_SIGNALS = {"run", "demo"}
"""Commands that exit with status 0 after a signal. All other commands exit with ``_INTERRUPTED``."""
_INTERRUPTED = 130
_STDOUT_FAILED = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EDQUOT)


def main() -> None:
    """Run the command line and exit with its status. SIGTERM has the same effect as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _open_closed_streams()
    try:
        status = _run()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a signal after this point cannot change the exit status
    if status == _INTERRUPTED and _ENDED_BY_SIGNALS & set(sys.argv[1:2]):
        status = 0
    raise SystemExit(status)


def _run() -> int:
    try:
        from outbox_worker.cli.app import run_command  # noqa: PLC0415 - slow, so a signal may arrive during it

        status = run_command()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _STDOUT_FAILED or error.filename is not None:
            raise
        if error.errno != errno.EPIPE:  # EPIPE only means that the reader has closed the pipe
            sys.stderr.write(f"outbox-worker: The output could not be written: {error.strerror}.\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit
        return 1
    return status


def _open_closed_streams() -> None:
    """Open /dev/null in place of a stdout or stderr that a supervisor has closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - stays open until exit


if __name__ == "__main__":
    main()
