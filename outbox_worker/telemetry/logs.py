"""Writes log records to stderr, one line per record: JSON for machines, or text for people.

This module also writes the records of libraries (SQLAlchemy, alembic, psycopg, uvicorn). Errors can
contain rows, statements and addresses. Therefore this module writes only the name and the code
lines of an error. From a library's record, this module writes the fixed text, but not the texts
that the library inserts.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from loguru import logger

from outbox_worker.database.failures import describe, trace

if TYPE_CHECKING:
    from loguru import Message, Record
from outbox_worker.escapes import printable

Style = Literal["json", "console"]

_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3}
"""Maps each log level to the number that syslog and the journal use for this level."""

_COLOURS = {"DEBUG": "34", "INFO": "1", "WARNING": "1;33", "ERROR": "1;31"}

_DIM = "2"
_USUAL_COLUMNS = 80
_HEAD_WIDTH = len("12:00:00 WARNING ")


def configure_logging(level: str, style: Style | None) -> None:
    """Write log records to stderr as JSON, or as text for people.

    Text is the default on a terminal, JSON elsewhere. If stderr is connected to the systemd
    journal, each line begins with its priority. The journal reads and removes the priority.
    """
    is_terminal = sys.stderr.isatty()
    as_json = (style or ("console" if is_terminal else "json")) == "json"
    form: Callable[[Record], str] = _as_json if as_json else partial(_as_text, coloured=is_terminal)
    logger.remove()
    sink = partial(_write, form, _stderr_is_the_journal())
    logger.add(sink, level=level, format="{message}", backtrace=False, diagnose=False)
    logging.basicConfig(handlers=[_LibraryHandler(logging.WARNING)], force=True)


def _stderr_is_the_journal() -> bool:
    """Return whether stderr is connected to the systemd journal. Source: systemd.exec(5), JOURNAL_STREAM."""
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def _write(form: Callable[[Record], str], with_priority: bool, message: Message) -> None:
    """Write a record. If stderr fails, drop the record.

    Otherwise loguru would print the failure with secret values.
    """
    priority = f"<{_PRIORITIES[message.record['level'].name]}>" if with_priority else ""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{priority}{form(message.record)}\n")


def _as_json(record: Record) -> str:
    line = {
        "time": record["time"].astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record["level"].name,
        **record["extra"],
        "message": record["message"],
    }
    return json.dumps(line, default=str, ensure_ascii=True)


def _as_text(record: Record, *, coloured: bool) -> str:
    """Format a record as one line. If the terminal is too narrow, break the line at spaces and indent the rest."""
    level, message = record["level"].name, printable(record["message"])
    fields = " ".join(f"{key}={printable(str(value))}" for key, value in record["extra"].items() if value is not None)
    clock, name = f"{record['time']:%H:%M:%S}", f"{level: <7}"
    head = f"{_painted(clock, _DIM, coloured)} {_painted(name, _COLOURS[level], coloured)}"
    room = _columns() - _HEAD_WIDTH if coloured else None
    if room is None or len(message) + 1 + len(fields) <= room:
        return " ".join(filter(None, [head, message, _painted(fields, _DIM, coloured)]))
    lines = [*_wrapped(message, room), *(_painted(line, _DIM, coloured) for line in _wrapped(fields, room))]
    return f"{head} " + ("\n" + " " * _HEAD_WIDTH).join(lines)


def _columns() -> int:
    """Return the width of the terminal to which stderr is connected."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_COLUMNS
    except (OSError, ValueError):
        return _USUAL_COLUMNS


def _painted(text: str, colour: str, coloured: bool) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if coloured and text else text


def _wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` characters, but never inside a word."""
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)


class _LibraryHandler(logging.Handler):
    """A handler that passes the warnings and errors of libraries to our logger."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        level = "ERROR" if record.levelno >= logging.ERROR else "WARNING"
        logger.bind(
            event="library_record",
            library=record.name,
            error=describe(error) if error else None,
            trace=trace(error) if error else None,
        ).log(level, "{}", _sentence_of(record))


def _sentence_of(record: logging.LogRecord) -> str:
    """Return the first line of a library's message.

    Insert only numbers and the names of errors into the text.
    """
    template = record.msg.partition("\n")[0] if isinstance(record.msg, str) else str(_without_words(record.msg))
    given = record.args
    kept = {key: _without_words(value) for key, value in given.items()} if isinstance(given, dict) else None
    try:
        return template % (kept or tuple(map(_without_words, given or ())))
    except (TypeError, ValueError, KeyError):
        return template


def _without_words(value: Any) -> Any:
    if isinstance(value, BaseException):
        return describe(value)
    return value if isinstance(value, int | float) else f"<{type(value).__name__}>"
