"""Dockerfile and compose.yaml fit the repository.

The tests do not build them: that needs an engine.
"""

from __future__ import annotations

import re

import pytest
import yaml

from tests.support import ROOT
from tests.support.promql import PROMETHEUS

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
COPIED = [path for line in re.findall(r"^COPY ((?!--from).*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()]


@pytest.mark.parametrize("path", COPIED)
def test_what_the_image_is_made_of_is_there_and_let_through(path: str) -> None:
    assert (ROOT / path).exists()
    assert f"!{path}" in IGNORED


def test_nothing_else_is_let_through() -> None:
    assert IGNORED[1] == "*"
    assert {line[1:] for line in IGNORED if line.startswith("!")} == set(COPIED)


def test_the_image_runs_without_root_and_asks_the_daemon_how_it_is() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", final, re.MULTILINE)
    assert 'CMD ["outbox-worker", "healthcheck"]' in final
    assert "RUN" not in final


@pytest.mark.parametrize("service", ["migrate", "worker"])
def test_in_compose_it_may_write_nowhere_and_gain_nothing(service: str) -> None:
    given = COMPOSE["services"][service]
    assert given["read_only"] is True
    assert given["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in given["security_opt"]


def test_what_compose_mounts_is_there() -> None:
    mounts = [mount.split(":") for mount in COMPOSE["services"]["prometheus"]["volumes"]]
    assert ["./deploy/prometheus", "/etc/prometheus", "ro"] in mounts
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert all((PROMETHEUS / name).exists() for name in config["rule_files"])


def test_prometheus_asks_the_worker_by_a_name_to_which_it_answers() -> None:
    (scrape,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    ((target,),) = [each["targets"] for each in scrape["static_configs"]]
    host, _, port = target.partition(":")
    assert host in COMPOSE["services"]
    assert host == COMPOSE["services"]["worker"]["environment"]["OUTBOX_HTTP_HOSTS"]
    assert f"OUTBOX_HTTP_LISTEN=0.0.0.0:{port}" in DOCKERFILE
