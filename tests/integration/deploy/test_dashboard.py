"""The dashboard is what its source generates.

It has Grafana's form and uses only exported metrics.
"""

from __future__ import annotations

import json
import runpy
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.promql import exported, problems, recorded

DIRECTORY = ROOT / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((DIRECTORY / "outbox-worker.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ROWS = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
UNITS = {"short", "s", "ops", "percentunit"}
VARIABLES = {"$__rate_interval": "5m"}


def test_it_is_what_make_dashboard_writes() -> None:
    assert runpy.run_path(str(DIRECTORY / "dashboard.py"))["dashboard"]() == DASHBOARD


def test_its_rows_are_the_questions_of_an_operator() -> None:
    assert ROWS == ["Is anything owed?", "Is it keeping up?", "What fails?", "What does the database do?"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    """The grid of Grafana has 24 columns."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in DASHBOARD["panels"]):
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert cells
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_complete(panel: dict[str, Any]) -> None:
    assert panel["type"] in {"stat", "timeseries"}
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]
    assert [target["refId"] for target in panel["targets"]] == [*"ABCD"][: len(panel["targets"])]
    assert {target["datasource"]["uid"] for target in (panel, *panel["targets"]) if "datasource" in target} == {
        "${datasource}"
    }


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_is_exported_of_the_chosen_database(panel: dict[str, Any]) -> None:
    series = exported()
    for target in panel["targets"]:
        query = target["expr"]
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        assert problems(query, series | recorded(series)) == []
        assert query.count('job="$job"') == 1


def test_its_variables_ask_for_what_is_exported() -> None:
    datasource, job = DASHBOARD["templating"]["list"]
    assert (datasource["name"], job["name"]) == ("datasource", "job")
    assert job["query"]["query"] == "label_values(outbox_build_info, job)"
    assert "outbox_build_info" in exported()


def test_every_metric_of_the_worker_is_shown() -> None:
    """The dashboard or a rule uses every metric.

    The number of events per claim is the only exception.
    """
    asked = json.dumps(PANELS) + (ROOT / "deploy/prometheus/outbox-worker.rules.yml").read_text()
    hidden = {name for name in exported() if not name.endswith(("_created", "_sum", "_count")) and name not in asked}
    assert hidden == {"outbox_batch_size_bucket"}
