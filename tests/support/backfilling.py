"""Runs backfills, and writes discarded dead letters."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from outbox_worker.database.engine import Database
from outbox_worker.reconcile.backfill import Backfill, BackfillReport, Request
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings
from tests.support.factories import Payment, Shop


def always(*_: float) -> bool:
    return True


class Operator:
    """Runs backfills on the test's database, as a person would."""

    def __init__(self, database: Database, tables: Tables, settings: Settings) -> None:
        self.database, self.tables, self.policy = database, tables, settings.retry_policy

    def begin(self, **asked: Any) -> Backfill:
        request = Request(**{"actor": "somebody", "older_than": timedelta(0), **asked})
        return Backfill.start(self.database, self.tables, self.policy, request)

    def run(self, **asked: Any) -> BackfillReport:
        work = self.begin(**asked)
        work.look(always)
        return work.make(always)


def discarded(shop: Shop, note: str | None, reason: str = "crashed_worker", **of_letter: Any) -> Payment:
    payment = shop.payment()
    letter = shop.dead_letter(payment, state="discarded", reason=reason, **of_letter)
    shop.rows("UPDATE dead_letters SET note = %s WHERE event_id = %s", note, letter)
    return payment
