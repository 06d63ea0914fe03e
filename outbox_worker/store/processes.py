"""Which process wrote a row of ``workers`` or ``backfill_runs``, and whether it still runs."""

from __future__ import annotations

import os
import socket

WORKER_SILENT_AFTER_SECONDS = 30.0
"""A worker that is silent for longer and has not closed its row is taken for dead."""

BACKFILL_SILENT_AFTER_SECONDS = 60.0
"""A backfill that is silent for longer and is not finished was killed; each of its statements is shorter."""


def this_process() -> dict[str, str | int]:
    """The columns ``host`` and ``pid`` of a row that this process writes."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def is_gone(host: str, pid: int, silent_seconds: float, silent_after_seconds: float) -> bool:
    """Whether the process behind an open row is dead: silent for too long, or of this host and no longer running."""
    return silent_seconds > silent_after_seconds or (host == socket.gethostname() and not _is_running(pid))


def _is_running(pid: int) -> bool:
    """Whether another process of this host has the id. Our own id is taken as free: its previous owner has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
