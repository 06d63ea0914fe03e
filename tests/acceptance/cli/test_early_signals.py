"""A stop signal at any moment of a start ends the process. No signal is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.processes import environment, finish_script

MOMENTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""When the signal is sent, as shares of the time from the first statement to the worker's start."""

STARTED = """
import os, sys
from outbox_worker import interrupts

def install_and_tell(install=interrupts.install):
    install()
    os.write(1, b"first statement\\n")

interrupts.install = install_and_tell
sys.argv = ["outbox-worker", *sys.argv[1:]]
from outbox_worker.__main__ import main
main()
"""
"""Print a line at the first statement of the program.

All imports except those of the standard library come after it.
"""

SWALLOWED = """
import os, signal, sys
place, name = sys.argv.pop(), sys.argv.pop()
sent = []

def send(frame, event, arg):
    of_import = frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename
    is_handled = signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
    if event == "call" and of_import and is_handled and ("outbox_worker." + place) in sys.modules and not sent:
        sent.append(True)
        sys.setprofile(None)
        os.kill(os.getpid(), getattr(signal, name))

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.setprofile(send)
from outbox_worker.__main__ import main
try:
    main()
finally:
    sys.stdout.write(f"sent {len(sent)}")
"""
"""Send the signal inside a weakref callback of the import system.

The callback swallows what a signal handler raises. ``place`` is the module whose import has begun:
the module of the command line, or that of the command.
"""


INSIDE_EXEC = """
import os, signal
from outbox_worker import __main__ as program

program._run = lambda: exec("os.kill(os.getpid(), signal.SIGTERM)")
program.main()
"""
"""Send the signal while code from a string runs. A dataclass or a named tuple runs such code."""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("place", ["cli", "daemon.worker"])
def test_a_signal_that_an_import_swallows_still_ends_the_daemon(place: str, name: str, database_url: str) -> None:
    done = finish_script(SWALLOWED, "run", name, place, url=database_url, patience=20)
    assert (done.code, done.stdout) == (0, "sent 1"), done
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(("command", "code"), [("run", 0), ("audit", 130)])
def test_one_that_interrupts_code_run_from_a_string_leaves_the_exit_status(
    command: str, code: int, tmp_path: Path
) -> None:
    """CPython would end the process by SIGINT, even if the code caught the interruption."""
    (tmp_path / "interrupted.py").write_text(INSIDE_EXEC)
    started = [sys.executable, "-m", "interrupted", command]
    done = subprocess.run(
        started, env=environment(None, {}) | {"PYTHONPATH": str(tmp_path)}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_so_does_one_that_ends_another_command(database_url: str) -> None:
    """No code of the command ``audit`` looks for the flag. The interruption is raised again."""
    done = finish_script(SWALLOWED, "audit", "SIGTERM", "reconcile.audit", url=database_url, patience=20)
    assert (done.code, done.stdout) == (130, "sent 1"), done
    assert done.stderr == ""


@pytest.mark.parametrize("times", [1, 2])
def test_at_any_moment_of_a_start_that_loads_everything_anew(times: int, database_url: str) -> None:
    """Other tests fork a process that has loaded the libraries already.

    These processes load them anew.
    """
    whole = _seconds_until_ended(database_url, None, times)
    for share in MOMENTS[:: 1 if times == 1 else 3]:
        _seconds_until_ended(database_url, share * whole, times)


def _seconds_until_ended(url: str, delay: float | None, times: int) -> float:
    """Send SIGTERM ``delay`` seconds after the first statement, or after the worker has started.

    The process must end with 0.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, "run"],
        env=environment(url, {}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "first statement\n"
        began = time.monotonic()
        if delay is None:
            assert any("worker_started" in line for line in process.stderr)
        else:
            time.sleep(delay)
        seconds = time.monotonic() - began
        for _ in range(times):
            os.kill(process.pid, 15)
        _, told = process.communicate(timeout=20)
        assert process.returncode == 0, (delay, told)
        assert "Traceback" not in told
    finally:
        process.kill()
        process.communicate()
    return seconds
