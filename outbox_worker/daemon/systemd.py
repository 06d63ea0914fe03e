"""Sends messages to systemd. ``supervision`` decides which messages to send.

A message is a datagram of NAME=VALUE lines. The variable ``NOTIFY_SOCKET`` names the socket. The
manual page sd_notify(3) describes this protocol.

This module implements the small and stable protocol itself. Bindings to libsystemd must be compiled
on each machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

_PATIENCE_SECONDS = 1.0
"""The longest time that a claim loop waits to send a message if systemd does not read messages from its socket."""


class Notifier:
    """Sends messages to the service manager that started this process.

    If there is no service manager, sends nothing. The constructor removes systemd's variables from
    the environment. Child processes then send no messages.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_seconds = _watchdog_seconds(environment) if address else None

    def tell(self, **fields: object) -> None:
        """Send one datagram, for example ``tell(READY=1, STATUS="…")``. A message that cannot be sent is dropped."""
        if not self._address:
            return
        lines = "\n".join(f"{name}={' '.join(str(value).splitlines())}" for name, value in fields.items())
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.settimeout(_PATIENCE_SECONDS)
            line.sendto(lines.encode(), self._address)


def _watchdog_seconds(environment: MutableMapping[str, str]) -> float | None:
    """Return after how many seconds without a message systemd restarts this process.

    Return None if the watchdog is off.
    """
    microseconds, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
    is_meant = pid in ("", str(os.getpid()))
    return int(microseconds) / 1e6 if is_meant and microseconds.isdecimal() and int(microseconds) else None
