"""Runs the previous version of the worker in the same environment. Git provides its code."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

from tests.support import ROOT
from tests.support.forkserver import Child
from tests.support.processes import Finished, Process, environment

BEFORE_TAGS = "65e85b9"
"""The last commit without revision core_0004. If no version has a tag, this commit is the previous
version."""


def last_version() -> str | None:
    """Return the commit of the newest tag, or ``BEFORE_TAGS`` if no tag exists. Return None if Git
    finds neither."""
    tag = _git("describe", "--tags", "--abbrev=0", "HEAD^")
    name = tag.stdout.decode().strip() if tag.returncode == 0 else BEFORE_TAGS
    found = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    return found.stdout.decode().strip() if found.returncode == 0 else None


def unpack(commit: str, directory: Path) -> Path:
    """Write the files of a commit into a directory, and return it."""
    archive = _git("archive", "--format=tar", commit)
    assert archive.returncode == 0, archive.stderr
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(directory, filter="data")
    return directory


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 127, b"", b"no git")


def finish_of(code: Path, *arguments: str, url: str, **settings: object) -> Finished:
    """Run ``outbox-worker ARGUMENTS`` with the code in the directory ``code`` until it ends."""
    done = subprocess.run(
        [sys.executable, "-m", "outbox_worker", *arguments],
        cwd=code,
        env=environment(url, settings) | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@contextmanager
def start_of(code: Path, *arguments: str, url: str, **settings: object) -> Iterator[Process]:
    """Start ``outbox-worker ARGUMENTS`` with the code in the directory ``code``. Kill it at the
    end."""
    with subprocess.Popen(
        [sys.executable, "-m", "outbox_worker", *arguments],
        cwd=code,
        env=environment(url, settings) | {"PYTHONPATH": str(code)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        assert popen.stderr is not None
        process = Process(cast("Child", popen), cast("TextIO", popen.stderr))
        try:
            yield process
        finally:
            process.kill()
            process._reader.join()
