"""A hot standby: commands that only read work there and say so.

Commands that write name the standby.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from tests.support.commands import fails
from tests.support.factories import Shop
from tests.support.processes import finish, start
from tests.support.sites import KeptSite, Site, await_replication, standby_of, url_of


@pytest.fixture
def standby(site: Site, tmp_path: Path) -> Iterator[KeptSite]:
    with standby_of(site, tmp_path / "standby") as running:
        yield running


def lay_out(site: Site) -> tuple[UUID, UUID]:
    """Write a payment that is owed a purchase, and a dead letter.

    Wait until both are on the standby.
    """
    with site.connect() as connection:
        shop = Shop(connection)
        owed, letter = shop.payment(), shop.dead_letter(shop.payment())
    await_replication(site)
    return owed.id, letter


def test_what_only_looks_works_there_and_what_writes_says_why_not(site: Site, standby: KeptSite) -> None:
    owed, letter = lay_out(site)
    url = standby.url("postgres")
    looking = {
        ("status",): 0,
        ("audit",): 1,
        ("why", str(owed)): 0,
        ("dead-letters", "list"): 0,
        ("dead-letters", "show", str(letter)): 0,
        ("duplicates", "list"): 0,
        ("backfill", "--dry-run", "--older-than", "0s"): 0,
        ("dead-letters", "requeue", str(letter), "--dry-run"): 0,
    }
    for command, code in looking.items():
        done = finish(*command, url=url)
        assert done.code == code, done
        assert re.match(r"Looked at a standby, which is at most \d+\S* behind the primary\.\n", done.stdout), done
        found = finish(*command, "--json", url=url)
        assert found.code == code, found
        assert found.object["standby"].keys() == {"replayed_until", "behind_seconds"}
        assert found.object["standby"]["behind_seconds"] >= 0
    table = finish("duplicates", "list", "--csv", url=url)
    assert table.stdout.startswith("payment,student,course,"), "the note is not part of the file"
    assert "standby" in table.sentences()

    found = finish("doctor", "--json", url=url)
    assert found.object["standby"]["behind_seconds"] >= 0
    verdicts = {each["name"]: each["verdict"] for each in found.object["checks"]}
    of_server = [each for each in found.object["checks"] if each["name"] == "server"]
    assert of_server[0]["verdict"] == "warning"
    assert "standby" in of_server[0]["evidence"]
    assert "refused" not in str(found.object), "no statement of a check fails there"
    assert {name for name, verdict in verdicts.items() if verdict == "unseen"} == {
        *("notify", "connections", "time_outs", "clock", "durability", "synchronous_commit", "autovacuum", "horizon")
    }

    decide = ("--actor", "ann", "--reason", "why")
    writing = (["run", "--drain"], ["migrate"], ["backfill"], ["dead-letters", "requeue", str(letter), *decide])
    for each in writing:
        fails(69, "is a standby, which takes no writes", "URL of the primary", done=finish(*each, url=url))

    both = url_of("postgres", standby, site)
    assert "standby" not in finish("status", "--json", url=both).object, "of several hosts, the primary is looked at"
    site.signal(signal.SIGQUIT)
    assert "standby" in finish("audit", "--json", url=both).object, "without a primary, the standby is"


def test_the_daemon_waits_for_a_primary(standby: KeptSite) -> None:
    with start("run", url=standby.url("postgres")) as process:
        paused = process.wait_for("paused")
        assert "standby" in str(paused)
        standby.execute("SELECT pg_promote()")
        process.wait_for("worker_started")
        process.end_well()
