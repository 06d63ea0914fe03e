"""Commands that show what the worker does: `demo` and `bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from outbox_worker.cli.common import AsJson, Config
from outbox_worker.model import Guard
from outbox_worker.settings import load_settings


def demo(
    payments: Annotated[int, typer.Option(min=50, max=1_000_000, help="How many payments to make.")] = 2000,
) -> None:
    """Show the worker with simulated payments, errors and a killed worker.

    Runs real workers on a temporary private PostgreSQL and ignores
    OUTBOX_DATABASE_URL. At the end, an audit proves that nothing is owed. Exit
    code 1 if the proof fails, for example because a purchase was made twice.
    """
    from outbox_worker import terminal
    from outbox_worker.cli.views import audit as view
    from outbox_worker.demo.run import run_demo
    from outbox_worker.demo.view import print_events, print_sentence

    proof = run_demo(payments)
    if proof is None:
        terminal.line("Interrupted. Nothing was proved. All processes are stopped.")
        return
    print_events(proof.outcomes)
    view.print_audit(proof.audit, 100)
    print_sentence(proof.sentence(), "bold green" if proof.holds else "bold red")
    raise typer.Exit(0 if proof.holds else 1)


def bench(
    config: Config = None,
    json: AsJson = False,
    events: Annotated[int, typer.Option(min=1000, max=10_000_000, help="Events to settle in each round.")] = 50_000,
    rounds: Annotated[
        int, typer.Option(min=1, max=100, help="Rounds for the worker and for each alternative, such as bare SQL.")
    ] = 3,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, help="Claim loops of the worker, and connections of the bare SQL.")
    ] = 1,
    guard: Annotated[
        Guard, typer.Option(metavar="GUARD", help="Guard against duplicates: index or lock.")
    ] = Guard.INDEX,
    latency: Annotated[
        bool,
        typer.Option("--latency/--no-latency", help="Also measure the time from a producer's COMMIT to the purchase."),
    ] = True,
) -> None:
    """Compare the worker's speed with bare SQL on this machine.

    Creates the database outbox_worker_bench on the server of
    OUTBOX_DATABASE_URL, and drops it afterwards. The role must be allowed to
    create databases.
    """
    from outbox_worker import terminal
    from outbox_worker.bench.run import Plan, run_bench
    from outbox_worker.cli.views import bench as view

    settings = load_settings(config=config)
    plan = Plan(events=events, rounds=rounds, concurrency=concurrency, guard=guard, latency=latency)
    report = run_bench(settings, plan, say=lambda step: typer.echo(step, err=True))
    if json:
        terminal.print_json(view.bench_object(report))
    else:
        view.print_bench(report)
