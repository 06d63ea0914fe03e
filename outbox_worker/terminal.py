"""How results look: tables on a terminal, plain columns in a pipe, one JSON object with ``--json``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from outbox_worker.escapes import printable

_PLAIN_WIDTH = 1000
"""Nothing is folded or cut in a pipe."""


def print_json(value: object) -> None:
    """One object on stdout: money as strings, times as RFC 3339 in UTC."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:  # noqa: PLR0911 - one return per type
    """A value as JSON and CSV have it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        case Decimal():
            return f"{value:.2f}"
        case UUID() | Enum():
            return str(value)
        case float():
            return round(value, 3)
        case _:
            return value


def output() -> Console:
    """The console of stdout: as wide as the terminal, or without bounds in a pipe."""
    return (
        Console(highlight=False, soft_wrap=False)
        if sys.stdout.isatty()
        else Console(width=_PLAIN_WIDTH, highlight=False)
    )


def _print(table: Table) -> None:
    """Print a table; in a pipe its lines end where their text ends."""
    console = output()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    sys.stdout.writelines(f"{text.rstrip()}\n" for text in captured.get().splitlines())


def columns(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[int] = ()
) -> None:
    """Print rows under headings; ``numbers`` are the positions of columns that line up on the right.

    On a terminal that is too narrow for them each row is a block of its own, a line per column.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for position, heading in enumerate(headings):
        justify: JustifyMethod = "right" if position in numbers else "left"
        table.add_column(heading, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(_shown, row))
    if title:
        line(title, "bold")
    console = output()
    unbounded = console.options.update(width=_PLAIN_WIDTH)
    if console.is_terminal and console.measure(table, options=unbounded).maximum > console.width:
        for row in rows:
            facts(list(zip(headings, row, strict=True)))
            line("")
    else:
        _print(table)


def facts(rows: Sequence[tuple[str | Text, object]]) -> None:
    """Print names and values, one a line; a name may bring its own style."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name, style="dim") if isinstance(name, str) else name, _shown(value))
    _print(table)


def _shown(value: object) -> Text:
    """As it is: what others have written is no markup, and nothing in it drives the terminal. A list is lines."""
    return Text("\n".join(printable(str(each)) for each in (value if isinstance(value, list) else [value])))


def show_repeatedly(show: Callable[[], None], seconds: float, *, clears: bool) -> None:
    """Show something again and again, until Ctrl-C; ``clears``: on a terminal always in the same place."""
    console = output()
    with suppress(KeyboardInterrupt):
        while True:
            if clears:
                console.clear()
            show()
            sys.stdout.flush()
            time.sleep(seconds)


def line(text: str, style: str = "") -> None:
    """Print a sentence, or several lines."""
    output().print(Text("\n".join(map(printable, text.split("\n"))), style=style))


@contextmanager
def progress(noun: str, estimate: Callable[[], int]) -> Iterator[Callable[[int, float], bool]]:
    """A bar on stderr with rate and remaining time, where that is a terminal; yields who is to be told how many are
    done. ``estimate``: of how many, about; asked only where a bar is shown."""
    if not sys.stderr.isatty():
        yield lambda done, _: done >= 0
        return
    rate = TextColumn("{task.fields[rate]}", style="dim")
    shown = [BarColumn(bar_width=None), TextColumn("{task.completed:,.0f} {task.description}"), rate]
    with Progress(*shown, TimeRemainingColumn(compact=True), console=Console(stderr=True), transient=True) as bar:
        began, total = time.monotonic(), max(estimate(), 1)
        task = bar.add_task(noun, total=total, rate="")

        def tell(done: int, _: float) -> bool:
            rate = f"{done / max(time.monotonic() - began, 1e-3):,.0f}/s"
            bar.update(task, completed=done, total=max(total, done), rate=rate)
            return True

        yield tell
