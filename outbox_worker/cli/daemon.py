"""Commands of the daemon: `run` and `healthcheck`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from outbox_worker.cli.common import Config, start_logging
from outbox_worker.durations import parse_duration
from outbox_worker.settings import load_settings


def run(
    config: Config = None,
    drain: Annotated[
        bool, typer.Option("--drain", metavar="", help="Settle the events that are due now, then exit.")
    ] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(help="Number of loops that claim events (OUTBOX_CONCURRENCY, default 1).", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Events per transaction (OUTBOX_BATCH_SIZE, default 1000).", show_default=False)
    ] = None,
    backfill_every: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="How often to look for payments without a purchase (OUTBOX_BACKFILL_EVERY_SECONDS, default 15m; "
            "0: never).",
            show_default=False,
        ),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR (OUTBOX_LOG_LEVEL).", show_default=False)
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="json or console (OUTBOX_LOG_FORMAT).", show_default=False)
    ] = None,
) -> None:
    """Run the worker: settle events until stopped.

    SIGTERM or Ctrl-C stops the worker after the current batch. A second signal
    stops it at once. If the database is down, the worker waits. Any number of
    workers can run on one database. SIGHUP reloads log level and limits.
    """
    import faulthandler

    from outbox_worker.daemon.signals import make_signals
    from outbox_worker.daemon.worker import Worker

    read = partial(
        load_settings,
        config=config,
        concurrency=concurrency,
        batch_size=batch_size,
        backfill_every_seconds=_seconds(backfill_every, "--backfill-every"),
        log_level=log_level,
        log_format=log_format,
    )
    settings = read()
    start_logging(settings)
    faulthandler.enable()  # if a watchdog sends SIGABRT, the stack of each thread is printed
    with make_signals() as signals:
        worker = Worker(settings, read)
        status = worker.drain(signals) if drain else worker.run(signals)
    raise typer.Exit(status)


def healthcheck(
    config: Config = None,
    ready: Annotated[bool, typer.Option("--ready", metavar="", help="Ask whether the daemon settles events.")] = False,
) -> None:
    """Ask the daemon on this machine whether it is alive.

    Sends the request to the address in OUTBOX_HTTP_LISTEN.

    Exit code 1 if the daemon answers that it is stuck. With --ready, exit code 1
    if the daemon answers that it settles no events. Exit code 69 if there is no
    answer.
    """
    from outbox_worker.daemon.healthcheck import ask

    well, answer = ask(load_settings(config=config).listen, "/readyz" if ready else "/livez")
    typer.echo(answer)
    raise typer.Exit(0 if well else 1)


def _seconds(duration: str | None, option: str) -> float | None:
    return None if duration is None else parse_duration(duration, option).total_seconds()
