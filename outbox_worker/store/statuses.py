"""Finds out whether payments have a status that the worker does not know."""

from __future__ import annotations

from sqlalchemy import Text, cast, select
from sqlalchemy.orm import Session

from outbox_worker.schema.catalogue import exists
from outbox_worker.schema.concerns import find_unknown_labels, unknown_statuses
from outbox_worker.schema.privileges import may
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.tables import Tables

_LOOKED_AT = 10_000
"""The largest number of payments whose status the check reads if ``payments.status`` is no enum."""


def find_unknown_statuses(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a concern if payments have a status that the worker does not know.

    First check the labels of the enum. If no label is unknown, check the statuses of at most
    ``_LOOKED_AT`` payments, if this role has the privilege to read them.
    """
    if labels := find_unknown_labels(session, tables):
        return labels
    status = tables.payments.c.status
    if not (exists(session, tables.payments) and may(session, tables.payments, "SELECT", [status.key])):
        return []
    some = select(cast(status, Text).label("status")).limit(_LOOKED_AT).subquery()
    found = session.scalars(select(some.c.status).where(some.c.status.is_not(None)).distinct().order_by(some.c.status))
    return unknown_statuses(tables, found.all())
