"""Groups the objects that a claim loop needs to read and write the tables."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from outbox_worker.schema.tables import Tables
from outbox_worker.store.fast_path import FastPath
from outbox_worker.store.outbox import Outbox
from outbox_worker.store.purchases import PurchaseRepository
from outbox_worker.telemetry.metrics import SECONDS


class Doors(NamedTuple):
    """The objects that read and write the tables.

    These objects keep compiled statements, but no state.
    """

    fast_path: FastPath
    outbox: Outbox
    purchases: PurchaseRepository

    @classmethod
    def of(cls, tables: Tables, event_types: Collection[str] | None) -> Doors:
        """Build the objects. ``event_types`` are the types of events to claim.

        None means all types.
        """
        fast_path = FastPath(tables, event_types, SECONDS)
        return cls(fast_path, Outbox(tables, event_types), PurchaseRepository(tables))
