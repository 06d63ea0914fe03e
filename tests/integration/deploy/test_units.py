"""The shipped systemd units: systemd understands every line, and a worker can do little harm."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from outbox_worker.daemon.supervision import STEP_DEADLINES
from outbox_worker.settings import Settings
from tests.support import ROOT

DEPLOY = ROOT / "deploy"
PROGRAM = "/opt/outbox-worker/bin/outbox-worker"


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("systemd-analyze is not installed")
    return found


@pytest.fixture(params=["outbox-worker.service", "outbox-worker@9465.service"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Copy the unit under systemd's name for it, with a program that exists on this machine."""
    path = tmp_path / str(request.param)
    source = DEPLOY / re.sub("@.*[.]", "@.", path.name)
    path.write_text(source.read_text().replace(PROGRAM, sys.executable))
    return path


def use_unix_socket(unit: Path) -> None:
    directory = unit.parent / f"{unit.name}.d"
    directory.mkdir()
    shutil.copy(DEPLOY / "unix-socket.conf", directory)


def told(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def exposure(analyze: str, unit: Path) -> float:
    said = told(analyze, "security", "--offline=true", "--no-pager", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert found, said
    return float(found[1])


@pytest.mark.parametrize("on_unix_socket", [False, True])
def test_systemd_has_nothing_to_say(analyze: str, unit: Path, on_unix_socket: bool) -> None:
    if on_unix_socket:
        use_unix_socket(unit)
    assert told(analyze, "verify", "--man=no", unit) == ""


def test_a_line_that_systemd_does_not_understand_would_be_told(analyze: str, unit: Path) -> None:
    unit.write_text(unit.read_text().replace("WatchdogSec=90", "WatchDogSec=90"))
    assert "WatchDogSec" in told(analyze, "verify", "--man=no", unit)


def test_exposure_over_tcp(analyze: str, unit: Path) -> None:
    assert exposure(analyze, unit) <= 1.0


def test_exposure_with_a_database_on_a_unix_socket(analyze: str, unit: Path) -> None:
    use_unix_socket(unit)
    assert exposure(analyze, unit) <= 0.6


def test_instances_differ_in_their_address_only() -> None:
    one, many = (DEPLOY.joinpath(name).read_text() for name in ("outbox-worker.service", "outbox-worker@.service"))
    changed = [line for line in difflib.ndiff(one.splitlines(), many.splitlines()) if line[0] in "+-"]
    assert [line.split("=")[0] for line in changed] == ["- Description", "+ Description", "+ Environment"]
    assert changed[-1] == "+ Environment=OUTBOX_HTTP_LISTEN=127.0.0.1:%i"


def test_the_service_waits_longer_than_a_step_may_take() -> None:
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "outbox-worker.service").read_text())
    service = parser["Service"]
    deadline = Settings.model_fields["database_deadline_seconds"].default
    assert float(service["WatchdogSec"]) > STEP_DEADLINES * deadline
    assert float(service["TimeoutStopSec"]) > 2 * deadline
    assert (service["Type"], service["RestartPreventExitStatus"]) == ("notify", "78")
    assert parser["Unit"]["StartLimitIntervalSec"] == "0"
