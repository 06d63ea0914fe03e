"""Checks whether vacuum removes the rows that the worker deletes.

Before vacuum has run, every claim must skip the index entries of deleted rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import text

from outbox_worker.diagnose.doctor.finding import Finding, Subject, ok, problem, unseen, warning
from outbox_worker.durations import ago, count_of
from outbox_worker.schema.tables import relation_name

_PATIENCE_SECONDS = 60.0
"""The doctor reports each transaction that has been open for more seconds than this. Such a
transaction prevents vacuum from removing rows."""
_PATIENCE_IDS = 100_000
"""The limit for replication slots and standbys, in transaction ids. The same limit applies to a
transaction if the role cannot see when the transaction began."""
_OVERDUE = 10
"""A factor. Vacuum is far behind if there are more dead rows than this factor times the number that
starts autovacuum."""
_OVERDUE_SECONDS = 3600.0
"""The second condition for "far behind": autovacuum has not run for this many seconds."""

# what: when a table was vacuumed, and how many dead rows start its next vacuum · lock: none · index: the catalogue's
_VACUUMS = text(
    """
    WITH rules AS (
        SELECT c.oid, c.reltuples,
               coalesce((SELECT option_value FROM pg_options_to_table(c.reloptions)
                         WHERE option_name = 'autovacuum_enabled'), 'true') IN ('true', 'on', 'yes', '1') AS is_on,
               coalesce((SELECT option_value FROM pg_options_to_table(c.reloptions)
                         WHERE option_name = 'autovacuum_vacuum_threshold'),
                        current_setting('autovacuum_vacuum_threshold')) AS threshold,
               coalesce((SELECT option_value FROM pg_options_to_table(c.reloptions)
                         WHERE option_name = 'autovacuum_vacuum_scale_factor'),
                        current_setting('autovacuum_vacuum_scale_factor')) AS scale
        FROM pg_class c WHERE c.oid = to_regclass(:relation))
    SELECT is_on, CAST(current_setting('autovacuum') AS bool) AND CAST(current_setting('track_counts') AS bool)
           AS is_on_everywhere, coalesce(n_dead_tup, 0) AS dead, coalesce(autovacuum_count, 0) AS times,
           CAST(threshold AS float) + CAST(scale AS float) * greatest(reltuples, 0) AS due_at,
           date_part('epoch', clock_timestamp() - last_autovacuum) AS seconds,
           pg_size_pretty(pg_total_relation_size(oid)) AS size
    FROM rules LEFT JOIN pg_stat_all_tables ON relid = oid
    """
)

# what: other transactions of this database that hold back vacuum · lock: none
# every role sees the transaction ids of other roles; only a role with pg_read_all_stats sees when transactions began
_TRANSACTIONS = text(
    """
    SELECT pid, quote_ident(usename) AS role, application_name AS program, state,
           date_part('epoch', clock_timestamp() - xact_start) AS seconds,
           greatest(age(backend_xmin), age(backend_xid)) AS age
    FROM pg_stat_activity a
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND usesysid IS NOT NULL
      AND backend_type IS DISTINCT FROM 'walsender' AND coalesce(backend_xmin, backend_xid) IS NOT NULL
      AND coalesce(xact_start < clock_timestamp() - make_interval(secs => :seconds),
                   greatest(age(backend_xmin), age(backend_xid)) > :ids)
      AND NOT EXISTS (SELECT FROM pg_stat_progress_vacuum v WHERE v.pid = a.pid)
    ORDER BY age DESC LIMIT 5
    """
)

_SEES_ALL = text("SELECT pg_has_role('pg_read_all_stats', 'USAGE')")

# what: prepared transactions of this database that are still open · lock: none
_PREPARED = text(
    """
    SELECT quote_literal(gid) AS gid, quote_ident(owner) AS role,
           date_part('epoch', clock_timestamp() - prepared) AS seconds
    FROM pg_prepared_xacts
    WHERE database = current_database() AND prepared < clock_timestamp() - make_interval(secs => :seconds)
    ORDER BY prepared LIMIT 5
    """
)

# what: replication slots that hold back vacuum or have no reader · lock: none
_SLOTS = text(
    """
    SELECT quote_literal(slot_name) AS name, active, age(xmin) AS age,
           pg_size_pretty(pg_wal_lsn_diff(
               CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END,
               restart_lsn)) AS kept
    FROM pg_replication_slots
    WHERE age(xmin) > :ids OR NOT active AND restart_lsn IS NOT NULL
    ORDER BY slot_name LIMIT 5
    """
)

# what: standbys that use no slot, and whose queries hold back vacuum · lock: none
# visible with pg_read_all_stats
_STANDBYS = text(
    """
    SELECT pid, application_name AS name, age(backend_xmin) AS age FROM pg_stat_replication
    WHERE age(backend_xmin) > :ids ORDER BY age(backend_xmin) DESC LIMIT 5
    """
)


def autovacuum(subject: Subject) -> Iterator[Finding]:
    """Check whether autovacuum is on for the outbox and removes dead rows fast enough."""
    name = relation_name(subject.tables.outbox)
    row = subject.session.execute(_VACUUMS, {"relation": name}).one()
    last = f"{ago(row.seconds)} ago" if row.seconds is not None else "never"
    ran = f"autovacuum ran {count_of(row.times, 'time')}, last {last}"
    evidence = f"{name}: {count_of(row.dead, 'dead row')}, {row.size}; {ran}"
    if not row.is_on_everywhere:
        yield problem(
            f"autovacuum is off on this server, or track_counts is off, which autovacuum needs; {evidence}",
            "ALTER SYSTEM SET autovacuum = on; ALTER SYSTEM SET track_counts = on; SELECT pg_reload_conf();",
        )
    elif not row.is_on:
        yield problem(f"autovacuum is off for {name}; {evidence}", f"ALTER TABLE {name} RESET (autovacuum_enabled);")
    elif row.dead > _OVERDUE * row.due_at and (row.seconds is None or row.seconds > _OVERDUE_SECONDS):
        yield warning(
            f"autovacuum is far behind, or cannot remove dead rows; {evidence}",
            f"see the check `horizon`, raise autovacuum_max_workers, or run now: VACUUM {name};",
        )
    else:
        yield ok(evidence)


def horizon(
    subject: Subject, seconds: float = _PATIENCE_SECONDS, transaction_ids: int = _PATIENCE_IDS
) -> Iterator[Finding]:
    """Report every transaction, replication slot and standby that prevents vacuum from removing dead rows."""
    found = [
        *_open_transactions(subject, seconds, transaction_ids),
        *_prepared_transactions(subject, seconds),
        *_slots(subject, transaction_ids),
        *_standbys(subject, transaction_ids),
    ]
    yield from found
    if not subject.session.scalar(_SEES_ALL):
        yield unseen(
            "this role cannot see how long transactions of other roles have been open; everything else was checked",
            f"as a superuser: GRANT pg_read_all_stats TO {subject.role}; -- the role then also sees all queries",
        )
    elif not found:
        yield ok(f"no transaction, slot or standby has held back vacuum for more than {ago(seconds)}")


def _open_transactions(subject: Subject, seconds: float, transaction_ids: int) -> Iterator[Finding]:
    for row in subject.session.execute(_TRANSACTIONS, {"seconds": seconds, "ids": transaction_ids}):
        who = ", ".join(filter(None, (row.role, row.program, row.state)))
        since = f"for {ago(row.seconds)}" if row.seconds is not None else f"since {row.age:,} transactions ago"
        yield warning(
            f"process {row.pid} ({who}) has had a transaction open {since}: vacuum cannot remove rows that were "
            "deleted since then",
            f"end the transaction, or: SELECT pg_terminate_backend({row.pid}); to prevent the next one: "
            f"ALTER ROLE {row.role} SET idle_in_transaction_session_timeout = '1min';",
        )


def _prepared_transactions(subject: Subject, seconds: float) -> Iterator[Finding]:
    for row in subject.session.execute(_PREPARED, {"seconds": seconds}):
        yield problem(
            f"the transaction {row.gid} of {row.role} was prepared {ago(row.seconds)} ago and is still open: "
            "vacuum cannot remove rows that were deleted since then, not even after a restart",
            f"COMMIT PREPARED {row.gid}; or ROLLBACK PREPARED {row.gid};",
        )


def _slots(subject: Subject, transaction_ids: int) -> Iterator[Finding]:
    for row in subject.session.execute(_SLOTS, {"ids": transaction_ids}):
        held = f"holds back vacuum by {count_of(row.age, 'transaction')}" if (row.age or 0) > transaction_ids else ""
        idle = "" if row.active else f"has no reader; it keeps {row.kept} of write-ahead log and can fill the disk"
        yield warning(
            f"the replication slot {row.name} {' and '.join(filter(None, (held, idle)))}",
            f"start its standby or subscriber; if it no longer exists: SELECT pg_drop_replication_slot({row.name});",
        )


def _standbys(subject: Subject, transaction_ids: int) -> Iterator[Finding]:
    for row in subject.session.execute(_STANDBYS, {"ids": transaction_ids}):
        yield warning(
            f"a query on the standby {row.name or row.pid} holds back vacuum by {count_of(row.age, 'transaction')}",
            "end the query there, or set hot_standby_feedback = off on that standby",
        )
