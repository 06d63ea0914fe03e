"""What the worker finds in its tables: are they as they must be, guarded, indexed, told of, backfilled once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
from sqlalchemy import Table, text
from sqlalchemy.dialects import postgresql

from outbox_worker.database.engine import connect_directly
from outbox_worker.database.failures import server_message
from outbox_worker.diagnose.doctor.finding import Finding, Subject, ok, problem, warning
from outbox_worker.model import Guard
from outbox_worker.reconcile.scan import order_of
from outbox_worker.schema.catalogue import is_owned, notifies, pair_indexes
from outbox_worker.schema.privileges import STRUCTURE
from outbox_worker.schema.requirements import find_problems
from outbox_worker.schema.tables import PAIR_INDEX, relation_name
from outbox_worker.store.backfill_runs import BackfillRuns
from outbox_worker.store.guard import doubled_pairs, guard_in_force

_SHOWN = 5
_SMALL_BYTES = 8 * 2**20
"""A table of this size is read at once, whatever index it lacks."""
_MIGRATE = "outbox-worker migrate --with unique_index"

# what: the indexes of a table that are not valid, and whether one is being built · lock: none · index: the catalogue's
_INVALID = text(
    """
    SELECT c.relname, CAST(CAST(c.oid AS regclass) AS text) AS name, i.indisunique,
           EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = c.oid) AS is_under_way
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE i.indrelid = to_regclass(:relation) AND NOT i.indisvalid ORDER BY c.relname
    """
)

# what: the columns of every usable B-tree of a table, in their order · lock: none · index: the catalogue's own
_INDEXED = text(
    """
    SELECT ARRAY(SELECT CAST(a.attname AS text) FROM generate_series(0, i.indnkeyatts - 1) AS k (position)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[k.position]
                 ORDER BY k.position) AS names, i.indpred IS NOT NULL AS is_partial
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
    WHERE i.indrelid = to_regclass(:relation) AND i.indisvalid AND i.indexprs IS NULL AND m.amname = 'btree'
    """
)

# what: how large a table is, without its indexes · lock: none
_SIZE = text("SELECT coalesce(pg_table_size(to_regclass(:relation)), 0)")

# what: which backend serves a listener, and whether its database has the outbox · lock: none
_LISTENER = "SELECT pg_backend_pid(), to_regclass(%s)"


def tables(subject: Subject) -> Iterator[Finding]:
    """All that is missing in tables, columns, types and unique keys; the first one hides no other."""
    problems = find_problems(subject.session, subject.tables, STRUCTURE)
    yield from (problem(each.finding, each.remedy) for each in problems)
    if not problems:
        found = subject.tables.by_role().values()
        adopted = [relation_name(table) for table in found if not is_owned(subject.session, table)]
        yield ok(f"all {len(found)} are as they must be; adopted: {', '.join(adopted) or 'none'}")


def guard(subject: Subject) -> Iterator[Finding]:
    """Which one is in force; and where that is ``lock``, what stands in the way of the index."""
    session, purchases = subject.session, subject.tables.purchases
    if guard_in_force(session, purchases) is Guard.INDEX:
        yield ok(f"index: {', '.join(pair_indexes(session, purchases))} admits one active purchase of a pair")
        return
    blind = "lock: a writer that inserts purchases and does not take the lock of their pair is not covered"
    doubled = doubled_pairs(session, purchases, _SHOWN + 1)
    if not doubled:
        yield warning(blind, _MIGRATE)
        return
    pairs = "; ".join(f"student {row.student_id}, course {row.course_id}: {row.count}" for row in doubled[:_SHOWN])
    more = ", and more" if len(doubled) > _SHOWN else ""
    yield problem(
        f"{blind}; and pairs hold more than one active purchase, which stops the index: {pairs}{more}",
        f"deactivate all but one purchase of each pair, then: {_MIGRATE}",
    )


def invalid_indexes(subject: Subject) -> Iterator[Finding]:
    """Half-built indexes: they cost every write, and a unique one refuses rows and guards nothing."""
    clean = True
    for table in subject.tables.by_role().values():
        for row in subject.session.execute(_INVALID, {"relation": relation_name(table)}):
            clean = False
            if row.is_under_way:
                yield ok(f"{row.name} is being built")
                continue
            say = problem if row.indisunique else warning
            mends = row.relname == PAIR_INDEX
            yield say(
                f"{row.name} is INVALID: an attempt to build it failed, and every write pays for it",
                _MIGRATE if mends else f"REINDEX INDEX CONCURRENTLY {row.name}; or drop it",
            )
    if clean:
        yield ok("none")


@dataclass(frozen=True, slots=True)
class _Helpful:
    """An index that some statement is made for."""

    role: str
    keys: tuple[str, ...]
    without: str
    """What happens without it."""
    may_be_partial: bool = False
    is_for_large: bool = True
    """Not missed while the table is small."""


_HELPFUL = (
    _Helpful("outbox", ("due_at", "id"), "each claim reads and sorts all events", is_for_large=False),
    _Helpful("outbox", ("id",), "each event that is settled is looked for among all", is_for_large=False),
    _Helpful("payments", ("id",), "each event reads all payments"),
    _Helpful("payments", ("student_id", "course_id"), "each batch of refunds reads all payments"),
    _Helpful("purchases", ("payment_id",), "each event reads all purchases", may_be_partial=True),
    _Helpful("purchases", ("student_id", "course_id"), "pairs are looked for in all purchases", may_be_partial=True),
    _Helpful("dead_letters", ("payment_id",), "audit and backfill read all dead letters"),
)


def indexes(subject: Subject, small_bytes: int = _SMALL_BYTES) -> Iterator[Finding]:
    """Indexes that adopted tables lack, each as the statement that builds it."""
    present = subject.present()
    missing = [each for each in _HELPFUL if each.role in present and _is_missed(subject, each, small_bytes)]
    for each in missing:
        yield _lacks(subject, each.role, each.keys, each.without)
    by_time = order_of(subject.session, subject.tables) != ("id",)
    if not by_time and _size(subject, subject.tables.payments) > small_bytes:
        yield _lacks(subject, "payments", ("created_at", "id"), "backfills of some days pass all payments")
    elif not missing:
        yield ok("what is looked up often is indexed, or small")


def _is_missed(subject: Subject, wanted: _Helpful, small_bytes: int) -> bool:
    table = subject.tables.by_role()[wanted.role]
    names = [table.c[key].name for key in wanted.keys]
    for row in subject.session.execute(_INDEXED, {"relation": relation_name(table)}):
        leads = row.names[: len(names)]
        is_ordered = "student_id" not in wanted.keys
        if (leads == names if is_ordered else set(leads) == set(names)) and (
            wanted.may_be_partial or not row.is_partial
        ):
            return False
    return not wanted.is_for_large or _size(subject, table) > small_bytes


def _lacks(subject: Subject, role: str, keys: tuple[str, ...], without: str) -> Finding:
    table = subject.tables.by_role()[role]
    quote = postgresql.dialect().identifier_preparer.quote  # type: ignore[no-untyped-call]
    name, columns = relation_name(table), ", ".join(quote(table.c[key].name) for key in keys)
    return warning(
        f"{name} has no index on ({columns}): {without}", f"CREATE INDEX CONCURRENTLY ON {name} ({columns});"
    )


def _size(subject: Subject, table: Table) -> int:
    return int(subject.session.scalar(_SIZE, {"relation": relation_name(table)}))


def notify(subject: Subject) -> Iterator[Finding]:
    """Whether workers hear of events at the producers' COMMIT, where they are to."""
    settings = subject.settings
    if not notifies(subject.session, subject.tables.outbox):
        yield ok(f"not in force: events are found by looking, every {settings.poll_max_seconds:g} s at the latest")
    elif settings.pooler == "transaction" and settings.listen_conninfo is None:
        yield warning(
            "the trigger tells of events, and through a pooler nobody hears it",
            "OUTBOX_LISTEN_DATABASE_URL: a URL that leads past the pooler",
        )
    else:
        yield _hears(subject)


def _hears(subject: Subject) -> Finding:
    """Try the connection that a worker listens on: is it there, to this database, and without a pooler?"""
    what, elsewhere = "the trigger tells of events, and", "OUTBOX_LISTEN_DATABASE_URL: this database, past any pooler"
    outbox = relation_name(subject.tables.outbox)
    try:
        with connect_directly(subject.settings) as connection:
            pid, relation = connection.execute(_LISTENER, [outbox]).fetchall()[0]
            is_direct = pid == connection.info.backend_pid
    except psycopg.Error as error:
        return warning(f"{what} there is no connection to listen on: {server_message(error)}", elsewhere)
    if relation is None:
        return warning(f"{what} workers listen on another database", elsewhere)
    if not is_direct:
        return warning(f"{what} workers listen behind a pooler; in transaction mode they hear nothing", elsewhere)
    return ok("in force: workers hear of events at their COMMIT")


def backfill(subject: Subject) -> Iterator[Finding]:
    """The periodic one only tells until a person has completed one (docs/explanation/decisions/018)."""
    if BackfillRuns(subject.tables).was_made_by_hand(subject.session):
        yield ok("one was completed by hand: periodic ones may make what is owed")
    elif not subject.settings.backfill_every_seconds:
        yield ok("periodic ones are switched off")
    else:
        yield warning(
            "none was completed by hand on this database: periodic ones only tell what is owed",
            "outbox-worker backfill --dry-run; and where that is right: outbox-worker backfill",
        )
