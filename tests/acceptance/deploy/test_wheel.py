"""The command finds its migrations and works if only the wheel is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from tests.support import ROOT
from tests.support.factories import Shop
from tests.support.servers import libpq


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` of an environment with the wheel.

    It borrows the dependencies but not the checkout.
    """
    directory = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    built = run(sys.executable, "-c", build, str(directory), cwd=ROOT)
    environment = directory / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    bin_dir = environment / "bin"
    run(bin_dir / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", directory / built.strip())
    packages = Path(run(bin_dir / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin_dir


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_migrate_run_and_drain_from_the_wheel(
    installed: Path, make_url: Callable[[str | None], str], tmp_path: Path
) -> None:
    where = run(installed / "python", "-c", "import outbox_worker; print(outbox_worker.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    command, url = installed / "outbox-worker", make_url(None)
    run(command, "migrate", "--with", "unique_index", cwd=tmp_path, OUTBOX_DATABASE_URL=url)
    with psycopg.connect(libpq(url), autocommit=True) as connection:
        shop = Shop(connection)
        payment, event_id = shop.paid()
        run(command, "run", "--drain", cwd=tmp_path, OUTBOX_DATABASE_URL=url)
        assert shop.outcome_of(event_id) == "created"
        assert len(shop.purchases(payment)) == 1


def test_the_wheel_carries_the_files_for_deployment(installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "outbox-worker", "files", "grants.sql", cwd=tmp_path)
    assert printed == (ROOT / "deploy" / "grants.sql").read_text(encoding="utf-8")
