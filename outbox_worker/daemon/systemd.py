"""Carries messages to systemd; ``supervision`` says which.

They are datagrams of NAME=VALUE lines on ``NOTIFY_SOCKET``, as in sd_notify(3).

The protocol is stable and these few lines are all of it; bindings to libsystemd would have to be built on each machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

_PATIENCE_SECONDS = 1.0
"""A manager that does not read its socket holds up a claim loop no longer than this."""


class Notifier:
    """Sends messages to the service manager that started this process; sends nothing if there is none.

    Removes its variables from the environment, so that child processes do not speak for the service.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_seconds = _watchdog_seconds(environment) if address else None

    def tell(self, **fields: object) -> None:
        """Send one datagram: ``tell(READY=1, STATUS="…")``. A message that cannot be sent is lost."""
        if not self._address:
            return
        lines = "\n".join(f"{name}={' '.join(str(value).splitlines())}" for name, value in fields.items())
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.settimeout(_PATIENCE_SECONDS)
            line.sendto(lines.encode(), self._address)


def _watchdog_seconds(environment: MutableMapping[str, str]) -> float | None:
    """The silence after which systemd restarts this process; None if it does not watch it."""
    microseconds, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
    is_meant = pid in ("", str(os.getpid()))
    return int(microseconds) / 1e6 if is_meant and microseconds.isdecimal() and int(microseconds) else None
