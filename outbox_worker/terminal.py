"""Prints results as tables on a terminal, tab-separated columns in a pipe, or JSON with ``--json``.

On a terminal, lines are broken only at spaces. Users can then copy ids, commands and URLs. In a
pipe, lines are not broken, cut or aligned. ``cut`` and ``awk -F'\\t'`` can then read the columns of
a table.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from functools import cache
from itertools import zip_longest
from math import isfinite
from typing import Any
from uuid import UUID

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from outbox_worker.escapes import printable
from outbox_worker.money import amount_text

_GAP = "  "
_WORD = re.compile(r"\s*\S+")
_INDENT = re.compile(r"\s*(?:→ )?")
_LEAST_PROSE = 20
"""The smallest width, in characters, to which the last column is narrowed. Narrower text would be hard to read."""
_IDS = ("id", "held_by", "subject", "isolated_event")
"""The keys whose values are ids, although the keys do not end with ``_id``."""
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""The characters at the start of a text that make a spreadsheet read the text as a formula."""


def print_json(value: object) -> None:
    """Print one JSON object on stdout, with ids and money as strings, and times as RFC 3339 in UTC.

    If the encoding of stdout lacks a character, print an escape such as ``\\u00e9``.
    """
    found = plain(value)
    written = json.dumps(found, ensure_ascii=False)
    sys.stdout.write((written if _can_be_written(written) else json.dumps(found)) + "\n")


def _can_be_written(written: str) -> bool:
    try:
        written.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def is_id(key: str) -> bool:
    """Return whether values under this key are ids. Ids are strings in JSON, even if the database has numbers."""
    return key in _IDS or key.endswith(("_id", "_ids"))


def plain(value: Any, currency: str | None = None) -> Any:  # noqa: PLR0911 - one return per type
    """Convert a value into the form that JSON and CSV output use. ``currency`` is the currency of an amount."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain({each.name: getattr(value, each.name) for each in fields(value) if each.repr})
    if isinstance(value, Mapping):
        return {
            str(key): _plain_id(item) if is_id(str(key)) else plain(item, str(value.get("currency", key)))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        case Decimal():
            return amount_text(value, currency)
        case UUID() | Enum():
            return str(value)
        case float():
            return round(value, 3) if isfinite(value) else str(value)
        case _:
            return value


def _plain_id(value: Any) -> Any:
    """Convert an id, or each id of a list, into a string. A numeric id keeps the decimals that it was written with."""
    if isinstance(value, (list, tuple)):
        return [_plain_id(each) for each in value]
    return str(value) if isinstance(value, int | Decimal) else plain(value)


def line(text: str, style: str = "") -> None:
    """Print one or more lines of text."""
    for each in text.split("\n"):
        for part in _wrapped(printable(each), _width()):
            _print(Text(part, style=style))


def next_commands(commands: Sequence[Sequence[str]]) -> None:
    """Print the commands to run next, with quotes, so that users can paste them into a shell."""
    for position, words in enumerate(commands):
        label = "\nNext: " if position == 0 else "      "
        quoted = [printable(shlex.quote(word)) for word in words]
        parts = _fitted([quoted[0], *(f" {word}" for word in quoted[1:])], _width() - len("Next:  \\"))
        _print(Text.assemble((label, "dim"), (" \\\n        ".join(parts), "bold")))


def csv_cell(value: Any) -> Any:
    """Convert a value for a CSV file. Put ' before a text that a spreadsheet would read as a formula.

    A number stays a number, even if it is negative.
    """
    found = plain(value)
    is_text = isinstance(found, str) and not _NUMBER.fullmatch(found)
    return f"'{found}" if is_text and found.startswith(_FORMULA_STARTS) else found


def columns(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[int] = ()
) -> None:
    """Print rows under headings. ``numbers`` contains the positions of the columns to align on the right.

    A cell that is a list gets one line for each value. If the terminal is too narrow for the table, the text in the
    last column is wrapped. If the table is still too wide, each row is printed as a block with one line per column. In
    a pipe, each row is one line with a tab between columns.
    """
    if title:
        line(title, "bold")
    cells = [[[each] for each in headings], *([_lines(value) for value in row] for row in rows)]
    if not sys.stdout.isatty():
        sys.stdout.writelines("\t".join(map(", ".join, row)) + "\n" for row in cells)
        return
    widths = [max(cell_len(text) for cell in column for text in cell) for column in zip(*cells, strict=True)]
    room = _width() - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1)
    if widths[-1] > room and (room < _LEAST_PROSE or len(widths) - 1 in numbers):
        for position, row in enumerate(rows):
            if position:
                line("")
            facts(list(zip(headings, row, strict=True)))
        return
    for position, texts in enumerate(cells):
        last = [part for text in texts[-1] for part in _wrapped(text, room)]
        _print_row([*texts[:-1], last], widths, numbers, "" if position else "dim")


def _print_row(row: Sequence[Sequence[str]], widths: Sequence[int], numbers: Sequence[int], style: str) -> None:
    for texts in zip_longest(*row, fillvalue=""):
        padded = [
            (" " * (width - cell_len(text)) + text) if position in numbers else text + " " * (width - cell_len(text))
            for position, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        _print(Text(_GAP.join(padded).rstrip(), style=style))


def facts(rows: Sequence[tuple[str | Text, object]]) -> None:
    """Print one line for each name and value. A name can have a style.

    A list gets one line for each value.
    """
    names = [Text(name, style="dim") if isinstance(name, str) else name for name, _ in rows]
    indent = max((name.cell_len for name in names), default=0) + len(_GAP)
    for name, (_, value) in zip(names, rows, strict=True):
        parts = [part for text in _lines(value) for part in _wrapped(text, _width() - indent)]
        for position, part in enumerate(parts):
            shown = Text.assemble(name, " " * (indent - name.cell_len)) if position == 0 else Text(" " * indent)
            shown.append(part)
            shown.rstrip()
            _print(shown)


def _lines(value: object) -> list[str]:
    """Return the lines of a cell without control characters.

    The text can come from other programs.
    """
    return [printable(str(each)) for each in (value if isinstance(value, list) else [value])] or [""]


def _width() -> int:
    """Return the largest number of characters in a line on stdout: the terminal's width, or no limit in a pipe."""
    return _console().width if sys.stdout.isatty() else sys.maxsize


def _wrapped(text: str, width: int) -> list[str]:
    """Break a text at spaces into lines of at most ``width``, all indented like the first line."""
    mark = _INDENT.match(text)
    indent = mark.end() if mark else 0
    first, *others = _fitted(_WORD.findall(text), width, indent)
    return [first, *(" " * indent + each for each in others)]


def _fitted(words: Sequence[str], width: int, indent: int = 0) -> list[str]:
    """Distribute words, each with the spaces before it, over lines. A word that is too long gets its own line.

    ``indent`` is the number of spaces that the caller will put before each line except the first.
    """
    lines, room = [""], width
    for word in words:
        if lines[-1].strip() and cell_len(lines[-1] + word) > room:
            lines.append(word.lstrip())
            room = width - indent
        else:
            lines[-1] += word
    return lines


def _print(text: Text) -> None:
    """Print a line on stdout without wrapping it. Use the style of the line only on a terminal."""
    _console().print(text, soft_wrap=True)


@cache
def _console() -> Console:
    return Console(highlight=False)


def complain(text: str) -> None:
    """Print an error on stderr. On a terminal, wrap long lines."""
    width = Console(stderr=True).width if sys.stderr.isatty() else sys.maxsize
    for each in text.split("\n"):
        sys.stderr.writelines(f"{part}\n" for part in _wrapped(printable(each), width))


def show_repeatedly(show: Callable[[], None], seconds: float, *, clears: bool) -> None:
    """Call ``show`` again and again until Ctrl-C. If ``clears`` is set, clear the terminal before each call."""
    with suppress(KeyboardInterrupt):
        while True:
            if clears:
                _console().clear()
            show()
            sys.stdout.flush()
            time.sleep(seconds)


@contextmanager
def progress(noun: str, estimate: Callable[[], int], *, then: str) -> Iterator[Callable[[int, float], bool]]:
    """Show a progress bar if stderr is a terminal. Yields a function to call with each new count.

    ``noun`` names the counted things. ``estimate`` returns the approximate number of things, and is called only if a
    bar is shown. ``then`` names the work after counting. A second bar shows ``then`` when the count reaches the
    estimate or stops growing.
    """
    if not sys.stderr.isatty():
        yield lambda done, _: done >= 0
        return
    shown = [BarColumn(bar_width=20), TextColumn("{task.description}"), TextColumn("{task.fields[rate]}", style="dim")]
    with Progress(*shown, TimeRemainingColumn(compact=True), console=Console(stderr=True), transient=True) as bar:
        began, total, before = time.monotonic(), max(estimate(), 1), -1
        counting = bar.add_task(f"0 {noun}", total=total, rate="")
        afterwards = bar.add_task(then, total=None, rate="", visible=False)

        def tell(done: int, _: float) -> bool:
            nonlocal before
            rate = f"{done / max(time.monotonic() - began, 1e-3):,.0f}/s"
            bar.update(counting, completed=done, total=max(total, done), description=f"{done:,} {noun}", rate=rate)
            bar.update(afterwards, visible=done >= total or done == before)
            before = done
            return True

        yield tell
