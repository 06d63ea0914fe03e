"""Finds concerns: problems of the tables that do not stop the worker.

A concern can cause the loss of rows or purchases later. Each concern has a finding (what is wrong)
and a remedy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sqlalchemy.orm import Session

from outbox_worker.mapping import status_example
from outbox_worker.schema.catalogue import (
    as_owner,
    enum_labels,
    exists,
    has_unique_index,
    pair_indexes,
    unfit_pair_indexes,
    unlogged_tables,
)
from outbox_worker.schema.partitions import build_pair_index, can_be_unique, create_index
from outbox_worker.schema.problem import SchemaProblem
from outbox_worker.schema.requirements import find_narrower
from outbox_worker.schema.shapes import noun_of_view
from outbox_worker.schema.tables import STATUS_VALUES, Tables, quoted, relation_name

_NAMED_AT_MOST = 5


def find_concerns(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return all concerns about the tables that exist."""
    return [
        *find_narrower(session, tables),
        *find_unlogged(session, tables),
        *find_unfit_index(session, tables),
        *find_shared_event_ids(session, tables),
        *find_unknown_labels(session, tables),
    ]


def find_unknown_labels(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a concern if the enum of ``payments.status`` has labels that the worker does not know."""
    return unknown_statuses(tables, enum_labels(session, tables.payments, "status"))


def unknown_statuses(tables: Tables, statuses: Sequence[str]) -> list[SchemaProblem]:
    """Return a concern if the settings give no meaning to one of these statuses of payments."""
    column = tables.payments.c.status
    known = set(itertools.chain(*column.info[STATUS_VALUES].values()))
    unknown = [status for status in statuses if status not in known]
    if not unknown:
        return []
    return [
        SchemaProblem(
            f"{relation_name(tables.payments)}.{column.name} can be {', '.join(unknown[:_NAMED_AT_MOST])}, which the "
            "worker does not know: payments with such a status get no purchase, and `audit` does not classify them",
            "say what each status means in the configuration file, under [payments], for example "
            f"{status_example(unknown[:1])}; list in status_values.ignored those that never mean paid",
        )
    ]


def find_shared_event_ids(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a concern if two events in the outbox can have the same event id.

    The worker writes a mark or a dead letter only once for each event id. If two events have the
    same id, the second event leaves no trace.
    """
    outbox = tables.outbox
    if not exists(session, outbox) or noun_of_view(session, outbox) or has_unique_index(session, outbox, "event_id"):
        return []
    name, column = relation_name(outbox), quoted(outbox.c.event_id.name)
    remedy = f"{name} is partitioned by other columns, so no index can help: let the producers give each event a new id"
    if can_be_unique(session, outbox, ["event_id"]):
        ddl = create_index(session, outbox, ["event_id"], unique=True)
        remedy = f"{as_owner(session, name)}{ddl} -- fails while two events have the same id"
    return [
        SchemaProblem(
            f"{name} has no unique index on {column}: if two events have the same id, only one of them leaves a mark "
            "or a dead letter, and the payment of the other is unexplained",
            remedy,
        )
    ]


def find_unfit_index(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a concern for each unique index on student and course that the worker cannot use.

    Return no concern if the worker can use another index as its guard against second purchases.
    """
    purchases = tables.purchases
    if not exists(session, purchases) or pair_indexes(session, purchases):
        return []
    return [
        SchemaProblem(
            f"the worker cannot use the unique index {name} on {relation_name(purchases)} as its guard, because it is "
            f"deferrable, or covers other rows than the active purchases (its condition: {predicate or 'none'})",
            build_pair_index(session, purchases),
        )
        for name, predicate in unfit_pair_indexes(session, purchases).items()
    ]


def find_unlogged(session: Session, tables: Tables) -> list[SchemaProblem]:
    """Return a concern for each table and partition that is not in PostgreSQL's write-ahead log.

    PostgreSQL empties these tables after a crash of the server. Standbys never get these tables.
    Events, purchases and marks of settled events would be lost. ``audit`` could not find the loss.
    """
    names = [relation_name(table) for table in tables.by_role().values() if exists(session, table)]
    return [
        SchemaProblem(
            f"{name} is {'a temporary table' if is_temporary else 'UNLOGGED'}: a crash of the server empties it",
            f"name a permanent table in OUTBOX_TABLES instead of {name}"
            if is_temporary
            else f"as its owner: ALTER TABLE {name} SET LOGGED;",
        )
        for name, is_temporary in unlogged_tables(session, names)
    ]
