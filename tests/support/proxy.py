"""A TCP proxy before a PostgreSQL. It cuts a connection just before or after COMMIT, or drops data.

The proxy acknowledges the data that it drops. Neither keepalives nor ``tcp_user_timeout`` can
detect such a failure between client and server.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sqlalchemy import make_url

_COMMIT = b"COMMIT\x00"
_CLAIMED = re.compile(rb"first_due_at.*\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", re.DOTALL)
"""Matches the reply to a claim that returned events: the name of a column, and a due time."""


@dataclass(eq=False)
class _Line:
    """One connection through the proxy."""

    client: socket.socket
    server: socket.socket
    swallows: frozenset[str] = frozenset()
    dies_at_reply: bool = False
    asked_at: float = 0.0
    is_asked: bool = False
    """Whether the proxy has passed on a request after the last reply."""
    is_at_work: bool = False
    """Whether the last reply shows that the worker has claimed events."""

    def cut(self) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@dataclass
class Proxy:
    """Forwards every connection to the server of ``target``. ``url`` connects through the proxy."""

    target: str
    lines: list[_Line] = field(default_factory=list)
    cuts: int = 0
    """How many COMMITs the proxy has cut off."""
    swallowed: int = 0
    """How many requests the proxy has acknowledged and dropped."""
    mute: bool = False
    """If true, the proxy accepts new connections, but drops their requests."""
    quiet_seconds: float = 0.0
    """The proxy holds a reply back until the client has sent nothing for this time. The client then
    waits."""
    waits: int = 0
    """How often a client waited for a reply."""
    _plan: Literal["before", "after"] | None = None

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    @property
    def url(self) -> str:
        given = make_url(self.target)
        query = {"sslmode": "disable", "gssencmode": "disable"}
        here = given.set(host="127.0.0.1", port=self._listener.getsockname()[1], query=query)
        return here.render_as_string(hide_password=False)

    def cut_next_commit(self, when: Literal["before", "after"]) -> None:
        """Cut the connection at the next COMMIT of a batch, ``before`` or ``after`` the server
        receives it."""
        self._plan = when

    def swallow(self, *what: Literal["requests", "replies"]) -> None:
        """Acknowledge and drop data on all existing connections. New connections work."""
        for line in self.lines:
            line.swallows = frozenset(what)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self.lines:
            line.cut()
        for thread in self._threads:
            thread.join(10)
        for line in self.lines:
            line.client.close()
            line.server.close()

    def _spawn(self, body: object, *arguments: object) -> None:
        thread = threading.Thread(target=body, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                line = _Line(client, self._dial(), frozenset({"requests"} if self.mute else ()))
                self.lines.append(line)
                self._spawn(self._pass_requests, line)
                self._spawn(self._pass_replies, line)

    def _dial(self) -> socket.socket:
        given = make_url(self.target)
        host, port = given.host or given.query.get("host"), given.port or given.query.get("port") or 5432
        if str(host).startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(Path(str(host)) / f".s.PGSQL.{port}"))
            return server
        return socket.create_connection((str(host), int(str(port))))

    def _pass_requests(self, line: _Line) -> None:
        with suppress(OSError):
            while data := line.client.recv(65536):
                if "requests" in line.swallows:
                    self.swallowed += 1
                    continue
                if _COMMIT in data and self._plan is not None and line.is_at_work:
                    plan, self._plan = self._plan, None
                    self.cuts += 1
                    if plan == "before":
                        break
                    line.dies_at_reply = True
                line.asked_at, line.is_asked = time.monotonic(), True
                line.server.sendall(data)
        line.cut()

    def _await_quiet(self, line: _Line) -> None:
        while (left := line.asked_at + self.quiet_seconds - time.monotonic()) > 0:
            time.sleep(left)
        self.waits += line.is_asked
        line.is_asked = False

    def _pass_replies(self, line: _Line) -> None:
        with suppress(OSError):
            while data := line.server.recv(65536):
                if line.dies_at_reply:
                    break
                self._await_quiet(line)
                if "replies" not in line.swallows:
                    line.is_at_work = _CLAIMED.search(data) is not None
                    line.client.sendall(data)
        line.cut()


@contextmanager
def proxied(url: str) -> Iterator[Proxy]:
    proxy = Proxy(url)
    try:
        yield proxy
    finally:
        proxy.close()
