"""Statuses of payments with other names: the worker uses the meaning and reports unknown ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.errors import SettingError
from outbox_worker.model import PURCHASE_REFUNDED, Outcome
from outbox_worker.reconcile.audit import Audit
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings, load_settings
from outbox_worker.store.statuses import find_unknown_statuses
from tests.support.factories import Shop, drain_all
from tests.support.makers import MakeProcessor
from tests.support.processes import finish

VALUES = {"succeeded": ["PAID", "CAPTURED"], "refunded": ["REFUNDED"], "ignored": ["DRAFT"]}
ENUM = """
    CREATE TYPE payment_status AS ENUM ('DRAFT', 'PAID', 'CAPTURED', 'failed', 'REFUNDED');
    ALTER TABLE payments DROP CONSTRAINT IF EXISTS payments_status_check;
    ALTER TABLE payments ALTER status TYPE payment_status USING 'PAID'
"""
FREE = "ALTER TABLE payments DROP CONSTRAINT IF EXISTS payments_status_check"


@pytest.fixture
def settings(database_url: str) -> Settings:
    return load_settings(database_url=database_url, payments={"status_values": VALUES})


@pytest.fixture
def tables(settings: Settings) -> Tables:
    return build_tables(settings)


@pytest.fixture(params=[ENUM, FREE], ids=["enum", "text"])
def named_otherwise(request: pytest.FixtureRequest, shop: Shop) -> None:
    shop.rows(request.param)


@pytest.mark.usefixtures("named_otherwise", "both_guards")
def test_each_status_means_what_the_settings_say(shop: Shop, make_processor: MakeProcessor) -> None:
    paid, captured, draft, failed, refunded = (
        shop.paid(status=status) for status in ("PAID", "CAPTURED", "DRAFT", "failed", "REFUNDED")
    )
    processor = make_processor()
    assert drain_all(processor) == {Outcome.CREATED: 2, Outcome.RETRIED: 2, Outcome.SUPPRESSED: 1}
    assert [len(shop.purchases(payment)) for payment, _ in (paid, captured, draft, failed, refunded)] == [1, 1, 0, 0, 0]
    shop.set_status(paid[0], "REFUNDED")
    shop.confirm(paid[0], event_type=PURCHASE_REFUNDED)
    assert drain_all(processor)[Outcome.REVOKED] == 1


def test_why_tells_what_a_status_means(shop: Shop, database_url: str, tmp_path: Path) -> None:
    shop.rows(FREE)
    payment = shop.payment(status="REFUNDED", ago="1 hour")
    path = tmp_path / "outbox-worker.toml"
    path.write_text('[payments]\nstatus_values.refunded = ["REFUNDED"]\n', encoding="utf-8")
    assert (
        "a refunded payment is owed no purchase" in finish("why", str(payment.id), url=database_url, config=path).stdout
    )


@pytest.mark.usefixtures("named_otherwise")
def test_the_audit_judges_what_they_mean(shop: Shop, database: Database, tables: Tables) -> None:
    owed = shop.payment(status="CAPTURED", ago="1 hour")
    for status in ("DRAFT", "failed", "REFUNDED"):
        shop.payment(status=status, ago="1 hour")
    report = Audit.start(database, tables).run()
    assert [each.payment_id for each in report.unexplained] == [owed.id]
    assert not report.unknown_statuses


def test_what_is_not_listed_keeps_its_own_name(database_url: str) -> None:
    known = load_settings(database_url=database_url, payments={"status_values": {"succeeded": ["PAID"]}})
    values = build_tables(known).payments.c.status.info["status_values"]
    assert values == {
        "pending": ("pending",),
        "succeeded": ("PAID",),
        "failed": ("failed",),
        "refunded": ("refunded",),
        "ignored": (),
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"paid": ["PAID"]}, "no such status: paid"),
        ({"succeeded": ["PAID"], "failed": ["PAID"]}, "PAID would mean two statuses"),
        ({"succeeded": ["refunded"]}, "refunded would mean two statuses"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], said: str, database_url: str) -> None:
    with pytest.raises(SettingError, match=said):
        load_settings(database_url=database_url, payments={"status_values": values})


@pytest.mark.parametrize("change", [ENUM, FREE], ids=["enum", "text"])
def test_unknown_statuses_are_told_with_lines_that_work(
    change: str, shop: Shop, database: Database, database_url: str, tmp_path: Path
) -> None:
    """``doctor`` and ``audit`` print lines for the configuration file.

    With these lines, no status is unknown.
    """
    shop.rows(change)
    for status in ("PAID", "CAPTURED", "REFUNDED", "DRAFT"):
        shop.payment(status=status, ago="1 hour")
    with database.transaction() as session:
        (concern,) = find_unknown_statuses(session, build_tables(load_settings(database_url=database_url)))
    assert "status_values.succeeded = [" in concern.remedy
    done = finish("audit", url=database_url)
    assert done.code == 1
    printed = [line.strip() for line in done.stdout.splitlines()]
    lines = printed[printed.index("[payments]") :][:2]
    assert set(json.loads(lines[1].partition(" = ")[2])) == {"PAID", "CAPTURED", "REFUNDED", "DRAFT"}
    path = tmp_path / "outbox-worker.toml"
    meant = ['succeeded = ["PAID", "CAPTURED"]', 'refunded = ["REFUNDED"]', 'ignored = ["DRAFT"]']
    path.write_text("\n".join([lines[0], *(f"status_values.{each}" for each in meant)]), encoding="utf-8")
    told = json.loads(finish("audit", "--json", url=database_url, config=path).stdout)
    assert told["unknown_statuses"] == {}
    assert len(told["unexplained"]) == 2
    with database.transaction() as session:
        assert not find_unknown_statuses(session, build_tables(load_settings(database_url=database_url, config=path)))
