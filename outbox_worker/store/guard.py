"""The guard: what stops a second active purchase of a pair, and how we know which one is in force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, func, null, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox_worker.database.failures import Failure, classify
from outbox_worker.decision import choose_guard
from outbox_worker.model import Guard
from outbox_worker.schema.catalogue import has_index_paths, pair_indexes
from outbox_worker.schema.tables import relation_name

_LOCKS_PER_TRANSACTION = 10
"""One batch takes at most a tenth of the server's lock table: one lock per event fills it (53200)."""


@dataclass(frozen=True, slots=True)
class GuardState:
    """The guard in force. ``predicate`` is the index's own, as the catalogue prints it; empty for ``lock``."""

    guard: Guard
    predicate: str = ""
    lock_capacity: int = 1
    """How many pairs one transaction may lock."""
    has_index_paths: bool = True
    """Whether purchases can be found by payment and by pair; where not, the planner is left to hash whole tables."""


class GuardWatch:
    """The guard that the claim loops of one process believe in; they share one watch.

    An assignment to ``state`` is atomic, and a belief that is out of date costs one savepoint, never a purchase.
    """

    def __init__(self, purchases: Table, on_change: Callable[[Guard], None]) -> None:
        self._purchases = purchases
        self._on_change = on_change
        self._known: Guard | None = None
        self._evidence: str | None = None
        self.state = GuardState(Guard.LOCK)

    def probe(self, session: Session) -> GuardState:
        """Ask the database which guard is in force and believe it; in one query where no index has changed since."""
        evidence = session.scalar(_EVIDENCE, {"relation": relation_name(self._purchases)})
        if evidence != self._evidence:
            self._believe(probe_guard(session, self._purchases))
            self._evidence = evidence
        return self.state

    def fall_back(self) -> GuardState:
        """The index just failed us (42P10, 55000): believe in the lock, and in no index path, until the next probe."""
        self._evidence = None
        return self._believe(replace(self.state, guard=Guard.LOCK, predicate="", has_index_paths=False))

    def _believe(self, state: GuardState) -> GuardState:
        self.state, before, self._known = state, self._known, state.guard
        if state.guard is not before:
            self._on_change(state.guard)
        return state


def probe_guard(session: Session, purchases: Table) -> GuardState:
    """Find a sound unique index and prove with EXPLAIN that the planner takes it as arbiter."""
    capacity = max(1, session.scalar(_LOCK_TABLE_SIZE) // _LOCKS_PER_TRANSACTION)
    has_paths = has_index_paths(session, purchases)
    sound = pair_indexes(session, purchases)
    for predicate in dict.fromkeys(sound.values()):
        if choose_guard(sound, _arbiters(session, purchases, predicate)) is Guard.INDEX:
            return GuardState(Guard.INDEX, predicate, capacity, has_paths)
    return GuardState(Guard.LOCK, "", capacity, has_paths)


def guard_in_force(session: Session, purchases: Table) -> Guard:
    """As a worker finds it; whoever may not insert cannot ask the planner, and goes by the catalogue."""
    if session.scalar(text("SELECT has_table_privilege(:name, 'INSERT')"), {"name": relation_name(purchases)}):
        return probe_guard(session, purchases).guard
    return Guard.INDEX if pair_indexes(session, purchases) else Guard.LOCK


def doubled_pairs(session: Session | Connection, purchases: Table, limit: int) -> Sequence[Row[Any]]:
    """Pairs (``student_id``, ``course_id``) with more than one active purchase, and the ``count``: no unique index can
    be built over them."""
    pair = [purchases.c[key].label(key) for key in ("student_id", "course_id")]
    columns = *pair, func.count().label("count")
    found: Select[Any] = select(*columns).where(purchases.c.is_active).group_by(*pair)
    return session.execute(found.having(func.count() > 1).order_by(*pair).limit(limit)).all()


def on_active_pair(purchases: Table, predicate: str) -> dict[str, Any]:
    """The conflict target, spelled out so that the planner asserts a valid index behind it at every execution.

    The predicate is literal text: as a bind parameter it makes generic plans raise 42P10 although the index is valid.
    """
    return {"index_elements": [purchases.c.student_id, purchases.c.course_id], "index_where": text(predicate)}


# what: how many locks fit into the server's lock table · lock: none
_LOCK_TABLE_SIZE = text(
    "SELECT CAST(current_setting('max_locks_per_transaction') AS int)"
    " * (CAST(current_setting('max_connections') AS int) + CAST(current_setting('max_prepared_transactions') AS int))"
)

# what: every index of a table, in its present version · lock: none · index: the catalogue's own
_EVIDENCE = text(
    "SELECT concat(CAST(CAST(to_regclass(:relation) AS oid) AS text), ' ',"
    " string_agg(concat_ws(' ', indexrelid, xmin, ctid), ' ' ORDER BY indexrelid))"
    " FROM pg_index WHERE indrelid = to_regclass(:relation)"
)

# what: whether one of these indexes is deferrable · lock: none · index: the catalogue's own
_SOME_DEFERRABLE = text(
    "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " WHERE i.indrelid = to_regclass(:relation) AND c.relname = ANY(:names) AND NOT i.indimmediate)"
)


def _arbiters(session: Session, purchases: Table, predicate: str) -> list[str]:
    """The indexes that EXPLAIN names as arbiters; none where the INSERT would raise 42P10 or 55000.

    A deferrable constraint on the pair is taken as an arbiter, too: EXPLAIN is content, every execution raises 55000.
    """
    nothing = select(null(), null()).where(text("false"))
    columns = [purchases.c.student_id, purchases.c.course_id]
    trial = postgresql.insert(purchases).from_select(columns, nothing, include_defaults=False)
    trial = trial.on_conflict_do_nothing(**on_active_pair(purchases, predicate))
    sql = str(trial.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))  # type: ignore[no-untyped-call]
    try:
        with session.begin_nested():
            plan = session.scalar(text(f"EXPLAIN (FORMAT JSON) {sql}"))
    except DBAPIError as error:
        if classify(error) is Failure.GUARD:
            return []
        raise
    arbiters: list[str] = plan[0]["Plan"].get("Conflict Arbiter Indexes", []) if plan else []
    relation = relation_name(purchases)
    is_spoilt = session.scalar(_SOME_DEFERRABLE, {"relation": relation, "names": arbiters})
    return [] if is_spoilt else arbiters
