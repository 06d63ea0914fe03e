"""A server refuses the login: the worker waits, logs the server's words as ERROR, and resumes."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import make_url

from tests.support.faults import PATIENT
from tests.support.processes import finish, start
from tests.support.sites import ROLE, Site

PASSWORD, WRONG = "correct-horse", "battery-staple"


def admit_by(site: Site, method: str) -> None:
    """Replace the rules that admit the role. The owner is always admitted."""
    rules = f"local all postgres trust\nlocal all {ROLE} {method}\n" if method else "local all postgres trust\n"
    (site.directory / "data" / "pg_hba.conf").write_text(rules)
    site.execute("SELECT pg_reload_conf()")


def test_a_wrong_password_that_is_corrected(site: Site) -> None:
    site.execute(f"ALTER ROLE {ROLE} PASSWORD '{PASSWORD}'")
    admit_by(site, "scram-sha-256")
    url = make_url(site.url(ROLE)).set(password=WRONG).render_as_string(hide_password=False)
    words = f'password authentication failed for user "{ROLE}"'
    with start("run", url=url, **PATIENT) as worker:
        record = worker.wait_for("paused")
        assert record["level"] == "ERROR"
        assert words in record["error"]
        assert words in record["message"]
        site.execute(f"ALTER ROLE {ROLE} PASSWORD '{WRONG}'")
        worker.wait_for("worker_started")
        worker.end_well()
        assert WRONG not in str(worker.told("paused"))


@pytest.mark.parametrize("fault", ["no entry", "no database"])
def test_no_entry_and_no_database(fault: str, site: Site) -> None:
    url = make_url(site.url(ROLE))
    if fault == "no entry":
        admit_by(site, "")
        words = "no pg_hba.conf entry"
    else:
        url, words = url.set(database="nowhere"), 'database "nowhere" does not exist'
    with start("run", url=url.render_as_string(hide_password=False), **PATIENT) as worker:
        record = worker.wait_for("paused")
        worker.end_well()
    assert record["level"] == "ERROR"
    assert words in record["error"]
    assert words in record["message"]


@pytest.mark.parametrize("setting", ["database_url", "listen_database_url"])
def test_a_password_that_must_be_encoded_ends_the_start(setting: str) -> None:
    good, raw = (f"postgresql://shop:{word}@db.example/shop" for word in ("hidden", "horse@battery/staple"))
    settings: dict[str, Any] = {"database_url": good, setting: raw}
    done = finish("run", "--drain", **settings)
    assert done.code == 78
    assert "percent-encode special characters in the password" in done.stderr
    assert not [piece for piece in ("hors", "batt", "stap") if piece in done.stderr + done.stdout]
