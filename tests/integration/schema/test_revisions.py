"""Released revisions never change: they import nothing of the program."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from alembic.util import load_python_file

from outbox_worker.schema import tables as schema
from outbox_worker.settings import load_settings
from tests.support import ROOT

MIGRATIONS = ROOT / "alembic"
FROZEN = [MIGRATIONS / "naming.py", *sorted((MIGRATIONS / "versions").rglob("*.py"))]
REVISIONS_MIN = 5
ALLOWED = {"__future__", "alembic", "collections", "dataclasses", "naming", "sqlalchemy", "typing"}


def test_all_of_them_are_looked_at() -> None:
    assert len(FROZEN) > REVISIONS_MIN


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_a_revision_imports_nothing_of_the_program(path: Path) -> None:
    assert imported(path.read_text()) <= ALLOWED


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_a_revision_takes_nothing_from_the_configuration_but_the_names(path: Path) -> None:
    assert taken(path.read_text()) <= {"naming"}


@pytest.mark.parametrize(
    "source",
    [
        "import outbox_worker",
        "import sqlalchemy, outbox_worker.model as model",
        "from outbox_worker.schema import OWNED",
        "def upgrade():\n    from outbox_worker import guard",
        "import importlib",
        "from . import other",
    ],
)
def test_the_look_at_imports_can_fail(source: str) -> None:
    assert not imported(source) <= ALLOWED


def test_the_look_at_the_configuration_can_fail() -> None:
    assert taken("context.config.attributes['settings'].tables") == {"settings"}
    assert taken("context.config.attributes.get('settings')") == {None}


def test_the_program_knows_by_the_same_names_what_the_migrations_made() -> None:
    """If one of these names changes, a revision must rename the object in existing databases."""
    naming = frozen_naming().TableNaming
    assert naming.owned == schema.OWNED
    assert naming.pair_index == schema.PAIR_INDEX
    assert naming.pair_lookup_index == schema.PAIR_LOOKUP_INDEX
    assert naming.notify_channel == schema.NOTIFY_CHANNEL
    assert naming.notify_trigger == schema.NOTIFY_TRIGGER


def test_the_frozen_names_follow_the_settings_as_the_programs_do() -> None:
    settings = load_settings(
        schema="work",
        tables="payments=billing.payment,outbox=events",
        columns="payments.student_id=user_id,outbox.id=number",
    )
    naming = frozen_naming().Naming(settings.schema_name, settings.tables, settings.columns)
    for role, table in schema.build_tables(settings).by_role().items():
        names = naming.of(role)
        assert (names.schema, names.table) == (table.schema, table.name)
        assert {column.key: names.column(column.key) for column in table.c} == {c.key: c.name for c in table.c}


def frozen_naming() -> Any:
    return load_python_file(str(MIGRATIONS), "naming.py")


def imported(source: str) -> set[str]:
    """Return the top-level packages of all imports, at any place.

    A relative import counts by its dots.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level or str(node.module).partition(".")[0])
    return found


def taken(source: str) -> set[str | None]:
    """Return the keys that the source reads from ``.attributes``. An unknown key is None."""
    nodes = list(ast.walk(ast.parse(source)))
    keys: dict[ast.expr, str] = {
        node.value: node.slice.value
        for node in nodes
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    }
    return {keys.get(node) for node in nodes if isinstance(node, ast.Attribute) and node.attr == "attributes"}
