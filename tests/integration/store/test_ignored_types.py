"""Events of types without a handler are counted.

The start, ``status`` and ``doctor`` report them.
"""

from __future__ import annotations

from typing import Any

import pytest

from outbox_worker.daemon.chores import Chores
from outbox_worker.database.engine import Database
from outbox_worker.diagnose.doctor.report import examine
from outbox_worker.diagnose.status import read_status
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from outbox_worker.settle.handlers import HANDLED_TYPES
from outbox_worker.store import ignored
from outbox_worker.store.ignored import IgnoredEvents, IgnoredType, count_ignored
from outbox_worker.store.outbox import Outbox
from outbox_worker.telemetry.reporter import Telemetry
from tests.support.factories import ProbedProcessor, Shop
from tests.support.makers import MakeProcessor


def fill(shop: Shop) -> None:
    shop.paid()
    for event_type, count in (("USER_CREATED", 3), ("LOGIN", 2), ("a" * 300, 1), *((f"RARE_{n}", 1) for n in range(4))):
        shop.rows(
            "INSERT INTO outbox (event_id, event_type, payload)"
            " SELECT gen_random_uuid(), %s, '{}' FROM generate_series(1, %s)",
            *(event_type, count),
        )


EXPECTED = IgnoredEvents(
    10,
    (
        IgnoredType("USER_CREATED", 3),
        IgnoredType("LOGIN", 2),
        *(IgnoredType(f"RARE_{n}", 1) for n in range(3)),
    ),
)


def test_the_most_frequent_types_are_counted(shop: Shop, database: Database, tables: Tables) -> None:
    fill(shop)
    with database.transaction() as session:
        assert count_ignored(session, tables, HANDLED_TYPES) == EXPECTED
        assert count_ignored(session, tables, None) == IgnoredEvents()


def test_only_the_oldest_events_are_looked_at(
    shop: Shop, database: Database, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.rows(
        "INSERT INTO outbox (event_id, event_type, payload, due_at)"
        " SELECT gen_random_uuid(), 'T', '{}', now() + n * interval '1 s' FROM generate_series(1, 30) AS n"
    )
    monkeypatch.setattr(ignored, "BOUND", 10)
    with database.transaction() as session:
        assert count_ignored(session, tables, HANDLED_TYPES).events == 10


def test_a_type_that_is_null_is_ignored_too(shop: Shop, database: Database, tables: Tables) -> None:
    shop.rows("ALTER TABLE outbox ALTER event_type DROP NOT NULL")
    shop.rows("INSERT INTO outbox (event_id, payload) VALUES (gen_random_uuid(), '{}')")
    with database.transaction() as session:
        assert count_ignored(session, tables, HANDLED_TYPES).types == (IgnoredType("NULL", 1),)


def test_the_worker_tells_once_and_keeps_the_gauge(
    shop: Shop, tables: Tables, make_processor: MakeProcessor, records: list[dict[str, Any]]
) -> None:
    fill(shop)
    processor: ProbedProcessor = make_processor(unknown_types="ignore")
    unused: Any = None
    outbox = Outbox(tables, HANDLED_TYPES)
    chores = Chores(processor.database, tables, outbox, processor.watch, unused, processor.telemetry, unused, None)
    for _ in range(2):
        chores._counted_ignored_at = None
        chores._count_ignored_if_late()
    told = [record for record in records if record.get("event") == "types_ignored"]
    assert [(record["events"], list(record["types"])[:2]) for record in told] == [(10, ["USER_CREATED", "LOGIN"])]
    assert gauge(processor.telemetry) == 10
    shop.rows("DELETE FROM outbox")
    chores._count_ignored_if_late()
    assert gauge(processor.telemetry) == 10


def test_status_and_doctor_tell_them(shop: Shop, database: Database, tables: Tables, settings: Settings) -> None:
    fill(shop)
    status = read_status(database, tables, "ignore")
    assert status.ignored == EXPECTED
    assert status.metrics()["outbox_ignored_events"] == 10
    assert read_status(database, tables, "bury").ignored == IgnoredEvents()
    ignoring = settings.model_copy(update={"unknown_types": "ignore"})
    (found,) = [each for each in examine(ignoring).checks if each.name == "event_types"]
    assert found.verdict.value == "warning"
    assert found.evidence.startswith("10 events of unknown types stay in the outbox: USER_CREATED (3), LOGIN (2)")


def gauge(telemetry: Telemetry) -> float | None:
    return telemetry.metrics.registry.get_sample_value("outbox_ignored_events")
