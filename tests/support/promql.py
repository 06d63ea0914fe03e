"""Checks PromQL queries: the worker or the recording rules must export every series that a query
uses."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import promql_parser as promql
import yaml

from outbox_worker.model import Guard
from outbox_worker.telemetry.reporter import Telemetry
from tests.support import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "outbox-worker.rules.yml"
RULE_TESTS = PROMETHEUS / "outbox-worker.tests.yml"
ANY_VALUE = {"job", "instance", "le", "currency", "version"}
"""Labels whose values the tests cannot list."""
Series = dict[str, dict[str, set[str]]]
"""Maps the name of a metric to its labels, and each label to its possible values."""


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def exported() -> Series:
    """Return all series that a worker can export."""
    telemetry = Telemetry()
    telemetry.guard_changed(Guard.LOCK)
    telemetry.observe_unexplained(1, {"EUR": Decimal(1)})
    series: Series = {}
    for sample in (sample for family in telemetry.metrics.registry.collect() for sample in family.samples):
        labels = series.setdefault(sample.name, {"job": set(), "instance": set()})
        for label, value in sample.labels.items():
            labels.setdefault(label, set()).add(value)
    return series


def recorded(series: Series) -> Series:
    """Return the series of the recording rules. The part of the name before the first colon lists
    the labels."""
    made: Series = {}
    for rule in rules():
        if "record" in rule:
            labels = rule["record"].partition(":")[0].split("_")
            values = {label: values for each in series.values() for label, values in each.items()}
            made[rule["record"]] = {label: values.get(label, set()) for label in labels}
    return made


def problems(query: str, series: Series) -> list[str]:
    """Return the names, labels and label values of a query that nobody exports. Raise ValueError if
    it is not PromQL."""
    found: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.extend(_problems_of(node, series))

    promql.walk(promql.parse(query), visit)
    return found


def _problems_of(selector: promql.VectorSelector, series: Series) -> list[str]:
    labels = series.get(selector.name or "")
    if labels is None:
        return [f"no metric {selector.name}"]
    found = []
    for matcher in selector.matchers.matchers:
        if matcher.name not in labels:
            found.append(f"no label {matcher.name} of {selector.name}")
        elif matcher.name not in ANY_VALUE:
            strange = set(matcher.value.split("|")) - labels[matcher.name]
            found += [f"no value {value} of {matcher.name} of {selector.name}" for value in strange]
    return found
