"""Many faults at once, for any time: no purchase is lost or made twice, and no event is charged.

``make storm SECONDS=3600`` lets it last an hour, ``SEED=2`` is another storm.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from tests.support.backfilling import Operator
from tests.support.factories import Shop
from tests.support.history import assert_never_twice_active
from tests.support.makers import Connect
from tests.support.processes import finish
from tests.support.refunding import check
from tests.support.storms import Storm

SECONDS = float(os.environ.get("OUTBOX_TEST_STORM_SECONDS") or 60)
SEED = int(os.environ.get("OUTBOX_TEST_STORM_SEED") or 1)

pytestmark = pytest.mark.slow


def test_a_storm(
    database_url: str,
    shop: Shop,
    connect: Connect,
    tables: Tables,
    settings: Settings,
    database: Database,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    operator = Operator(database, tables, settings)
    storm = Storm(database_url, shop, connect, operator, SEED)
    try:
        storm.rage(SECONDS)
    finally:
        with capsys.disabled():
            request.config.get_terminal_writer().line(f"\n{storm.told()}")
    assert storm.doubled == [], "a build of the index met pairs that were active twice"
    assert assert_never_twice_active(database_url) > 0
    drained = finish("run", "--drain", url=database_url)
    assert drained.code == 0, drained.stderr
    operator.run(max_repairs=10**6)
    assert_all_is_well(database_url, shop, storm.pairs + storm.forgotten)
    assert_never_twice_active(database_url)
    for kind in ("kills", "purchases by backfills", "DROP INDEX CONCURRENTLY", "CREATE UNIQUE INDEX CONCURRENTLY"):
        assert storm.counts[kind] > 0, f"a storm without {kind}"


def assert_all_is_well(url: str, shop: Shop, pairs: Sequence[Any]) -> None:
    """Check that every payment is in one class and none is unexplained.

    No event was charged, and the model holds.
    """
    assert shop.count("outbox") == 0
    assert shop.rows("SELECT * FROM charged LIMIT 5") == []
    assert shop.rows("SELECT reason, detail FROM dead_letters LIMIT 5") == []
    check(shop, pairs)
    audit = finish("audit", "--json", url=url)
    assert (audit.code, audit.object["ok"]) == (0, True), audit
    counts = audit.object["counts"]
    standing = shop.count("payments WHERE status = 'succeeded'")
    assert sum(counts[kind] for kind in ("active", "revoked", "duplicate")) == standing, counts
    assert audit.object["refunded_but_active"] == []
