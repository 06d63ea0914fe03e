"""Finds out whether payments can have a status that the worker does not know."""

from __future__ import annotations

import itertools
import json

from sqlalchemy import Text, cast, select, text
from sqlalchemy.orm import Session

from outbox_worker.schema.catalogue import exists
from outbox_worker.schema.privileges import may
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.tables import STATUS_VALUES, Tables, relation_name

_NAMED_AT_MOST = 5

# what: the labels of a column's enum · lock: none · index: the catalogue's indexes
_LABELS = text(
    """
    SELECT CAST(e.enumlabel AS text) FROM pg_attribute a JOIN pg_enum e ON e.enumtypid = a.atttypid
    WHERE a.attrelid = to_regclass(:relation) AND a.attname = :column ORDER BY e.enumsortorder
    """
)

_LOOKED_AT = 10_000
"""If ``payments.status`` is no enum, the check of statuses reads at most this number of payments."""


def find_unknown_statuses(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a concern if payments can have a status that the worker does not know, as far as this role may read it.

    The statuses are the labels of the enum, or else those of some payments. The audit does not classify payments with
    an unknown status, and no purchase is created for them.
    """
    status = tables.payments.c.status
    if not (exists(session, tables.payments) and may(session, tables.payments, "SELECT", [status.key])):
        return []
    name, known = relation_name(tables.payments), set(itertools.chain(*status.info[STATUS_VALUES].values()))
    labels = session.scalars(_LABELS, {"relation": name, "column": status.name}).all()
    if not labels:
        some = select(cast(status, Text).label("status")).limit(_LOOKED_AT).subquery()
        labels = session.scalars(select(some.c.status).where(some.c.status.is_not(None)).distinct()).all()
    unknown = [label for label in labels if label not in known]
    if not unknown:
        return []
    return [
        SchemaProblem(
            f"{name}.{status.name} can be {', '.join(unknown[:_NAMED_AT_MOST])}, which the worker does not know: "
            "payments with such a status get no purchase, and `audit` does not classify them",
            "say what each status means in the configuration file, under [payments], for example "
            f"status_values.succeeded = [{json.dumps(unknown[0], ensure_ascii=False)}]; list in status_values.ignored "
            "those that never mean paid",
        )
    ]
