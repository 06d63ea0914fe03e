"""The command `files`: lists and prints the files that help to run the worker."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from outbox_worker.errors import WrongUsage


def _complete_name(incomplete: str) -> list[str]:
    return [name for name in FILES if name.startswith(incomplete)]


def files(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="The file to print.", show_default=False, autocompletion=_complete_name),
    ] = None,
) -> None:
    """List the files that come with the worker, or print one of them.

    For example: `outbox-worker files grants.sql | psql -d DATABASE`. Needs no
    database and no settings.
    """
    from outbox_worker import terminal

    if name is None:
        terminal.columns("", ["file", "purpose"], list(FILES.items()))
        return
    found = next((each for each in FILES if name in (each, Path(each).name)), None)
    if found is None:
        raise WrongUsage(f"There is no file {name}. The files are: {', '.join(FILES)}.")
    sys.stdout.buffer.write((_directory() / found).read_bytes())


FILES = {
    "grants.sql": "creates a role for each task, with exactly the privileges that the task needs (for psql)",
    "outbox-worker.service": "runs one worker under systemd",
    "outbox-worker@.service": "runs several workers under systemd, one for each instance name",
    "unix-socket.conf": "lets the systemd service connect to a database through a Unix socket (a drop-in)",
    "outbox-worker.toml": "shows a sample of every setting",
    "prometheus/prometheus.yml": "shows how Prometheus scrapes the workers (a sample)",
    "prometheus/outbox-worker.rules.yml": "contains the alerts for Prometheus",
    "grafana/outbox-worker.json": "contains the dashboard for Grafana",
}
"""The files below ``deploy/``, with a sentence about each."""


def _directory() -> Path:
    """Return the directory ``deploy`` in the installed package, or at the top of a checkout."""
    packaged = Path(__file__).parents[1] / "deploy"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "deploy"
