"""Finds out which guard is in force: the unique index or locks.

A guard prevents a second active purchase of a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Table,
    column,
    func,
    literal,
    literal_column,
    not_,
    null,
    select,
    table,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.failures import Failure, classify
from outbox_worker.decision import choose_guard
from outbox_worker.model import Guard
from outbox_worker.schema.catalogue import has_index_paths, pair_indexes
from outbox_worker.schema.tables import Tables, relation_name

_LOCKS_PER_TRANSACTION = 10
"""The divisor for the locks of a batch: a batch can lock a tenth of the server's lock table.

If the lock table were full, PostgreSQL would raise 53200 (out_of_memory) in any session.
"""


@dataclass(frozen=True, slots=True)
class GuardState:
    """The guard in force.

    ``predicate`` is the WHERE condition of the unique index. The predicate is empty if the guard is
    ``lock``.
    """

    guard: Guard
    predicate: str = ""
    lock_capacity: int = 1
    """The largest number of pairs that one transaction locks."""
    has_index_paths: bool = True
    """Whether ``purchases`` has indexes on the payment and on the pair.

    If an index is missing, the worker allows the planner to read whole tables.
    """
    triggers_on: frozenset[str] = frozenset()
    """The commands (``INSERT``, ``UPDATE``) on which a trigger of ``purchases`` can change a row.

    The set also contains ``COMMIT`` if such a trigger can be deferred until COMMIT. The worker
    reads back the rows that these commands wrote. These rows can differ from what the worker wrote.
    """


class GuardWatch:
    """Remembers the guard that this process found last.

    All claim loops of the process share this object. The claim loops need no lock for this object,
    because assigning ``state`` is atomic. An outdated state does no harm. The worker rolls the
    batch back to its savepoint and settles it again. No purchase is lost or doubled.
    """

    def __init__(self, purchases: Table, on_change: Callable[[Guard], None]) -> None:
        self._purchases = purchases
        self._is_indexable = True
        self._on_change = on_change
        self._known: Guard | None = None
        self._versions: str | None = None
        self.state = GuardState(Guard.LOCK)

    def know(self, tables: Tables) -> None:
        """Remember two results of ``check_schema``.

        The results are the table ``purchases``, and whether its indexes can compare the ids of
        payments.
        """
        self._purchases, self._is_indexable = tables.purchases, tables.ids.is_indexable

    def probe(self, session: Session) -> GuardState:
        """Find out which guard is in force. If no index or trigger changed since the last probe, run only one query."""
        versions = session.scalar(_VERSIONS, {"relation": relation_name(self._purchases)})
        if versions != self._versions:
            self._set(probe_guard(session, self._purchases, is_indexable=self._is_indexable))
            self._versions = versions
        return self.state

    def fall_back(self) -> GuardState:
        """Use the guard ``lock`` until the next probe.

        Call this method if the unique index failed (42P10 or 55000). Until the next probe, the
        planner is also allowed to use plans without indexes.
        """
        self._versions = None
        return self._set(replace(self.state, guard=Guard.LOCK, predicate="", has_index_paths=False))

    def _set(self, state: GuardState) -> GuardState:
        self.state, before, self._known = state, self._known, state.guard
        if state.guard is not before:
            self._on_change(state.guard)
        return state


def probe_guard(session: Session, purchases: Table, *, is_indexable: bool = True) -> GuardState:
    """Find a valid unique index on the pair, and check by EXPLAIN that ON CONFLICT uses it.

    If ``is_indexable`` is false (see ``PairIds``), no index on ``purchases`` can be the guard. The
    type of the ids in ``payments`` then treats more ids as equal than the type in ``purchases``. An
    index would allow two purchases of one student.
    """
    capacity = max(1, session.scalar(_LOCK_TABLE_SIZE) // _LOCKS_PER_TRANSACTION)
    triggers_on = frozenset(session.scalars(_TRIGGERS_ON, {"relation": relation_name(purchases)}))
    if not is_indexable:
        return GuardState(Guard.LOCK, "", capacity, has_index_paths=False, triggers_on=triggers_on)
    has_paths = has_index_paths(session, purchases)
    sound = pair_indexes(session, purchases)
    for predicate in dict.fromkeys(sound.values()):
        if choose_guard(sound, _arbiters(session, purchases, predicate)) is Guard.INDEX:
            return GuardState(Guard.INDEX, predicate, capacity, has_paths, triggers_on)
    return GuardState(Guard.LOCK, "", capacity, has_paths, triggers_on)


def guard_in_force(session: Session, tables: Tables) -> Guard:
    """Return the guard in force.

    ``tables`` must contain the rules by which this database compares ids. If the role has no INSERT
    privilege, the function checks only the catalogue, because EXPLAIN would fail.
    """
    purchases, is_indexable = tables.purchases, tables.ids.is_indexable
    if session.scalar(text("SELECT has_table_privilege(:name, 'INSERT')"), {"name": relation_name(purchases)}):
        return probe_guard(session, purchases, is_indexable=is_indexable).guard
    return Guard.INDEX if is_indexable and pair_indexes(session, purchases) else Guard.LOCK


def on_active_pair(purchases: Table, predicate: str) -> dict[str, Any]:
    """Build the ON CONFLICT target: the columns of the pair and the condition of the index.

    With this target, PostgreSQL checks each time that a valid index exists. The predicate is
    literal text. A bind parameter would raise 42P10 in generic plans, even with a valid index.
    """
    return {"index_elements": [purchases.c.student_id, purchases.c.course_id], "index_where": literal_column(predicate)}


def index_is_in_transition(purchases: Table) -> ColumnElement[bool]:
    """Build the condition that ``purchases`` has a unique index that is not valid.

    An invalid index is being built or dropped, or a cancelled build left it INVALID.
    """
    flags = [column(name, Boolean()) for name in ("indisunique", "indislive", "indisvalid")]
    indexes = table("pg_index", column("indrelid"), *flags, schema="pg_catalog")
    is_of_purchases = indexes.c.indrelid == func.to_regclass(literal(relation_name(purchases)))
    is_in_use = [indexes.c.indisunique, indexes.c.indislive, not_(indexes.c.indisvalid)]
    return select(literal_column("1")).select_from(indexes).where(is_of_purchases, *is_in_use).exists()


# what: the number of locks for which the server's lock table has room · lock: none
_LOCK_TABLE_SIZE = text(
    "SELECT CAST(current_setting('max_locks_per_transaction') AS int)"
    " * (CAST(current_setting('max_connections') AS int) + CAST(current_setting('max_prepared_transactions') AS int))"
)

# what: all indexes of a table, and all triggers of the table and its partitions, each with the version of its catalogue
# row · lock: none · index: those of pg_index and pg_trigger
_VERSIONS = text(
    """
    WITH RECURSIVE part (oid) AS (
        SELECT CAST(to_regclass(:relation) AS oid)
        UNION SELECT i.inhrelid FROM pg_inherits i JOIN part ON i.inhparent = part.oid
    )
    SELECT concat_ws(' ', CAST(CAST(to_regclass(:relation) AS oid) AS text),
        (SELECT string_agg(concat_ws(' ', indexrelid, xmin, ctid), ' ' ORDER BY indexrelid)
         FROM pg_index WHERE indrelid = to_regclass(:relation)),
        (SELECT string_agg(concat_ws(' ', oid, xmin, ctid), ' ' ORDER BY oid)
         FROM pg_trigger WHERE NOT tgisinternal AND tgrelid IN (SELECT oid FROM part)))
    """
)

# what: the commands on which an enabled trigger of a table or of a partition runs; in tgtype, 4 stands for INSERT and
# 16 for UPDATE · lock: none · index: that of pg_trigger
_TRIGGERS_ON = text(
    """
    WITH RECURSIVE part (oid) AS (
        SELECT CAST(to_regclass(:relation) AS oid)
        UNION SELECT i.inhrelid FROM pg_inherits i JOIN part ON i.inhparent = part.oid
    )
    SELECT DISTINCT command
    FROM pg_trigger CROSS JOIN (VALUES ('INSERT', 4), ('UPDATE', 16)) AS of_type (command, bit)
    WHERE NOT tgisinternal AND tgenabled IN ('O', 'A') AND tgtype & bit <> 0
      AND tgrelid IN (SELECT oid FROM part)
    UNION SELECT 'COMMIT' FROM pg_trigger
    WHERE NOT tgisinternal AND tgenabled IN ('O', 'A') AND tgdeferrable AND tgrelid IN (SELECT oid FROM part)
    """
)

# what: whether one of these indexes is deferrable · lock: none · index: those of pg_index and pg_class
_SOME_DEFERRABLE = text(
    "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " WHERE i.indrelid = to_regclass(:relation) AND c.relname = ANY(:names) AND NOT i.indimmediate)"
)


def _arbiters(session: Session, purchases: Table, predicate: str) -> list[str]:
    """Return the indexes that EXPLAIN names as arbiters of ON CONFLICT.

    Return [] if the INSERT would raise 42P10 or 55000. If an index is deferrable, the INSERT raises
    55000, but EXPLAIN does not. Therefore a separate query checks whether an index is deferrable.
    """
    nothing = select(null(), null()).where(text("false"))
    columns = [purchases.c.student_id, purchases.c.course_id]
    trial = postgresql.insert(purchases).from_select(columns, nothing, include_defaults=False)
    trial = trial.on_conflict_do_nothing(**on_active_pair(purchases, predicate))
    sql = str(trial.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))  # type: ignore[no-untyped-call]
    try:
        with session.begin_nested():
            plan = session.connection().exec_driver_sql(f"EXPLAIN (FORMAT JSON) {sql}", ()).scalar()
    except DBAPIError as error:
        if classify(error) is Failure.GUARD:
            return []
        raise
    arbiters: list[str] = plan[0]["Plan"].get("Conflict Arbiter Indexes", []) if plan else []
    relation = relation_name(purchases)
    is_spoilt = session.scalar(_SOME_DEFERRABLE, {"relation": relation, "names": arbiters})
    return [] if is_spoilt else arbiters
