"""Types of the fixtures that return factory functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import psycopg

from outbox_worker.database.engine import Database
from outbox_worker.decision import RetryPolicy
from outbox_worker.settle.isolation import Isolation
from tests.support.factories import ProbedProcessor


class MakeProcessor(Protocol):
    def __call__(
        self,
        batch_size: int = 1000,
        unknown_types: Literal["bury", "ignore"] = "bury",
        policy: RetryPolicy | None = None,
        database: Database | None = None,
        isolation: Isolation | None = None,
    ) -> ProbedProcessor: ...


class MakeDatabase(Protocol):
    def __call__(self, *, connections: int = 4, deadline_seconds: float | None = 10) -> Database: ...


Connect = Callable[..., psycopg.Connection[Any]]
