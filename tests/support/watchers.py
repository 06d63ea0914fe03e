"""Watch a worker from outside: as a service manager with a notify socket, and as an HTTP client."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.support.processes import PATIENCE, Given, Process, eventually

Told = dict[str, str]
WEDGED = """
import pathlib, sys, threading
from outbox_worker.settle.processor import Processor
flag, victims = pathlib.Path(sys.argv.pop(1)), []
def wedging(step):
    def wedged(self, *given):
        if flag.exists():
            victims.append(self)
            if victims[0] is self:
                threading.Event().wait()
        return step(self, *given)
    return wedged
Processor.process_batch = wedging(Processor.process_batch)
Processor.seconds_until_due = wedging(Processor.seconds_until_due)
from outbox_worker.__main__ import main
main()
"""
"""Runs the real command. When the file FLAG exists, one claim loop never returns."""
"""The first argument is FLAG. The others are the arguments of ``outbox-worker``."""


@dataclass
class Manager:
    """A datagram socket and the messages that it received, each with its time."""

    address: str
    told: list[tuple[float, Told]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        """Return all values of a variable in the messages so far."""
        return [fields[name] for _, fields in list(self.told) if name in fields]

    def wait_for(self, holds: Callable[[Told], bool], what: str, since: int = 0, patience: float = PATIENCE) -> Told:
        """Return the first message for which ``holds`` is true. Skip the first ``since``
        messages."""
        found: Told = eventually(
            lambda: next((fields for _, fields in self.told[since:] if holds(fields)), None), what, patience
        )
        return found

    def wait_for_ready(self) -> Told:
        return self.wait_for(lambda fields: fields.get("READY") == "1", "READY=1")

    def wait_for_feeds(self, n: int) -> None:
        """Wait for ``n`` more watchdog messages."""
        had = self.all("WATCHDOG")
        eventually(lambda: len(self.all("WATCHDOG")) >= len(had) + n, f"{n} more feeds")

    def feeds_since(self, moment: float) -> list[float]:
        return [at for at, fields in list(self.told) if "WATCHDOG" in fields and at > moment]

    def settings(self, watchdog_seconds: float) -> Given:
        """Return the environment variables that a service manager sets."""
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(round(watchdog_seconds * 1_000_000))}


@contextmanager
def managed(path: str) -> Iterator[Manager]:
    """Run a ``Manager`` at ``path``, a value of NOTIFY_SOCKET. If it begins with @, the socket is
    abstract."""
    manager = Manager(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(path.replace("@", "\0", 1) if path.startswith("@") else path)
        reader = threading.Thread(target=_read, args=(line, manager))
        reader.start()
        try:
            yield manager
        finally:
            line.shutdown(socket.SHUT_RD)
            reader.join(PATIENCE)


def _read(line: socket.socket, manager: Manager) -> None:
    while datagram := line.recv(65536):
        fields = dict(each.split("=", 1) for each in datagram.decode().splitlines())
        manager.told.append((time.monotonic(), fields))


class Answer(NamedTuple):
    status: int
    body: str
    headers: dict[str, str]


def ask(address: str, path: str, method: str = "GET", **headers: str) -> Answer:
    """Send an HTTP request to ``address``. The address has the form in which the log shows it."""
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
    if address.startswith("unix:"):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        connection.sock = socket.create_connection((host.strip("[]"), int(port)), PATIENCE)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read().decode(), dict(answer.getheaders()))
    finally:
        connection.close()


def address_of(process: Process) -> str:
    """Return the address at which a worker answers HTTP requests."""
    return str(process.wait_for("http_listening")["address"])


def eventually_answers(address: str, path: str, status: int, holds: str = "") -> Answer:
    def found() -> Answer | None:
        answer = ask(address, path)
        return answer if answer.status == status and holds in answer.body else None

    answer: Answer = eventually(found, f"{path} says {status} {holds}")
    return answer
