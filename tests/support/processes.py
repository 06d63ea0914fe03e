"""Runs the real command as a process. Tests wait for its JSON log records instead of a fixed time.

``finish`` runs a command until it ends. ``start`` returns a running ``Process``, and the test can
wait for its records.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TextIO

from tests.support import ROOT
from tests.support.doorman import Doorman
from tests.support.forkserver import Child, ForkServer

BYTECODE = Path(tempfile.gettempdir()) / f"outbox-worker-bytecode-{os.getuid()}"
"""The processes keep compiled modules here, even if the caller's environment forbids bytecode
files."""
_NOT_PASSED_ON = (
    "MAKE",
    "MFLAGS",
    "ARGS",
    "OUTBOX_",
    "NOTIFY_SOCKET",
    "WATCHDOG_",
    "CREDENTIALS_DIRECTORY",
    "PYTHONDONTWRITE",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
)
_END = b"\x1e"
Given = dict[str, Any]
"""Settings for a process, by their names."""
PATIENCE = 30.0
"""After this number of seconds without the expected event, a test fails."""


def eventually(holds: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Poll until ``holds`` returns something true, and return that."""
    deadline = time.monotonic() + patience
    turn = threading.Event()
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {patience} s: {what}"
        turn.wait(0.01)
    return found


def environment(url: str | None, settings: Mapping[str, object]) -> dict[str, str]:
    """Return the caller's environment without OUTBOX_*, plus ``settings``. ``batch_size=5`` becomes
    OUTBOX_BATCH_SIZE. An upper-case NAME stays NAME."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}
    clean["PYTHONPYCACHEPREFIX"] = str(BYTECODE)
    given = {name if name.isupper() else f"OUTBOX_{name.upper()}": str(value) for name, value in settings.items()}
    clean["OUTBOX_HTTP_LISTEN"] = "off"  # many workers run at once
    return clean | ({} if url is None else {"OUTBOX_DATABASE_URL": url}) | given


def parse_records(text: str) -> list[dict[str, Any]]:
    """Return the JSON records among the lines of stderr."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return parse_records(self.stderr)

    @property
    def object(self) -> dict[str, Any]:
        """Return the object that ``--json`` printed. Assert that stdout is exactly one line."""
        assert self.stdout.count("\n") == 1, self.stdout
        found: dict[str, Any] = json.loads(self.stdout)
        return found

    def sentences(self) -> str:
        """Return the lines of stderr that are not JSON records."""
        return "\n".join(line for line in self.stderr.splitlines() if not line.startswith("{"))

    def record(self, event: str) -> dict[str, Any]:
        found = [record for record in self.records if record.get("event") == event]
        assert len(found) == 1, f"{event}: {found}\n{self.stderr}"
        return found[0]


def finish(*arguments: str, url: str | None = None, patience: float = 2 * PATIENCE, **settings: object) -> Finished:
    """Run ``outbox-worker ARGUMENTS`` until it ends."""
    return _finish(["-m", "outbox_worker", *arguments], url, patience, settings)


def finish_in_shell(line: str, url: str | None = None) -> Finished:
    """Run a line of ``sh`` in which ``$WORKER`` is the command. It does not use the fork server."""
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        env=environment(url, {}) | {"WORKER": f"{sys.executable} -m outbox_worker"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def finish_unread(*arguments: str, url: str | None = None) -> Finished:
    """Run ``outbox-worker ARGUMENTS`` with stdout in a pipe whose reading end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return _finish(["-m", "outbox_worker", *arguments], url, PATIENCE, {}, stdout=writer)
    finally:
        os.close(writer)


def finish_on_terminal(*arguments: str, url: str, columns: int = 80, typed: str | None = None) -> str:
    """Run ``outbox-worker ARGUMENTS`` on a terminal. Return what the terminal shows, without
    colours. ``typed`` is the input."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown, reader = bytearray(), threading.Thread(target=lambda: shown.extend(_read_terminal(leader)))
    reader.start()
    if typed is not None:
        os.write(leader, typed.encode())
    others = None if typed is None else follower
    try:
        command = ["-m", "outbox_worker", *arguments]
        _finish(command, url, PATIENCE, {}, stdin=others, stdout=follower, stderr=others, TERM="xterm")
    finally:
        os.write(follower, _END)
        reader.join(PATIENCE)
        os.close(follower)
        os.close(leader)
    text = shown.removesuffix(_END).decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r\n", "\n")


def _read_terminal(leader: int) -> bytes:
    """Read until our end marker ``_END``. Without it, output can be lost when the last writer
    closes the terminal."""
    found = b""
    while not found.endswith(_END):
        found += os.read(leader, 65536)
    return found


def finish_script(script: str, *arguments: str, url: str | None = None, patience: float = PATIENCE) -> Finished:
    """Run a Python script until it ends."""
    return _finish(["-c", script, *arguments], url, patience, {})


def _finish(
    args: list[str],
    url: str | None,
    patience: float,
    settings: Mapping[str, object],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    **more: str,
) -> Finished:
    """Run ``python ARGS``. If no stdin is given, it is empty. If no stdout or stderr is given,
    return its content."""
    with open(os.devnull, "rb") as nothing, TemporaryFile() as out, TemporaryFile() as err:  # noqa: PTH123
        child = _server().spawn(
            args,
            environment(url, settings) | more,
            stdin=nothing.fileno() if stdin is None else stdin,
            stdout=out.fileno() if stdout is None else stdout,
            stderr=err.fileno() if stderr is None else stderr,
        )
        try:
            code = child.wait(patience)
        finally:
            child.kill()
        out.seek(0)
        err.seek(0)
        return Finished(code, out.read().decode(), err.read().decode())


@functools.cache
def _server() -> ForkServer:
    """Start the fork server at the first command. Each process that runs tests has one fork
    server."""
    return ForkServer(environment(None, {}))


@contextmanager
def command_for_shells(script: Path) -> Iterator[None]:
    """Write ``outbox-worker`` as a script for shells. It works until the block ends."""
    doorman = Doorman(_server(), script.parent)
    try:
        doorman.write_script(script)
        yield
    finally:
        doorman.close()


@dataclass
class Process:
    """A running command. A thread reads its stderr continuously, so the pipe never becomes full."""

    popen: Child
    stderr_stream: TextIO
    stdout: TextIO | None = None
    """The stdout of the command, if ``start`` was called with ``piped``."""
    lines: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    news: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.stderr_stream:
            with self.news:
                self.lines.append(line)
                self.records += parse_records(line)
                self.news.notify_all()
        with self.news:
            self.news.notify_all()

    @property
    def stderr(self) -> str:
        with self.news:
            return "".join(self.lines)

    def told(self, event: str) -> list[dict[str, Any]]:
        """Return all records of ``event`` so far."""
        with self.news:
            return [record for record in self.records if record.get("event") == event]

    def wait_for(self, event: str, patience: float = PATIENCE, **fields: object) -> dict[str, Any]:
        """Wait for the first record of ``event`` with these fields, and return it."""
        deadline, seen = time.monotonic() + patience, 0
        while True:
            with self.news:
                for record in self.records[seen:]:
                    if record.get("event") == event and all(record.get(key) == fields[key] for key in fields):
                        return record
                seen, left, last = len(self.records), deadline - time.monotonic(), "".join(self.lines[-20:])
                assert left > 0, f"no record {event} {fields} within {patience} s:\n{last}"
                assert self.popen.poll() is None or self._reader.is_alive(), f"ended first:\n{last}"
                self.news.wait(min(left, 0.2))

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def end_well(self) -> None:
        """Send SIGTERM. Assert that the process ends with exit code 0 and without a traceback."""
        self.signal()
        assert self.wait() == 0, self.stderr
        assert "Traceback" not in self.stderr

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process has ended."""
        self.popen.kill()
        self.popen.wait(PATIENCE)

    def wait(self, patience: float = PATIENCE) -> int:
        """Wait until the process has ended and all of stderr is read. Return the exit code."""
        code = self.popen.wait(patience)
        self._reader.join(PATIENCE)
        return code


@contextmanager
def start(*arguments: str, url: str | None = None, piped: bool = False, **settings: object) -> Iterator[Process]:
    """Start ``outbox-worker ARGUMENTS``, and kill it at the end. With ``piped``, the test can read
    stdout."""
    with _start(["-m", "outbox_worker", *arguments], url, settings, piped=piped) as process:
        yield process


@contextmanager
def start_script(script: str, *arguments: str, url: str, **settings: object) -> Iterator[Process]:
    """Start a Python script, and kill it at the end."""
    with _start(["-c", script, *arguments], url, settings) as process:
        yield process


@contextmanager
def _start(
    args: list[str], url: str | None, settings: Mapping[str, object], *, piped: bool = False
) -> Iterator[Process]:
    with ExitStack() as streams:
        nothing = streams.enter_context(open(os.devnull, "r+b"))  # noqa: PTH123
        errors, told = _pipe(streams)
        results, printed = _pipe(streams) if piped else (None, nothing)
        child = _server().spawn(
            args,
            environment(url, settings),
            stdin=nothing.fileno(),
            stdout=printed.fileno(),
            stderr=told.fileno(),
        )
        told.close()
        printed.close()
        process = Process(child, errors, results)
        try:
            yield process
        finally:
            process.kill()
            process._reader.join(PATIENCE)


def _pipe(streams: ExitStack) -> tuple[TextIO, BinaryIO]:
    """Open a pipe. Return its reading end as text, and its writing end for the child process."""
    reader, writer = os.pipe()
    return streams.enter_context(open(reader, encoding="utf-8")), streams.enter_context(open(writer, "wb"))  # noqa: PTH123
