"""The output of `status`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outbox_worker import terminal
from outbox_worker.diagnose.status import Status, condition
from outbox_worker.durations import ago, count_of
from outbox_worker.escapes import printable
from outbox_worker.model import Outcome
from outbox_worker.store.workers import WorkerRow

_SHOWN = 5
"""The number of event ids that ``status`` shows at most for each refusal of the database."""


def print_status(now: Status) -> None:
    """Print guard, backlog, dead letters and problems, then the workers."""
    backlog, ignored = now.backlog, now.ignored
    terminal.facts(
        [
            ("guard", now.guard),
            ("due", f"{backlog.due:,} (oldest for {ago(backlog.oldest_due_seconds)})" if backlog.due else "0"),
            ("waiting", f"{backlog.waiting:,} (due later)" if backlog.waiting else "0"),
            *([("never claimed", f"{now.never_claimed:,} (no due time, id or type)")] if now.never_claimed else []),
            ("open dead letters", f"{now.open_letters:,}"),
            ("settled per second", f"{now.events_per_second():,.1f}"),
            *([("adopted tables", ", ".join(now.adopted))] if now.adopted else ()),
            *([("ignored events", f"{ignored.events:,}: {printable(ignored.listed())}")] if ignored.events else ()),
            *_set_aside(now),
        ],
    )
    for concern in now.concerns:
        terminal.line(f"\nproblem  {concern.finding}\n         {concern.remedy}", "yellow")
    if now.workers:
        terminal.columns(
            "\nworkers of the last day",
            ["host", "pid", "state", "last heard", "guard", "settled"],
            [
                (
                    row.host,
                    row.pid,
                    condition(row),
                    f"{ago(row.silent_seconds)} ago",
                    row.guard,
                    f"{_settled(row):,}",
                )
                for row in now.workers
            ],
            numbers=(1, 5),
        )


def _set_aside(now: Status) -> list[tuple[str, str]]:
    """Return one line for each refusal of the database.

    The line lists the events that workers have excluded from claims after this refusal.
    """
    by_refusal: dict[str, list[str]] = {}
    for key, refusal in now.set_aside.items():
        by_refusal.setdefault(refusal, []).append(str(key))
    return [
        ("set aside", f"{count_of(len(ids), 'event')} (outbox.id {_listed(ids)}): {refusal}")
        for refusal, ids in by_refusal.items()
    ]


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (", …" if len(ids) > _SHOWN else "")


def next_steps(now: Status) -> list[list[str]]:
    """Return the commands to run next.

    Suggest ``run`` if events are due but no worker runs. Suggest ``doctor`` if no worker can ever
    claim some of the events. Suggest the list of dead letters if some are open.
    """
    is_idle = bool(now.backlog.due) and not any(condition(row) == "running" for row in now.workers)
    steps = [["doctor"]] if now.never_claimed else []
    return [*([["run"]] if is_idle else []), *steps, *([["dead-letters", "list"]] if now.open_letters else [])]


def status_object(now: Status) -> dict[str, Any]:
    """Return the object of ``status --json``."""
    return {
        "time": now.time,
        "guard": now.guard,
        "backlog": now.backlog,
        "never_claimed": now.never_claimed,
        "dead_letters": {"open": now.open_letters},
        "events_per_second": now.events_per_second(),
        "ignored": now.ignored,
        "adopted": now.adopted,
        "concerns": now.concerns,
        "set_aside": [{"id": str(key), "refusal": refusal} for key, refusal in now.set_aside.items()],
        "workers": [
            {
                "id": row.id,
                "host": row.host,
                "pid": row.pid,
                "version": row.version,
                "state": condition(row),
                "started_at": row.started_at,
                "silent_seconds": row.silent_seconds,
                "guard": row.guard,
                "settled": _settled(row),
            }
            for row in now.workers
        ],
        "metrics": now.metrics(),
    }


def _settled(row: WorkerRow) -> int:
    """Return how many events this process settled. Every outcome except ``retried`` settles an event."""
    counted = {name: value for name, value in row.metrics.items() if name.startswith("outbox_events_total")}
    return int(sum(value for name, value in counted.items() if f'outcome="{Outcome.RETRIED}"' not in name))
