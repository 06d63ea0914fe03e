"""Sessions that are read-only by default: commands that read work, others name the setting."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support import servers
from tests.support.commands import fails
from tests.support.premises import Premises, opened, settle_in
from tests.support.processes import finish

LOOKING = (
    ("status",),
    ("audit",),
    ("dead-letters", "list"),
    ("duplicates", "list"),
    ("backfill", "--dry-run"),
)


@pytest.fixture(scope="module")
def premises(server: servers.Server) -> Iterator[Premises]:
    with opened(server) as made:
        settle_in(made, "unique_index")
        yield made


@pytest.fixture
def read_only(premises: Premises) -> Iterator[Premises]:
    """Make every role of these premises read-only by default."""
    names = [premises.names[role] for role in ("reader", "worker", "operator", "migrator")]
    for name in names:
        premises.execute(f"ALTER ROLE {name} SET default_transaction_read_only = on")
    yield premises
    for name in names:
        premises.execute(f"ALTER ROLE {name} RESET default_transaction_read_only")


def test_who_only_looks_does_not_notice(read_only: Premises) -> None:
    for command in LOOKING:
        done = finish(*command, "--json", url=read_only.url_of("reader"))
        assert done.code == 0, done
        assert "standby" not in done.object
    found = finish("doctor", "--json", url=read_only.url_of("reader")).object
    (told,) = [each for each in found["checks"] if each["name"] == "read_only"]
    assert told["verdict"] == "ok"


def test_the_worker_writes_and_doctor_names_the_parameter(read_only: Premises) -> None:
    with read_only.shop() as shop:
        _, event = shop.paid()
        done = finish("run", "--drain", url=read_only.url_of("worker"))
        assert done.code == 0, done
        assert [record for record in done.records if record["event"] == "paused"] == []
        assert shop.outcome_of(event) == "created"
    found = finish("doctor", "--json", url=read_only.url_of("worker")).object
    (told,) = [each for each in found["checks"] if each["name"] == "read_only"]
    assert told["verdict"] == "warning"
    assert read_only.names["worker"] in told["evidence"]


@pytest.mark.parametrize("role", ["operator", "migrator"])
def test_a_person_who_writes_is_told_and_the_remedy_helps(read_only: Premises, role: str) -> None:
    command = ["backfill"] if role == "operator" else ["migrate"]
    url = read_only.url_of(role)
    sentence = fails(78, "default_transaction_read_only is on for the role", done=finish(*command, url=url))
    (remedy,) = re.findall(r"ALTER ROLE [^;]+;", sentence)
    read_only.execute(remedy)
    done = finish(*command, url=url)
    assert done.code == 0, done
