"""Wrong commands and settings, signals, output for scripts: exit codes, sentences and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import ONE_SHOT, PASSWORD, fails
from tests.support.factories import Shop
from tests.support.processes import (
    finish,
    finish_in_shell,
    finish_script,
    finish_unread,
)

# --- settings


@pytest.mark.parametrize("command", ONE_SHOT, ids=" ".join)
def test_without_a_url_nothing_runs(command: list[str]) -> None:
    sentence = fails(78, "OUTBOX_DATABASE_URL", "not set", done=finish(*command))
    assert "postgresql://" in sentence
    assert "embedded:" in sentence


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"mysql://me:{PASSWORD}@host/shop", "PostgreSQL"),
        (f"postgresql+psycopg2://me:{PASSWORD}@host/shop", "PostgreSQL"),
        (f"me:{PASSWORD}@host", "URL"),
        (f"postgresql://me:{PASSWORD}@host:port/shop", "URL"),
        (f"postgresql://me:{PASSWORD}@host:99999/shop", "port"),
        (f"postgresql://me:{PASSWORD}@host", "database"),
        ("embedded:", "directory"),
        (PASSWORD, "URL"),
        ("", "URL|not set"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, said: str) -> None:
    fails(78, "OUTBOX_DATABASE_URL", said, done=finish("run", "--drain", url=url))


def test_impossible_values_are_told_all_together(closed_port: int) -> None:
    done = finish(
        "run",
        "--drain",
        url=f"postgresql://me:{PASSWORD}@127.0.0.1:{closed_port}/shop",
        batch_size=0,
        concurrency="many",
        max_attempts=-1,
        poll_max_seconds="soon",
        log_level="LOUD",
        tables="paiments=x",
        columns="payments.colour=x",
    )
    sentence = fails(78, done=done)
    for name in ("BATCH_SIZE", "CONCURRENCY", "MAX_ATTEMPTS", "POLL_MAX_SECONDS", "LOG_LEVEL", "TABLES", "COLUMNS"):
        assert f"OUTBOX_{name}" in sentence
    assert "paiments" in sentence


def test_bounds_that_contradict_each_other(database_url: str) -> None:
    done = finish("run", "--drain", url=database_url, poll_min_seconds=9, poll_max_seconds=1)
    fails(78, "OUTBOX_POLL_MIN_SECONDS", "OUTBOX_POLL_MAX_SECONDS", done=done)


def test_an_impossible_value_on_the_command_line(database_url: str) -> None:
    fails(2, "--batch-size", done=finish("run", "--drain", "--batch-size", "0", url=database_url))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batchsize = 5\n", r"batchsize.*batch_size"),
        ("no_such_thing = 5\n", "no_such_thing"),
        ("batch_size = 0\n", "(?i)batch_size"),
        ("batch_size = \n", "TOML"),
        (f'database_url = "mysql://me:{PASSWORD}@host/shop"\n', "(?i)database_url"),
    ],
)
def test_a_file_that_cannot_be_used(text: str, said: str, tmp_path: Path, database_url: str) -> None:
    file = tmp_path / "outbox.toml"
    file.write_text(text)
    url = None if "database_url" in text else database_url
    fails(78, said, done=finish("run", "--drain", "--config", str(file), url=url))
    fails(78, said, done=finish("status", url=url, config=file))


def test_a_file_that_is_not_there(tmp_path: Path, database_url: str) -> None:
    fails(78, "nowhere.toml", done=finish("status", "--config", str(tmp_path / "nowhere.toml"), url=database_url))


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path, database_url: str) -> None:
    file = tmp_path / "outbox.toml"
    file.write_text(f'database_url = "{database_url}"\nconcurrency = 3\n')
    started = [
        finish("run", "--drain", "-c", str(file)),
        finish("run", "--drain", "-c", str(file), concurrency=2),
        finish("run", "--drain", "-c", str(file), "--concurrency", "1", concurrency=2),
    ]
    assert [done.record("worker_started")["concurrency"] for done in started] == [3, 2, 1]


def test_an_unknown_variable_is_a_warning_with_the_nearest_name(database_url: str) -> None:
    done = finish("run", "--drain", url=database_url, batchsize=5, zzzzzzzz=PASSWORD)
    assert done.code == 0, done.stderr
    told = {each["variable"]: each for each in done.records if each["event"] == "unknown_setting"}
    assert told.keys() == {"OUTBOX_BATCHSIZE", "OUTBOX_ZZZZZZZZ"}
    assert {each["level"] for each in told.values()} == {"WARNING"}
    assert "OUTBOX_BATCH_SIZE" in told["OUTBOX_BATCHSIZE"]["message"]
    assert PASSWORD not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--dry"],
        ["run", "--concurrency", "two"],
        ["walk"],
        ["migrate", "--with", "wings"],
        ["dead-letters", "list", "--state", "odd"],
        ["dead-letters", "list", "--limit", "0"],
        ["audit", "extra"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], database_url: str) -> None:
    fails(2, "Usage:", done=finish(*arguments, url=database_url))


# --- streams that accept no output, signals that come early


@pytest.mark.parametrize("command", ["--version", "--help", "status --json", "status", "audit"])
def test_a_full_stdout_is_one_sentence(command: str, database_url: str) -> None:
    done = finish_in_shell(f"$WORKER {command} > /dev/full", database_url)
    assert done.code == 1, done
    assert done.stderr == "outbox-worker: The output could not be written: No space left on device.\n"


@pytest.mark.parametrize("command", ["--version", "--help", "status --json", "status"])
def test_a_reader_that_went_away_is_no_traceback(command: str, database_url: str) -> None:
    done = finish_unread(*command.split(), url=database_url)
    assert (done.code, done.stderr) == (1, "")


def test_without_stdout_and_stderr_the_daemon_works(database_url: str, shop: Shop) -> None:
    shop.paid()
    assert finish_in_shell("$WORKER run --drain >&- 2>&-", database_url).code == 0
    assert shop.count("outbox") == 0


EARLY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background has it ignored

class Finder:
    def find_spec(self, name, *_):
        if name == "outbox_worker.cli":
            os.kill(os.getpid(), getattr(signal, sys.argv.pop()))

sys.meta_path.insert(0, Finder())
from outbox_worker.__main__ import main
main()
"""
"""Send a signal during the imports, the first tenths of a second of every command."""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("command", "code"), [("run", 0), ("demo", 0), ("migrate", 130), ("audit", 130)])
def test_a_signal_during_the_imports(command: str, code: int, name: str) -> None:
    done = finish_script(EARLY, command, name)
    assert (done.code, done.stdout, done.stderr) == (code, "", "")
