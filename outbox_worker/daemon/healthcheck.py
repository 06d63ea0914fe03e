"""Asks the daemon on this machine by HTTP whether it is healthy.

Containers and scripts therefore need no curl.
"""

from __future__ import annotations

import http.client
import socket
from dataclasses import replace

from outbox_worker.address import Listen
from outbox_worker.errors import NoAnswer, SettingError

_PATIENCE_SECONDS = 5.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - the daemon listens there; this process only connects
_LONGEST = 1000


def ask(listen: Listen | None, path: str) -> tuple[bool, str]:
    """Send a request to ``path``. Return whether the daemon is healthy, and the text of its answer.

    Raises NoAnswer if no daemon answers, and SettingError if ``listen`` contains no address to connect to.
    """
    if listen is None or not (listen.path or listen.port):
        raise SettingError("OUTBOX_HTTP_LISTEN gives no address to connect to: it is `off`, or port 0 (any free port).")
    where = replace(listen, host=_ANY.get(listen.host, listen.host))
    connection = http.client.HTTPConnection("localhost", timeout=_PATIENCE_SECONDS)
    try:
        connection.sock = _dial(where)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status == http.client.OK, answer.read(_LONGEST).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"No answer from {where}: {str(error) or type(error).__name__}.") from None
    finally:
        connection.close()


def _dial(where: Listen) -> socket.socket:
    if not where.path:
        return socket.create_connection((where.host, where.port), _PATIENCE_SECONDS)
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(_PATIENCE_SECONDS)
    line.connect(where.path)
    return line
