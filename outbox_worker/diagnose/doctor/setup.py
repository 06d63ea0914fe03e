"""Checks the tables: columns and keys, guard, indexes, NOTIFY, and the first backfill."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import psycopg
from sqlalchemy import Table, func, select, text
from sqlalchemy.dialects import postgresql

from outbox_worker.database.engine import connect_directly
from outbox_worker.database.failures import server_message
from outbox_worker.diagnose.doctor.finding import Finding, Subject, ok, problem, warning
from outbox_worker.durations import count_of
from outbox_worker.keys import Key, KeyKind
from outbox_worker.model import Guard
from outbox_worker.reconcile.scan import order_of
from outbox_worker.schema.catalogue import adopted_tables, notifies, pair_indexes
from outbox_worker.schema.concerns import find_shared_event_ids, find_unfit_index, find_unlogged
from outbox_worker.schema.ids import SameId
from outbox_worker.schema.nullable import find_nullable
from outbox_worker.schema.partitions import build_pair_index, create_index
from outbox_worker.schema.privileges import STRUCTURE
from outbox_worker.schema.requirements import find_narrower, find_problems, with_types_as_found
from outbox_worker.schema.shapes import noun_of_view
from outbox_worker.schema.tables import PAIR_INDEX, Tables, quoted, relation_name
from outbox_worker.settle.handlers import claimed_types
from outbox_worker.store.backfill_runs import BackfillRuns
from outbox_worker.store.doubled import doubled_pairs
from outbox_worker.store.guard import guard_in_force
from outbox_worker.store.identity import pair_key
from outbox_worker.store.ignored import count_ignored
from outbox_worker.store.payment_classes import MISSING
from outbox_worker.store.statuses import find_unknown_statuses

_SHOWN = 5
_SMALL_BYTES = 8 * 2**20
"""A table of at most this many bytes needs no index for the worker. Reading the whole table is
fast."""

# what: the invalid indexes of a table, and whether each index is being built · lock: none
# index: the catalogue's
_INVALID = text(
    """
    SELECT c.relname, CAST(CAST(c.oid AS regclass) AS text) AS name, i.indisunique,
           c.relkind = 'I' AS is_partitioned,
           EXISTS (SELECT FROM pg_stat_progress_create_index p WHERE p.index_relid = c.oid) AS is_under_way
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE i.indrelid = to_regclass(:relation) AND NOT i.indisvalid ORDER BY c.relname
    """
)

# what: the columns of every usable B-tree index of a table, in the order of the index · lock: none
# index: the catalogue's indexes
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

# what: the process id of the connection's backend, and whether the database has the outbox
# lock: none
_LISTENER = "SELECT pg_backend_pid(), to_regclass(%s)"


def tables(subject: Subject) -> Iterator[Finding]:
    """Report missing or wrong tables, columns, types and unique keys.

    Also report tables of an unusable form, columns that can be NULL, and event ids that can repeat.
    """
    problems = find_problems(subject.session, subject.tables, STRUCTURE)
    yield from (problem(each.finding, each.remedy) for each in problems)
    nullable = find_nullable(subject.session, subject.tables)
    yield from (problem(each.finding, each.remedy) for each in nullable)
    shared = find_shared_event_ids(subject.session, subject.tables)
    yield from (warning(each.finding, each.remedy) for each in shared)
    if not problems and not nullable and not shared:
        adopted = adopted_tables(subject.session, subject.tables)
        count = len(subject.tables.by_role())
        yield ok(f"all {count} tables have what the worker needs; adopted: {', '.join(adopted) or 'none'}")


def money(subject: Subject) -> Iterator[Finding]:
    """Report columns of purchases that cannot hold every amount and currency of payments."""
    narrower = find_narrower(subject.session, subject.tables)
    yield from (problem(each.finding, each.remedy) for each in narrower)
    if not narrower:
        yield ok("purchases can hold every amount and currency that payments can hold")


def statuses(subject: Subject) -> Iterator[Finding]:
    """Report statuses of payments that the worker does not know."""
    found = find_unknown_statuses(subject.session, subject.tables)
    yield from (problem(each.finding, each.remedy) for each in found)
    if not found:
        yield ok("the worker knows every status that payments have")


def unlogged(subject: Subject) -> Iterator[Finding]:
    """Report UNLOGGED tables. PostgreSQL empties such a table after a crash."""
    found = find_unlogged(subject.session, subject.tables)
    yield from (problem(each.finding, each.remedy) for each in found)
    if not found:
        yield ok("no table is UNLOGGED, so a crash of the server loses no rows")


def event_types(subject: Subject) -> Iterator[Finding]:
    """Report events that stay in the outbox because the worker does not handle their type."""
    session, tables = subject.session, subject.tables
    claimed = claimed_types(session, tables, subject.settings.unknown_types)
    ignored = count_ignored(session, tables, claimed)
    if claimed is None:
        yield ok("events of unknown types become dead letters")
    elif not ignored.events:
        yield ok("events of unknown types stay in the outbox for other consumers; there are none now")
    else:
        named = [each.event_type for each in ignored.types if each.event_type != MISSING]
        example = "".join(
            "if one of them confirms a purchase, say so in the configuration file: [outbox] "
            f'types.{json.dumps(name, ensure_ascii=False)} = "PURCHASE_CONFIRMED"; '
            for name in named[:1]
        )
        yield warning(
            f"{count_of(ignored.events, 'event')} of unknown types stay in the outbox: {ignored.listed()}",
            f"{example}if no other consumer reads them, set OUTBOX_UNKNOWN_TYPES=bury: they become dead letters",
        )


def guard(subject: Subject) -> Iterator[Finding]:
    """Report which guard prevents duplicate purchases: the unique index or locks.

    If locks are the guard, also report duplicates, because they prevent a unique index.
    """
    session, tables = subject.session, with_types_as_found(subject.session, subject.tables, ["payments", "purchases"])
    if guard_in_force(session, tables) is Guard.INDEX:
        names = ", ".join(pair_indexes(session, tables.purchases))
        yield ok(f"index: {names} allows only one active purchase per student and course")
        return
    unfit = find_unfit_index(session, tables)
    why = unfit[0].finding if unfit else "there is no unique index"
    remedy = build_pair_index(session, tables.purchases)
    blind = f"lock: {why}; other code that inserts purchases can create duplicates"
    if loose := [(key, same) for key, same in tables.ids if not same.is_indexable]:
        blind, remedy = _explain_loose(tables, loose, remedy)
    doubled = doubled_pairs(session, tables, _SHOWN + 1)
    if not doubled:
        yield warning(blind, remedy)
        return
    shown = doubled[:_SHOWN]
    pairs = "; ".join(f"student {row.student_id}, course {row.course_id}: {row.purchases} purchases" for row in shown)
    more = ", and more" if len(doubled) > _SHOWN else ""
    yield problem(
        f"{blind}; the index cannot be built while there are duplicates: {pairs}{more}",
        f"deactivate all but one purchase of each student and course, then: {remedy}",
    )


def _explain_loose(tables: Tables, loose: Sequence[tuple[str, SameId]], then: str) -> tuple[str, str]:
    """Return why no unique index can prevent duplicates here, and the remedy.

    The remedy changes the types of the ids in purchases to those in payments.
    """
    name, paid = relation_name(tables.purchases), relation_name(tables.payments)
    own = [(tables.payments.c[key].name, tables.purchases.c[key].name, same) for key, same in loose]
    columns = "; ".join(f"{paid}.{a} has type {same.paid}, but {name}.{b} has type {same.bought}" for a, b, same in own)
    why = (
        f"lock: {columns}: the types of payments treat more ids as equal than the types of purchases, so a unique "
        "index would allow one student two purchases of a course, and each check of a pair reads all purchases"
    )
    changes = [f"ALTER COLUMN {quoted(each)} TYPE {same.paid.sql_type}" for _, each, same in own]
    return why, f"as its owner: ALTER TABLE {name} {', '.join(changes)}; then: {then}; then restart the workers"


_EXAMPLES: Mapping[KeyKind, Key] = {KeyKind.UUID: UUID(int=0), KeyKind.INTEGER: "0", KeyKind.TEXT: ""}


def lock_key(subject: Subject) -> Iterator[Finding]:
    """Report how other programs must lock a pair (student and course).

    If the formula of docs/contract.md is wrong for these types of ids, report a statement instead.
    """
    tables = with_types_as_found(subject.session, subject.tables, ["payments", "purchases"])
    if tables.ids.has_public_key:
        yield ok("other programs lock a pair of student and course by the formula of docs/contract.md")
        return
    paid = tables.payments.alias("p")
    example = _EXAMPLES[tables.payment_key]
    locked = select(func.pg_advisory_xact_lock(pair_key(tables.ids, paid))).where(paid.c.id == example)
    sql = str(locked.compile(dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}))  # type: ignore[no-untyped-call]
    types = " and ".join(f"{tables.payments.c[key].name} is {same.paid}" for key, same in tables.ids)
    yield ok(
        f"{types}: equal ids can have different texts, so the formula of docs/contract.md gives no usable lock key; "
        "other programs must lock a pair of student and course by this statement, with the id of their payment",
        f"{' '.join(sql.split())};",
    )


def invalid_indexes(subject: Subject) -> Iterator[Finding]:
    """Report invalid indexes. The build of such an index failed.

    No query uses an invalid index, but every write updates the index. An invalid unique index can
    still refuse rows.
    """
    clean = True
    for table in subject.tables.by_role().values():
        for row in subject.session.execute(_INVALID, {"relation": relation_name(table)}):
            clean = False
            if row.is_under_way:
                yield ok(f"{row.name} is being built")
                continue
            say = problem if row.indisunique else warning
            rebuild = f"REINDEX INDEX CONCURRENTLY {row.name}; or: DROP INDEX CONCURRENTLY {row.name};"
            if row.is_partitioned:
                rebuild = f"attach the missing indexes of partitions to it, or: DROP INDEX {row.name};"
            yield say(
                f"{row.name} is INVALID, because its build failed: no query uses it, but every write updates it",
                build_pair_index(subject.session, table)
                if row.relname == PAIR_INDEX and not row.is_partitioned
                else rebuild,
            )
    if clean:
        yield ok("no index is invalid")


@dataclass(frozen=True, slots=True)
class _Helpful:
    """An index that a statement of the worker needs."""

    role: str
    keys: tuple[str, ...]
    without: str
    """The consequence if the index is missing."""
    may_be_partial: bool = False
    is_for_large: bool = True
    """Whether only a large table needs the index."""


_HELPFUL = (
    _Helpful("outbox", ("due_at", "id"), "each claim reads and sorts all events", is_for_large=False),
    _Helpful("outbox", ("id",), "settling an event reads all events", is_for_large=False),
    _Helpful("payments", ("id",), "settling an event reads all payments"),
    _Helpful("payments", ("student_id", "course_id"), "each batch of refunds reads all payments"),
    _Helpful("purchases", ("payment_id",), "settling an event reads all purchases", may_be_partial=True),
    _Helpful("purchases", ("student_id", "course_id"), "each check of a pair reads all purchases", may_be_partial=True),
    _Helpful("dead_letters", ("payment_id",), "audit and backfill read all dead letters"),
)


def indexes(subject: Subject, small_bytes: int = _SMALL_BYTES) -> Iterator[Finding]:
    """Report missing indexes. The remedy is the statement that creates the index.

    This check omits views, because PostgreSQL cannot create an index on a view.
    """
    present = subject.present()
    indexed = {role for role, table in present.items() if not noun_of_view(subject.session, table)}
    missing = [each for each in _HELPFUL if each.role in indexed and _is_missed(subject, each, small_bytes)]
    for each in missing:
        yield _lacks(subject, each.role, each.keys, each.without)
    by_time = order_of(subject.session, subject.tables) != ("id",)
    if not by_time and "payments" in indexed and _size(subject, subject.tables.payments) > small_bytes:
        yield _lacks(subject, "payments", ("created_at", "id"), "a backfill of a few days reads all payments")
    elif not missing:
        yield ok("every table that needs an index has it")


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
    name, columns = relation_name(table), ", ".join(quoted(table.c[key].name) for key in keys)
    return warning(f"{name} has no index on ({columns}): {without}", create_index(subject.session, table, keys))


def _size(subject: Subject, table: Table) -> int:
    return int(subject.session.scalar(_SIZE, {"relation": relation_name(table)}))


def notify(subject: Subject) -> Iterator[Finding]:
    """Check whether a notification reaches the workers when a producer commits an event.

    Without the option ``notify``, workers only poll for events.
    """
    settings = subject.settings
    if not notifies(subject.session, subject.tables.outbox):
        yield ok(f"not in force: each worker polls for events, at least every {settings.poll_max_seconds:g} s")
    elif settings.pooler == "transaction" and settings.listen_conninfo is None:
        yield warning(
            "the trigger sends notifications, but the pooler does not pass them to workers",
            "set OUTBOX_LISTEN_DATABASE_URL to a URL that bypasses the pooler",
        )
    else:
        yield _hears(subject)


def _hears(subject: Subject) -> Finding:
    """Connect in the same way as a listening worker.

    Check that this connection reaches this database without a pooler.
    """
    what = "the trigger sends notifications, but"
    remedy = "set OUTBOX_LISTEN_DATABASE_URL to a URL of this database that bypasses any pooler"
    outbox = relation_name(subject.tables.outbox)
    try:
        with connect_directly(subject.settings, looks=True) as connection:
            pid, relation = connection.execute(_LISTENER, [outbox]).fetchall()[0]
            is_direct = pid == connection.info.backend_pid
    except psycopg.Error as error:
        return warning(f"{what} workers cannot open a connection to listen: {server_message(error)}", remedy)
    if relation is None:
        return warning(f"{what} workers listen on another database", remedy)
    if not is_direct:
        return warning(f"{what} workers listen through a pooler, which drops notifications in transaction mode", remedy)
    return ok("in force: workers are notified when a producer commits an event")


def backfill(subject: Subject) -> Iterator[Finding]:
    """Check whether the periodic backfill can make purchases (docs/explanation/decisions/018)."""
    if BackfillRuns(subject.tables).was_made_by_hand(subject.session):
        yield ok("an operator has completed a backfill here, so the periodic backfill may create owed purchases")
    elif not subject.settings.backfill_every_seconds:
        yield ok("the periodic backfill is switched off")
    else:
        yield warning(
            "no backfill was completed by hand on this database, so the periodic backfill only reports",
            "outbox-worker backfill --dry-run; if its result is right: outbox-worker backfill",
        )
