"""Identifies the process that writes a row of ``workers`` or ``backfill_runs``, and finds out whether it still runs."""

from __future__ import annotations

import os
import socket

WORKER_SILENT_AFTER_SECONDS = 30.0
"""The seconds without a heartbeat after which a worker with an open row is considered dead."""

BACKFILL_SILENT_AFTER_SECONDS = 60.0
"""The seconds without an update of its open row after which a backfill is considered killed.

Each statement of a backfill takes less than this time, so a running backfill updates its row more often.
"""


def this_process() -> dict[str, str | int]:
    """Return the columns ``host`` and ``pid`` of a row that this process writes."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def is_gone(host: str, pid: int, silent_seconds: float, silent_after_seconds: float) -> bool:
    """Return whether the process of an open row is dead.

    It is dead if its row was not updated for too long, or if it ran on this host and no longer runs.
    """
    return silent_seconds > silent_after_seconds or (host == socket.gethostname() and not _is_running(pid))


def _is_running(pid: int) -> bool:
    """Return whether another process of this host has this id.

    If the id is that of this process, return False: process ids are reused, so an earlier process with the same id
    wrote the row, and it has ended.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
