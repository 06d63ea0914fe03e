"""A fork server starts processes fast. It has imported the libraries, and forks a process for each
command.

``python -m outbox_worker`` spends most of its start, a second of CPU, on imports. Once per run of
the tests, the server imports the libraries and all our packages except ``cli``. Each forked process
imports ``cli``, because ``cli`` reads the environment, the streams and the signals. A forked
process has a pid, an environment, streams, signals and an exit code of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tests.support import ROOT

LIBRARIES = (
    "alembic.command",
    "loguru",
    "prometheus_client",
    "psycopg",
    "pydantic_settings",
    "rich.console",
    "rich.progress",
    "rich.table",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.orm",
    "starlette.applications",
    "tenacity",
    "typer",
    "uvicorn",
)
OURS = (
    "outbox_worker.daemon.healthcheck",
    "outbox_worker.daemon.http",
    "outbox_worker.daemon.worker",
    "outbox_worker.diagnose.doctor.report",
    "outbox_worker.diagnose.explanation",
    "outbox_worker.diagnose.status",
    "outbox_worker.reconcile.audit",
    "outbox_worker.reconcile.backfill",
    "outbox_worker.reconcile.duplicates",
    "outbox_worker.schema.migrate",
)
_LENGTH = struct.Struct("!I")
_FDS = 4
"""stdin, stdout, stderr, and a pipe. The server writes the pid and then the exit code to this
pipe."""


class Child:
    """A process that the server forked, with the part of ``subprocess.Popen`` that the tests use."""

    def __init__(self, reports: int, args: Sequence[str]) -> None:
        self._reports = open(reports, encoding="ascii")  # noqa: SIM115 - a descriptor, closed with the process
        self.args = args
        self.pid = int(self._reports.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. If a signal ended the process, return minus the number of the
        signal."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
        return code

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._reports], [], [], timeout)[0]:
            self.returncode = int(self._reports.readline())
            self._reports.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The client of the fork server. The server ends if this process closes the socket or ends."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._line, far = socket.socketpair()
        self._lock = threading.Lock()
        with far:
            command = [sys.executable, "-m", __name__, str(far.fileno())]
            self._server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=dict(environment), cwd=ROOT, pass_fds=[far.fileno()]
            )
        atexit.register(self.close)

    def spawn(
        self,
        args: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        directory: str = str(ROOT),
    ) -> Child:
        """Start ``python ARGS`` on these descriptors. ``args`` begins with ``-m MODULE`` or ``-c
        SCRIPT``."""
        asked = {"args": list(args), "environment": dict(environment), "directory": directory}
        request = json.dumps(asked).encode()
        reports, told = os.pipe()
        with self._lock:
            socket.send_fds(self._line, [_LENGTH.pack(len(request))], [stdin, stdout, stderr, told])
            self._line.sendall(request)
        os.close(told)
        return Child(reports, args)

    def close(self) -> None:
        self._line.close()
        self._server.wait(10)


# --- the server


def serve(line: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request. Return the request in each forked process. Return None in
    the server when it ends."""
    for name in (*LIBRARIES, *OURS):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, _wake_up)
    reports: dict[int, int] = {}
    asked = line.fileno()
    while True:
        ready, _, _ = select.select([asked, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report_the_ended(reports)
        if asked in ready:
            length, fds, _, _ = socket.recv_fds(line, _LENGTH.size, _FDS)
            if not length:
                return None
            request = json.loads(_receive(line, *_LENGTH.unpack(length)))
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, fd in enumerate(fds[:3]):
                    os.dup2(fd, number)
                line.close()
                for fd in (*fds, *reports.values(), woken, wake):
                    os.close(fd)
                return dict(request)
            reports[pid] = fds[3]
            os.write(fds[3], f"{pid}\n".encode())
            for fd in fds[:3]:
                os.close(fd)


def _wake_up(_number: int, _frame: object) -> None:
    """Do nothing. Python writes to the wake-up descriptor only if the signal has a handler."""


def _receive(line: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        found += line.recv(length - len(found))
    return found


def _report_the_ended(reports: dict[int, int]) -> None:
    while reports:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        report = reports.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # the client has closed its end
            os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os.close(report)


def become(request: dict[str, Any]) -> None:
    """Turn the forked process into ``python ARGS``."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    _open_streams()
    kind, what, *rest = request["args"]
    sys.argv = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - that is what -c means


def _open_streams() -> None:
    """Open the streams as Python does when it starts. Output to a terminal is line-buffered."""
    _kept.extend([sys.stdin, sys.stdout, sys.stderr])
    sys.stdin = sys.__stdin__ = open(0)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", 1 if os.isatty(1) else -1)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace")  # type: ignore[misc]  # noqa: SIM115


_kept: list[Any] = []
"""Keeps the server's streams. If Python collected them, it would close the descriptors of the new
streams."""

if __name__ == "__main__":
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        become(asked)
