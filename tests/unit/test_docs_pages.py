"""The README says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from outbox_worker.cli import app
from outbox_worker.model import COLUMNS, Outcome, Reason
from outbox_worker.settings import reference

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_settings_are_those_of_the_code() -> None:
    written = re.search(r"<!-- settings -->\n(.*)\n<!-- /settings -->", README, re.DOTALL)
    assert written is not None
    assert written[1] == reference(), "run `make reference`"


def test_every_command_is_named() -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, typer.core.TyperGroup)
    for name in root.commands:
        assert f"`outbox-worker {name}" in README


@pytest.mark.parametrize("table", COLUMNS)
def test_every_column_is_named(table: str) -> None:
    row = re.search(rf"^\| `{table}` \|.*$", README, re.MULTILINE)
    assert row is not None
    assert all(re.search(rf"\b{column}\b", row[0]) for column in COLUMNS[table])


def test_every_outcome_and_reason_is_explained() -> None:
    operations = (ROOT / "docs/operations.md").read_text()
    assert all(f"| `{outcome}` |" in README for outcome in Outcome)
    assert all(f"| `{reason}` |" in operations for reason in Reason)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
