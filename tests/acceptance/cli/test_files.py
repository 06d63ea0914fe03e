"""The command ``files`` can print everything that it lists, without a database or settings."""

from __future__ import annotations

from outbox_worker.cli.files import FILES
from tests.support import ROOT
from tests.support.commands import fails
from tests.support.processes import finish

NOT_LISTED = {"grafana/dashboard.py", "prometheus/outbox-worker.tests.yml"}
"""The script that makes the dashboard, and the tests of the alerts."""


def test_it_lists_every_file_for_users() -> None:
    done = finish("files")
    assert done.code == 0, done
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} == {"file", *FILES}
    directory = ROOT / "deploy"
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert {each for each in there if "__pycache__" not in each} == set(FILES) | NOT_LISTED


def test_it_prints_a_file_by_its_name() -> None:
    for name in ("grants.sql", "prometheus/outbox-worker.rules.yml", "outbox-worker.rules.yml"):
        done = finish("files", name)
        (path,) = (ROOT / "deploy").rglob(name.rpartition("/")[2])
        assert (done.code, done.stdout) == (0, path.read_text(encoding="utf-8"))


def test_a_name_that_it_does_not_have() -> None:
    fails(2, "grants.sql", "outbox-worker.service", done=finish("files", "grant.sql"))
