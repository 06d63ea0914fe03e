"""Serves /livez, /readyz and /metrics by HTTP in a separate thread.

This thread sends no queries to the database. Only this thread imports the HTTP libraries. Claim
loops therefore do not wait for the imports. Commands without HTTP never load these libraries.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from prometheus_client import disable_created_metrics
from prometheus_client.exposition import choose_encoder

from outbox_worker.address import Listen
from outbox_worker.daemon.liveness import Liveness
from outbox_worker.database.failures import describe
from outbox_worker.telemetry.reporter import Telemetry

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_RETRY_SECONDS = 2.0
_STOP_SECONDS = 2
_BACKLOG = 64


class Endpoints(threading.Thread):
    """Serves HTTP inside the ``with`` block.

    If the address is in use, logs the error once and tries again.
    """

    def __init__(self, listen: Listen, hosts: Sequence[str], liveness: Liveness, telemetry: Telemetry) -> None:
        super().__init__(name="http", daemon=True)
        self._listen, self._liveness, self._telemetry = listen, liveness, telemetry
        self._hosts = [*LOOPBACK, *([listen.written_host] if listen.host else []), *hosts]
        self._is_over = threading.Event()
        self._server: Server | None = None
        self._is_failure_logged = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the responses to requests that have already arrived, then stop serving."""
        self._is_over.set()
        if self._server is not None:
            self._server.should_exit = True
        self.join(2 * _STOP_SECONDS)

    def run(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        while not self._is_over.is_set():
            try:
                with bind(self._listen) as line:
                    self._serve(line)
            except Exception as error:  # noqa: BLE001 - logged; the worker can settle events without HTTP
                self._meet_trouble(error)

    def _meet_trouble(self, error: Exception) -> None:
        if not self._is_failure_logged:
            reason = error.strerror if isinstance(error, OSError) else None
            self._telemetry.http_unavailable(str(self._listen), reason or describe(error))
        self._is_failure_logged = True
        self._is_over.wait(_RETRY_SECONDS)

    def _serve(self, line: socket.socket) -> None:
        from uvicorn import Config, Server  # noqa: PLC0415 - only if HTTP is served

        config = Config(
            self._application(),
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._server = Server(config)
        self._server.should_exit = self._is_over.is_set()
        self._telemetry.http_listening(written(line))
        self._is_failure_logged = False
        asyncio.run(self._server.serve(sockets=[line]))
        if self._listen.path:
            Path(self._listen.path).unlink(missing_ok=True)

    def _application(self) -> Starlette:
        from starlette.applications import Starlette  # noqa: PLC0415 - only if HTTP is served
        from starlette.middleware import Middleware  # noqa: PLC0415
        from starlette.middleware.trustedhost import TrustedHostMiddleware  # noqa: PLC0415
        from starlette.routing import Route  # noqa: PLC0415

        routes = [Route("/livez", self.livez), Route("/readyz", self.readyz), Route("/metrics", self.metrics)]
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=self._hosts, www_redirect=False)
        application = Starlette(routes=routes, middleware=[trusted])
        application.router.redirect_slashes = False
        return application

    async def livez(self, _: Request) -> Response:
        """Answer 200 while each claim loop ends its steps in time.

        Answer 200 even if the database is down or the worker stops.
        """
        return _verdict(self._liveness.why_not_alive(time.monotonic()), "alive")

    async def readyz(self, _: Request) -> Response:
        """Answer 200 while the worker can settle events, otherwise 503 with the reason."""
        return _verdict(self._liveness.why_not_ready(time.monotonic()), "ready")

    async def metrics(self, request: Request) -> Response:
        from starlette.responses import Response  # noqa: PLC0415 - only if HTTP is served

        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._telemetry.metrics.registry), media_type=content_type)


def _verdict(trouble: str | None, well: str) -> Response:
    from starlette.responses import PlainTextResponse  # noqa: PLC0415 - only if HTTP is served

    return PlainTextResponse(f"{trouble or well}\n", status_code=503 if trouble else 200)


def bind(listen: Listen) -> socket.socket:
    """Open a socket that listens. Raises OSError."""
    if listen.path:
        return _bind_path(listen.path)
    found = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    both = listen.host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=both)


def _bind_path(path: str) -> socket.socket:
    """Open a Unix socket for all users. Only the directory's permissions limit access. Replace an old socket file."""
    line = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        line.bind(path)
        Path(path).chmod(0o666)
        line.listen(_BACKLOG)
    except BaseException:
        line.close()
        raise
    return line


def _remove_stale(path: str) -> None:
    """Remove a socket file if no process listens on it."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX) as asked:
        try:
            asked.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()


def written(line: socket.socket) -> str:
    """Return the address of a listening socket in the form of OUTBOX_HTTP_LISTEN."""
    address = line.getsockname()
    return str(Listen(path=address) if isinstance(address, str) else Listen(host=address[0], port=address[1]))
