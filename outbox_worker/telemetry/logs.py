"""Log records on stderr, one line each: JSON for machines, or text for people.

Records of libraries (SQLAlchemy, alembic, psycopg, uvicorn) are written here, too. Messages and arguments of errors may
hold rows, statements and addresses: so of an error only its name and the places in the code are written, and of a
library's record only the library's own words.
"""

from __future__ import annotations

import json
import logging
import os
import sys
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
"""The priorities of syslog and the journal, by level."""

_COLOURS = {"DEBUG": "34", "INFO": "1", "WARNING": "1;33", "ERROR": "1;31"}

_DIM, _PLAIN = "2", "0"


def configure_logging(level: str, style: Style | None) -> None:
    """Send records to stderr: one JSON object a line, or text for people (the default on a terminal).

    If stderr is the journal, each line begins with its priority, which the journal removes.
    """
    is_terminal = sys.stderr.isatty()
    as_json = (style or ("console" if is_terminal else "json")) == "json"
    form: Callable[[Record], str] = _as_json if as_json else partial(_as_text, coloured=is_terminal)
    logger.remove()
    sink = partial(_write, form, _stderr_is_the_journal())
    logger.add(sink, level=level, format="{message}", backtrace=False, diagnose=False)
    logging.basicConfig(handlers=[_LibraryHandler(logging.WARNING)], force=True)


def _stderr_is_the_journal() -> bool:
    """Whether stderr is still what systemd connected to the journal. Source: systemd.exec(5), JOURNAL_STREAM."""
    try:
        stream = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def _write(form: Callable[[Record], str], with_priority: bool, message: Message) -> None:
    """Drop a record that cannot be written: loguru would print its error, with everything that is being handled."""
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
    level = record["level"].name
    fields = " ".join(f"{key}={value}" for key, value in record["extra"].items() if value is not None)
    parts = [(f"{record['time']:%H:%M:%S}", _DIM), (f"{level: <7}", _COLOURS[level]), (record["message"], _PLAIN)]
    painted = [(printable(part), colour) for part, colour in (*parts, (fields, _DIM)) if part]
    return " ".join(f"\x1b[{colour}m{part}\x1b[0m" if coloured else part for part, colour in painted)


class _LibraryHandler(logging.Handler):
    """Passes warnings and errors of libraries to our logger."""

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
    """The first line of the library's template, filled in with numbers and names of errors, and nothing else."""
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
