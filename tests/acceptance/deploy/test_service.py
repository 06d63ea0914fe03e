"""The installed service under a real, booted systemd. It runs in a container and needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.factories import Shop
from tests.support.processes import eventually
from tests.support.proxy import proxied
from tests.support.watchers import WEDGED

pytestmark = pytest.mark.slow
TOOLS = ("debootstrap", "systemd-nspawn", "nsenter")
UNIT = "outbox-worker.service"
PACKAGES = "systemd,systemd-sysv,dbus,python3"


def make(target: str, root: Path) -> None:
    done = subprocess.run(["make", target, f"DESTDIR={root}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def files_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def test_install_and_uninstall_in_another_root(tmp_path: Path) -> None:
    """The installation does not change existing settings or an existing URL."""
    root, config = tmp_path / "root", tmp_path / "root/etc/outbox-worker"
    make("install-service", root)
    assert (config / "database-url").stat().st_mode & 0o777 == 0o600
    for name in ("outbox-worker.service", "outbox-worker@.service"):
        assert (root / "etc/systemd/system" / name).read_text() == (ROOT / "deploy" / name).read_text()
    program = root / "opt/outbox-worker/bin/outbox-worker"
    assert program.read_text().startswith("#!/opt/outbox-worker/bin/python\n"), "where it will stand"
    command = [str(program.parent / "python"), str(program), "--version"]
    version = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert version.startswith("outbox-worker ")
    for name in ("database-url", "outbox-worker.toml"):
        (config / name).write_text("mine")
    make("install-service", root)
    make("uninstall-service", root)
    assert files_of(root) == {"etc/outbox-worker/database-url", "etc/outbox-worker/outbox-worker.toml"}
    assert {path.read_text() for path in config.iterdir()} == {"mine"}


@dataclass
class Machine:
    """A container with a systemd of its own. It uses the network of the host."""

    root: Path
    nspawn: subprocess.Popen[bytes]

    def run(self, *command: str, status: int | None = 0) -> str:
        children = Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children").read_text().split()
        inside = ["nsenter", "--target", children[0] if children else "-", "--all", *command]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        assert status is None or done.returncode == status, done.stdout + done.stderr
        return done.stdout

    def is_up(self) -> bool:
        return self.run("systemctl", "is-system-running", status=None).strip() in ("running", "degraded")

    def shown(self, name: str) -> str:
        return self.run("systemctl", "show", "--value", "--property", name, UNIT).strip()

    def journal(self) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", UNIT)

    def configure(self, text: str) -> None:
        (self.root / "etc/outbox-worker/outbox-worker.toml").write_text(f'http_listen = "127.0.0.1:0"\n{text}\n')


@contextmanager
def booted(root: Path) -> Iterator[Machine]:
    options = ["--quiet", "--keep-unit", "--register=no", "--console=pipe", "--boot", f"--directory={root}"]
    with (root.parent / "console").open("wb") as console:
        nspawn = subprocess.Popen(
            ["systemd-nspawn", *options], stdin=subprocess.DEVNULL, stdout=console, stderr=console
        )
    try:
        machine = Machine(root, nspawn)
        eventually(lambda: nspawn.poll() is not None or machine.is_up(), "the boot", 120)
        if nspawn.poll() is not None:
            pytest.skip(f"no container can be started here: {(root.parent / 'console').read_text()[-500:]}")
        yield machine
    finally:
        nspawn.terminate()
        try:
            nspawn.wait(30)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small Debian on which `make` has installed the service."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing or TOOLS)} (Debian: debootstrap, systemd-container)")
    made = tmp_path_factory.mktemp("machine") / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no Debian to be had: {done.stdout[-500:]}")
    make("install-service", made)
    (packages,) = made.glob("opt/outbox-worker/lib/python3*/site-packages")
    hook = WEDGED.partition("from outbox_worker.__main__")[0].replace("sys.argv.pop(1)", "'/run/wedged'")
    (packages / "wedge.py").write_text(hook)
    (packages / "wedge.pth").write_text("import sys; 'run' in sys.argv and __import__('wedge')\n")
    return made


def test_a_real_systemd_sees_it_ready_restarts_it_when_wedged_and_stops_it(
    root: Path, database_url: str, shop: Shop
) -> None:
    with proxied(database_url) as line, booted(root) as machine:
        (root / "etc/outbox-worker/database-url").write_text(line.url)
        drop_in = root / f"etc/systemd/system/{UNIT}.d/test.conf"
        drop_in.parent.mkdir()
        drop_in.write_text("[Service]\nWatchdogSec=10\n")
        machine.configure("database_deadline_seconds = 1")
        machine.run("systemctl", "daemon-reload")

        machine.run("systemctl", "start", UNIT)
        assert machine.shown("ActiveState") == "active"
        _, event = shop.paid()
        eventually(lambda: shop.outcome_of(event) == "created", "an event is settled")
        eventually(lambda: "due: " in machine.shown("StatusText"), "a status that a person can read")

        machine.configure('database_deadline_seconds = 1\nlog_level = "DEBUG"')
        machine.run("systemctl", "reload", UNIT)
        eventually(lambda: '"event": "reloaded"' in machine.journal(), "the reload")

        machine.run("touch", "/run/wedged")
        eventually(lambda: machine.shown("NRestarts") == "1", "a restart", 60)
        machine.run("rm", "/run/wedged")
        assert "Watchdog timeout" in machine.journal()
        assert "in wedged" in machine.journal(), "where the loop was, by faulthandler"
        _, event = shop.paid()
        eventually(lambda: shop.outcome_of(event) == "created", "an event is settled after the restart", 60)

        machine.run("systemctl", "stop", UNIT)
        assert (machine.shown("Result"), machine.shown("ExecMainStatus")) == ("success", "0")
        assert '"event": "worker_stopped"' in machine.journal()

        machine.configure("batch_size = 0")
        machine.run("systemctl", "start", UNIT, status=1)
        eventually(lambda: machine.shown("ActiveState") == "failed", "the end")
        assert (machine.shown("ExecMainStatus"), machine.shown("NRestarts")) == ("78", "0")


def test_a_real_systemd_starts_it_without_database_and_leaves_it_alone(root: Path) -> None:
    with booted(root) as machine:
        (root / "etc/outbox-worker/database-url").write_text("postgresql://nobody@127.0.0.1:1/nowhere")
        machine.configure("")
        machine.run("systemctl", "start", UNIT)
        assert machine.shown("StatusText").startswith("without database")
        machine.run("systemctl", "stop", UNIT)
        assert machine.shown("NRestarts") == "0"
