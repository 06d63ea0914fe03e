"""A role without privileges is told to get them, use another role, or run grants.sql again."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support import servers
from tests.support.commands import fails
from tests.support.premises import Premises, opened, settle_in
from tests.support.processes import finish


@pytest.fixture(scope="module")
def premises(server: servers.Server) -> Iterator[Premises]:
    with opened(server) as made:
        settle_in(made, "unique_index")
        yield made


def grants_of(premises: Premises, role: str) -> list[dict[str, str]]:
    found = finish("doctor", "--json", url=premises.url_of(role)).object
    return [each for each in found["checks"] if each["name"] == "grants"]


@pytest.mark.parametrize(
    ("role", "command", "right"),
    [
        ("reader", ["run", "--drain"], "worker"),
        ("reader", ["backfill"], "operator"),
        ("reader", ["dead-letters", "requeue", "--all", "--actor", "a", "--reason", "b"], "operator"),
        ("operator", ["run", "--drain"], "worker"),
        ("worker", ["dead-letters", "discard", "--all", "--actor", "a", "--reason", "b"], "operator"),
    ],
)
def test_a_command_of_another_role_names_that_role(
    premises: Premises, role: str, command: list[str], right: str
) -> None:
    sentence = fails(78, f"in grants.sql: {right}", done=finish(*command, url=premises.url_of(role)))
    assert "GRANT" not in sentence
    assert premises.names[role] in sentence


@pytest.mark.parametrize("role", ["reader", "operator"])
def test_doctor_does_not_ask_another_role_for_the_workers_privileges(premises: Premises, role: str) -> None:
    (told,) = grants_of(premises, role)
    assert told["verdict"] == "unseen"
    assert f"is not a worker's but {'a reader' if role == 'reader' else 'an operator'}'s" in told["evidence"]
    assert "GRANT" not in told["remedy"]
    assert finish("doctor", url=premises.url_of("worker")).stdout.count("has exactly the privileges") == 1


@pytest.mark.parametrize(("role", "command"), [("worker", ["run", "--drain"]), ("reader", ["status"])])
def test_where_grants_were_not_run_again_after_migrate_this_is_said(
    premises: Premises, role: str, command: list[str]
) -> None:
    table = "workers" if role == "worker" else "dead_letters"
    premises.execute(f"REVOKE ALL ON {table} FROM {premises.names[role]}")
    sentence = fails(78, "grants.sql was not run again after", done=finish(*command, url=premises.url_of(role)))
    assert re.search(r"outbox-worker files grants\.sql \| psql -d \w+", sentence)
    assert any("was not run again" in each["remedy"] for each in grants_of(premises, role))
    premises.grant()
    assert finish(*command, url=premises.url_of(role)).code == 0


def test_a_new_column_without_grants_is_told_the_same_way(premises: Premises) -> None:
    premises.execute(f"REVOKE UPDATE (set_aside) ON workers FROM {premises.names['worker']}")
    done = finish("run", "--drain", url=premises.url_of("worker"))
    fails(78, r"no UPDATE on public\.workers", "grants.sql was not run again after", done=done)
    premises.grant()


@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_a_preview_needs_no_more_than_reading(premises: Premises, verb: str) -> None:
    with premises.shop() as shop:
        letter = shop.dead_letter()
    done = finish("dead-letters", verb, str(letter), "--dry-run", url=premises.url_of("reader"))
    assert done.code == 0, done
