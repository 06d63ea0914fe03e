"""Writes an ``outbox-worker`` script for shells. The script lets the fork server start the command.

The fork server has already loaded the libraries, and forks a process as for ``processes.finish``.
The process has the streams, the environment and the directory of the shell.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
from pathlib import Path

from tests.support.forkserver import ForkServer

_LENGTH = struct.Struct("!I")
_SCRIPT = """#!{python} -IS
import json, os, signal, socket, struct, sys
line = socket.socket(socket.AF_UNIX)
line.connect({path!r})
request = {{"args": ["-m", "outbox_worker", *sys.argv[1:]], "environment": dict(os.environ), "directory": os.getcwd()}}
request = json.dumps(request).encode()
socket.send_fds(line, [struct.pack("!I", len(request))], [0, 1, 2])
line.sendall(request)
answers = line.makefile()
pid = int(answers.readline())
for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(each, lambda number, _: os.kill(pid, number))
code = int(answers.readline())
sys.exit(code if code >= 0 else 128 - code)
"""


class Doorman:
    """Starts ``outbox-worker`` for its scripts, until ``close`` is called."""

    def __init__(self, server: ForkServer, directory: Path) -> None:
        self._server = server
        self._path = directory / "doorman"
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(self._path))
        self._door.listen()
        threading.Thread(target=self._open, daemon=True).start()

    def write_script(self, path: Path) -> None:
        path.write_text(_SCRIPT.format(python=sys.executable, path=str(self._path)))
        path.chmod(0o755)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()

    def _open(self) -> None:
        while True:
            try:
                line, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[line], daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        with line, line.makefile("rb") as rest:
            length, fds, _, _ = socket.recv_fds(line, _LENGTH.size, 3)
            request = json.loads(rest.read(*_LENGTH.unpack(length)))
            stdin, stdout, stderr = fds
            child = self._server.spawn(
                request["args"],
                request["environment"],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                directory=request["directory"],
            )
            for fd in fds:
                os.close(fd)
            line.sendall(f"{child.pid}\n".encode())
            line.sendall(f"{child.wait()}\n".encode())
