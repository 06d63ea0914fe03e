"""Tables that a crash of the server empties: the start, ``status`` and ``doctor`` report them.

The report has a remedy.
"""

from __future__ import annotations

from typing import Any

from outbox_worker.daemon.worker import Worker
from outbox_worker.database.engine import Database
from outbox_worker.diagnose.doctor.report import examine
from outbox_worker.diagnose.status import read_status
from outbox_worker.schema.concerns import find_unlogged
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from tests.support.factories import Shop


def test_unlogged_tables_are_told_until_the_remedy_has_run(
    shop: Shop, database: Database, tables: Tables, settings: Settings, records: list[dict[str, Any]]
) -> None:
    shop.rows("ALTER TABLE outbox SET UNLOGGED; ALTER TABLE purchases SET UNLOGGED")
    said = ["public.outbox is UNLOGGED", "public.purchases is UNLOGGED"]

    worker = Worker(settings.model_copy(update={"http_listen": "off"}))
    worker.start()
    worker._database.close()
    concerns = [record for record in records if record.get("event") == "setup_concern"]
    assert [record["finding"].partition(":")[0] for record in concerns] == said

    assert [each.finding.partition(":")[0] for each in read_status(database, tables, None).concerns] == said

    found = [each for each in examine(settings).checks if each.name == "unlogged"]
    assert [(each.verdict.value, each.evidence.partition(":")[0]) for each in found] == [
        ("problem", each) for each in said
    ]

    for each in found:
        shop.rows(each.remedy.removeprefix("as its owner: "))
    with database.transaction() as session:
        assert find_unlogged(session, tables) == []


def test_an_unlogged_partition_is_found(shop: Shop, database: Database, tables: Tables) -> None:
    shop.rows(
        "ALTER TABLE backfill_runs RENAME TO old_runs;"
        "CREATE TABLE backfill_runs (LIKE old_runs INCLUDING DEFAULTS) PARTITION BY LIST (kind);"
        'CREATE UNLOGGED TABLE "Runs" PARTITION OF backfill_runs DEFAULT'
    )
    with database.transaction() as session:
        assert [each.remedy for each in find_unlogged(session, tables)] == [
            'as its owner: ALTER TABLE public."Runs" SET LOGGED;'
        ]
