"""How log records leave the process: one line each, in either style, with the journal's priorities.

A record repeats no words of an error. The records of libraries look like the worker's own.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from loguru import logger

from outbox_worker.telemetry import logs
from outbox_worker.telemetry.logs import Style, configure_logging

STYLES: list[Style] = ["json", "console"]
LEVELS = {"ERROR": 3, "WARNING": 4, "INFO": 6, "DEBUG": 7}
TWO_LINES = "one\r\ntwo\x1b[31m\u2028three\x85"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    logger.remove()
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)


@pytest.mark.parametrize("style", STYLES)
def test_one_record_is_one_line(capsys: pytest.CaptureFixture[str], style: Style) -> None:
    configure_logging("DEBUG", style)
    logger.bind(event="told", problems=TWO_LINES).error("what {}", TWO_LINES)
    logger.bind(event="told").error("{not a field} <red>not a colour</red>")
    heard = capsys.readouterr().err
    assert len(heard.splitlines()) == 2
    assert "\x1b" not in heard
    assert "{not a field} <red>not a colour</red>" in heard


def test_a_narrow_terminal_breaks_records_at_spaces_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(logs, "_columns", lambda: 40)
    event_id, words = uuid4(), "a sentence that is longer than the terminal is wide"
    configure_logging("INFO", "console")
    logger.bind(event="told", event_id=event_id).warning(words)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()
    assert len(lines) > 3
    assert " ".join(" ".join(lines).split()[2:]) == f"{words} event=told event_id={event_id}"
    assert all(len(line) <= 40 or f"event_id={event_id}" in line for line in lines)
    assert all(line.startswith(" " * len("12:00:00 WARNING ")) for line in lines[1:])


def test_json_has_the_fields_beside_time_level_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "json")
    logger.bind(event="told", count=3).warning("a {}", "sentence")
    record = json.loads(capsys.readouterr().err)
    assert record.pop("time").endswith("Z")
    assert record == {"level": "WARNING", "event": "told", "count": 3, "message": "a sentence"}


@pytest.mark.parametrize("style", STYLES)
def test_lines_begin_with_their_priority_where_stderr_is_the_journal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, style: Style
) -> None:
    with (tmp_path / "journal").open("w") as stream:
        known = os.fstat(stream.fileno())
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{known.st_dev}:{known.st_ino}")
        configure_logging("DEBUG", style)
        for level in LEVELS:
            logger.bind(event="told").log(level, TWO_LINES)
    lines = (tmp_path / "journal").read_text().splitlines()
    assert [line[:3] for line in lines] == [f"<{priority}>" for priority in LEVELS.values()]
    if style == "json":
        assert [json.loads(line[3:])["level"] for line in lines] == [*LEVELS]


@pytest.mark.parametrize("stream", ["", "1:1", "x"], ids=["none", "another", "nonsense"])
def test_and_only_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: str) -> None:
    """The variable JOURNAL_STREAM outlives a redirection of stderr.

    systemd documents what to compare.
    """
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    with (tmp_path / "elsewhere").open("w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        configure_logging("DEBUG", "json")
        logger.info("a sentence")
    assert (tmp_path / "elsewhere").read_text().startswith("{")


def test_a_stderr_without_descriptor_is_not_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    configure_logging("DEBUG", "json")
    logger.info("a sentence")
    assert stderr.getvalue().startswith("{")


@pytest.mark.parametrize("library", ["sqlalchemy.pool", "alembic.runtime", "psycopg", "uvicorn.error", "any.other"])
def test_records_of_libraries_are_ours(capsys: pytest.CaptureFixture[str], library: str) -> None:
    configure_logging("DEBUG", "json")
    logging.getLogger(library).critical("%d connection(s) left: %s", 3, "postgresql://ann:hunter2@db/shop")
    logging.getLogger(library).warning("%(count)d left in %(name)r", {"count": 3, "name": "hunter2"})
    logging.getLogger(library).info("nobody asked")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["event"], first["level"], first["library"]) == ("library_record", "ERROR", library)
    assert first["message"] == "3 connection(s) left: <str>"
    assert (second["level"], second["message"]) == ("WARNING", "3 left in '<str>'")


def test_of_an_error_in_a_librarys_record_only_its_name_and_places_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("DEBUG", "json")
    library = logging.getLogger("asyncio")
    try:
        dict[str, str]()["hunter2"]
    except KeyError as error:
        library.exception("never retrieved: %s\nfuture: hunter2", error)
        library.error(error)
        library.error("%d of %s", error, error)
    heard = capsys.readouterr().err
    first, second, third = map(json.loads, heard.splitlines())
    assert (first["message"], first["error"]) == ("never retrieved: KeyError", "KeyError")
    assert "test_logs.py" in first["trace"][-1]
    assert (second["message"], third["message"]) == ("KeyError", "%d of %s")
    assert "hunter2" not in heard
