"""Event types under other names are settled, audited, explained and requeued by their meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from outbox_worker.database.engine import Database
from outbox_worker.errors import SettingError
from outbox_worker.model import Outcome
from outbox_worker.reconcile.audit import Audit
from outbox_worker.schema.tables import Tables, build_tables
from outbox_worker.settings import Settings, load_settings
from outbox_worker.store.ignored import count_ignored
from tests.support.factories import Shop, drain_all
from tests.support.makers import MakeProcessor
from tests.support.processes import finish

NAMES = {"payment.succeeded": "PURCHASE_CONFIRMED", "paid": "PURCHASE_CONFIRMED", "refund": "PURCHASE_REFUNDED"}


@pytest.fixture
def settings(database_url: str) -> Settings:
    return load_settings(database_url=database_url, outbox={"types": NAMES})


@pytest.fixture
def tables(settings: Settings) -> Tables:
    return build_tables(settings)


@pytest.fixture(params=["jsonb", "text"])
def payload_type(request: pytest.FixtureRequest, shop: Shop) -> None:
    shop.rows(f"ALTER TABLE outbox ALTER payload TYPE {request.param} USING payload::{request.param}")


@pytest.mark.usefixtures("both_guards", "payload_type")
@pytest.mark.parametrize("careful", [False, True], ids=["fast", "careful"])
@pytest.mark.parametrize("unknown", ["bury", "ignore"])
def test_each_type_means_what_the_settings_say(
    unknown: str, careful: bool, shop: Shop, make_processor: MakeProcessor
) -> None:
    paid = [shop.paid(event_type=name) for name in ("payment.succeeded", "paid", "PURCHASE_CONFIRMED")]
    shop.paid(event_type="user.created")
    processor = make_processor(unknown_types=unknown)  # type: ignore[arg-type]
    processor.is_careful = careful
    settled = drain_all(processor)
    assert settled == {Outcome.CREATED: 3} | ({Outcome.DEAD: 1} if unknown == "bury" else {})
    assert [shop.mark_of(event).event_type for _, event in paid] == ["PURCHASE_CONFIRMED"] * 3
    payment, _ = paid[0]
    shop.set_status(payment, "refunded")
    shop.confirm(payment, event_type="refund")
    assert drain_all(processor) == {Outcome.REVOKED: 1}
    assert [each.is_active for each in shop.purchases(payment)] == [False]


def test_the_audit_knows_what_is_in_flight(shop: Shop, database: Database, tables: Tables) -> None:
    waiting = shop.payment(ago="1 hour")
    shop.confirm(waiting, event_type="paid")
    other = shop.payment(ago="1 hour")
    shop.confirm(other, event_type="user.created")
    assert [each.payment_id for each in Audit.start(database, tables).run().unexplained] == [other.id]


def test_only_types_that_mean_nothing_are_passed_over(shop: Shop, database: Database, tables: Tables) -> None:
    for name in ("paid", "refund", "PURCHASE_REFUNDED", "user.created"):
        shop.paid(event_type=name)
    with database.transaction() as session:
        assert (
            count_ignored(session, tables, ("PURCHASE_CONFIRMED", "PURCHASE_REFUNDED")).listed() == "user.created (1)"
        )


def test_a_dead_letter_keeps_the_name_and_goes_back_with_it(
    shop: Shop, make_processor: MakeProcessor, database_url: str, tmp_path: Path
) -> None:
    payment, event = shop.paid(event_type="paid", payload={"amount": "1.00"})
    processor = make_processor()
    assert drain_all(processor) == {Outcome.DEAD: 1}
    assert shop.letter_of(event).event_type == "paid"
    path = tmp_path / "outbox-worker.toml"
    path.write_text('[outbox]\ntypes."paid" = "PURCHASE_CONFIRMED"\n', encoding="utf-8")
    told = finish("why", str(payment.id), url=database_url, config=path)
    assert "payment mismatch" in told.stdout.replace("_", " ")
    why = ("--actor", "ada", "--reason", "test", "--yes")
    done = finish("dead-letters", "requeue", str(event), *why, url=database_url, config=path)
    assert done.code == 0, done
    assert shop.event(event).event_type == "paid"


def test_a_type_that_the_worker_does_not_have_is_refused(database_url: str) -> None:
    with pytest.raises(SettingError, match="must be 'PURCHASE_CONFIRMED' or"):
        load_settings(database_url=database_url, outbox={"types": {"paid": "PURCHASE_BACKFILLED"}})
