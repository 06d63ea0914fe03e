"""docs/reference/log-records.md says what the code does."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

from tests.support import ROOT

PAGE = (ROOT / "docs" / "reference" / "log-records.md").read_text()
LEVELS = {"debug", "info", "warning", "error"}
COUNTS = "counts"
"""A word for the fields whose names come from ``Metrics.totals``, in the code and on the page."""
Told = dict[str, tuple[set[str], set[str]]]
"""Levels and fields of each event."""


def test_the_page_lists_the_records_that_the_code_writes() -> None:
    assert len(bound()) > 25
    assert documented() == bound()


def test_every_record_has_a_name() -> None:
    """The code only binds ``logger``.

    What it binds has an event, or adds fields to a bound event.
    """
    for function in functions():
        for call in calls(function):
            if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "logger":
                assert call.func.attr in {"bind", "add", "remove", "disable", "enable"}, ast.unparse(call)


# --- helpers


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def documented() -> Told:
    rows = [line.split("|")[1:4] for line in section("Records").splitlines() if line.startswith("| `")]
    told: Told = {}
    for names, levels, fields in rows:
        for name in re.findall(r"`(\w+)`", names):
            given = set(re.findall(r"`(\w+)`", fields)) | ({COUNTS} if COUNTS in fields else set())
            told[name] = ({level.strip().lower() for level in levels.split(",")}, given)
    return told


def bound() -> Told:
    """Read each ``bind(event="…", …)`` in the source, with all its fields and its levels."""
    told: Told = {}
    for function in functions():
        bases = {
            target.id: keywords(node.value)
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in calls(function):
            if not (isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call)):
                continue
            given, base = keywords(call.func.value), call.func.value.func
            if "event" not in given:
                continue
            if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
                given |= bases.get(base.value.id, {})
            name = given.pop("event")
            assert isinstance(name, ast.Constant), f"an event's name is written out: {ast.unparse(call)}"
            assert isinstance(name.value, str)
            levels, fields = told.setdefault(name.value, (set(), set()))
            levels.update(levels_of(call, function))
            fields.update(given)
    return told


@functools.cache
def functions() -> list[ast.FunctionDef]:
    paths = [*(ROOT / "outbox_worker").rglob("*.py")]
    assert len(paths) > 60, "the program lies elsewhere; the tests prove nothing"
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def calls(function: ast.FunctionDef) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg or ast.unparse(keyword.value): keyword.value for keyword in call.keywords}


def levels_of(call: ast.Call, function: ast.FunctionDef) -> set[str]:
    """Return the method's name.

    For ``log(level, …)`` return the levels that the argument or function names.
    """
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr in LEVELS:
        return {call.func.attr}
    return levels_named(call.args[0]) or levels_named(function)


def levels_named(tree: ast.AST) -> set[str]:
    named = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {word.lower() for word in named if isinstance(word, str) and word.lower() in LEVELS}
