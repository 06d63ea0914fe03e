"""Identifies the process that writes a row of ``workers`` or ``backfill_runs``.

This module also finds out whether that process still runs. If a worker cannot reach the database,
it creates a note (a file) on its host. The note says that the worker no longer processes the event
in its row.
"""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from uuid import UUID

BACKFILL_SILENT_AFTER_SECONDS = 60.0
"""A backfill is considered killed if it has not updated its open row for this number of seconds.

Each statement of a backfill takes less time. Therefore a running backfill updates its row more
often.
"""


def this_process() -> dict[str, str | int]:
    """Return the columns ``host`` and ``pid`` of a row that this process writes."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def is_running(host: str, pid: int) -> bool | None:
    """Return whether the process that wrote a row still runs.

    Return None if it ran on another host. If ``pid`` is the id of this process, return False. In
    this case, an earlier process with the same id wrote the row, and has ended. Operating systems
    reuse process ids.
    """
    if host != socket.gethostname():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def is_gone(host: str, pid: int, silent_seconds: float, silent_after_seconds: float) -> bool:
    """Return whether the process that wrote an open row is dead.

    The process is dead if its row was not updated for too long, or if it ran on this host and no
    longer runs.
    """
    return silent_seconds > silent_after_seconds or is_running(host, pid) is False


def leave_note(worker: UUID) -> None:
    """Create a note: a file that says that a worker no longer processes the event in its row.

    Ignore disk errors.
    """
    with suppress(OSError):
        _note(worker).touch()


def has_note(worker: UUID) -> bool:
    return _note(worker).exists()


def remove_note(worker: UUID) -> None:
    with suppress(OSError):
        _note(worker).unlink(missing_ok=True)


def _note(worker: UUID) -> Path:
    """Return the path of the note.

    The note is in the state directory that systemd gives the service, or among temporary files.
    """
    directory = os.environ.get("STATE_DIRECTORY", "").partition(":")[0] or tempfile.gettempdir()
    return Path(directory) / f"outbox-worker-{worker}.withdrawn"
