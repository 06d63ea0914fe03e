"""The command: how signals and a closed or full stdout end it, from the first import on."""

from __future__ import annotations

import errno
import os
import signal
import sys

_ENDED_BY_SIGNALS = {"run", "demo"}
"""Commands that a signal ends with status 0; it interrupts all others."""
_INTERRUPTED = 130
_STDOUT_FAILED = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EDQUOT)


def main() -> None:
    """Run the command line and end with its status. SIGTERM ends it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _open_closed_streams()
    try:
        status = _run()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the status is decided; a late signal changes nothing
    if status == _INTERRUPTED and _ENDED_BY_SIGNALS & set(sys.argv[1:2]):
        status = 0
    raise SystemExit(status)


def _run() -> int:
    try:
        from outbox_worker.cli.app import run_command  # noqa: PLC0415 - takes a while, in which a signal may come

        status = run_command()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _STDOUT_FAILED or error.filename is not None:
            raise
        if error.errno != errno.EPIPE:  # the reader has read enough
            sys.stderr.write(f"outbox-worker: The output could not be written: {error.strerror}.\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 1
    return status


def _open_closed_streams() -> None:
    """Open /dev/null in place of a stdout or stderr that a supervisor has closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - stays open to the end


if __name__ == "__main__":
    main()
