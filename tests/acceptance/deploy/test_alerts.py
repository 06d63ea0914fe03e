"""The rules for Prometheus use exported metrics, fire when they should, and say what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.promql import PROMETHEUS, RULE_TESTS, RULES, alerts, exported, problems, recorded, rules

PROMTOOL = shutil.which("promtool")
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed here (Debian: prometheus)")


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_ask_for_what_is_exported(rule: dict[str, str]) -> None:
    series = exported()
    assert problems(rule["expr"], series | recorded(series)) == []


@pytest.mark.parametrize("query", ["outbox_event_total", 'outbox_events_total{outcom="dead"}', "job:outbox:ratio1h"])
def test_a_misspelt_query_is_found(query: str) -> None:
    series = exported()
    assert problems(f"sum(rate({query}[5m]))", series | recorded(series))
    assert problems('outbox_events_total{outcome=~"created|recoverd"}', series) == [
        "no value recoverd of outcome of outbox_events_total"
    ]


@pytest.mark.parametrize("alert", alerts())
def test_each_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = alerts()[alert]
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page == "docs/runbook.md"
    titles = re.findall(r"^#+ (.*)", RUNBOOK, re.MULTILINE)
    assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
    text = RUNBOOK.partition(f"\n### {alert}\n")[2].partition("\n##")[0]
    assert all(f"*{word}*" in text for word in ("Means:", "Look:", "Do:")), alert
    assert "`" in text, "real commands"


@pytest.mark.parametrize("alert", alerts())
def test_each_alert_is_seen_to_fire_and_not_to_fire(alert: str) -> None:
    fires, quiet = False, False
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        jobs = {job for series in test["input_series"] for job in re.findall(r'job="(\w+)"', series["series"])}
        for case in test["alert_rule_test"]:
            if case["alertname"] == alert:
                firing = case.get("exp_alerts", [])
                fires |= bool(firing)
                quiet |= len(jobs) > len(firing)
    assert fires
    assert quiet


@needs_promtool
def test_promtool_agrees() -> None:
    assert_agrees(PROMETHEUS, "check", "rules", RULES.name)
    assert_agrees(PROMETHEUS, "test", "rules", RULE_TESTS.name)
    assert_agrees(PROMETHEUS, "check", "config", "prometheus.yml")


@needs_promtool
@pytest.mark.slow
@pytest.mark.parametrize(
    ("threshold", "another"),
    [
        ("_payments) > 0", "_payments) > 5"),
        ("_risk) > 1000", "_risk) > 10"),
        ("letters) > 0", "letters) > 5"),
        ("absent(present_over_time(outbox_build_info[1h]))", "outbox_build_info == 7"),
        ("unless on (job)", "and on (job)"),
        ("poll_seconds) > 60", "poll_seconds) > 6000"),
        ("min by (job) (outbox_since", "max by (job) (outbox_since"),
        ("> 300\n", "> 3000\n"),
        ("[10m:1m]) > 0", "[10m:1m]) < 100"),
        ("< 0.999", "< 0.9"),
        ("succeeded:increase1h >= 5", "succeeded:increase1h >= 0"),
        ('event_type!="PURCHASE_REFUNDED", ', ""),
        (', outcome!="retried"', ""),
        ("> 0.01", "> 0.05"),
        (">= 3", ">= 0"),
        ("> 0.001", "> 0.05"),
        ("rolled_back:increase1h >= 5", "rolled_back:increase1h >= 0"),
        ("== 1", "== 0"),
        ("> 1800", "> 18000"),
    ],
)
def test_the_tests_of_the_rules_mind_each_threshold(tmp_path: Path, threshold: str, another: str) -> None:
    text = RULES.read_text()
    assert threshold in text
    (tmp_path / RULES.name).write_text(text.replace(threshold, another))
    shutil.copy(RULE_TESTS, tmp_path)
    with pytest.raises(AssertionError, match="FAILED"):
        assert_agrees(tmp_path, "test", "rules", RULE_TESTS.name)


def assert_agrees(directory: Path, *arguments: str) -> None:
    assert PROMTOOL is not None
    command = [PROMTOOL, *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
