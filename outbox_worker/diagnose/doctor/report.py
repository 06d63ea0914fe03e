"""Runs all checks of the command ``doctor``.

Each check runs in a short READ ONLY transaction. If one check fails, the next checks still run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import server_message
from outbox_worker.database.sessions import Standby, find_standby
from outbox_worker.diagnose.doctor import access as access_checks
from outbox_worker.diagnose.doctor import refusals as refusal_checks
from outbox_worker.diagnose.doctor import server as server_checks
from outbox_worker.diagnose.doctor import setup as setup_checks
from outbox_worker.diagnose.doctor import vacuum as vacuum_checks
from outbox_worker.diagnose.doctor.finding import Finding, Severity, Subject, unseen
from outbox_worker.reconcile.scan import STATEMENT_SECONDS
from outbox_worker.schema.catalogue import exists
from outbox_worker.schema.tables import build_tables, relation_name
from outbox_worker.settings import Settings

Look = Callable[[Subject], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the command ``doctor``. The check runs only if all tables in ``needs`` exist.

    If ``is_of_primary`` is true, the check is about the primary server. ``doctor`` skips such a
    check on a standby. Most other checks are about the tables, and a standby has the same tables.
    """

    look: Look
    needs: Sequence[str] = ()
    is_of_primary: bool = False


CHECKS: Mapping[str, Check] = {
    "server": Check(server_checks.server),
    "tables": Check(setup_checks.tables),
    "money": Check(setup_checks.money, ("payments", "purchases")),
    "statuses": Check(setup_checks.statuses, ("payments",)),
    "unlogged": Check(setup_checks.unlogged),
    "grants": Check(access_checks.grants),
    "row_security": Check(access_checks.row_security),
    "guard": Check(setup_checks.guard, ("payments", "purchases")),
    "lock_key": Check(setup_checks.lock_key, ("payments", "purchases")),
    "set_aside": Check(refusal_checks.set_aside, ("workers", "outbox")),
    "swallowed_writes": Check(refusal_checks.swallowed),
    "replica_identity": Check(refusal_checks.replica_identity),
    "sequences": Check(refusal_checks.sequences_behind),
    "invalid_indexes": Check(setup_checks.invalid_indexes),
    "indexes": Check(setup_checks.indexes, ("payments",)),
    "event_types": Check(setup_checks.event_types, ("outbox",)),
    "notify": Check(setup_checks.notify, ("outbox",), is_of_primary=True),
    "backfill": Check(setup_checks.backfill, ("backfill_runs",)),
    "pooler": Check(server_checks.pooler),
    "connections": Check(server_checks.connections, ("workers", "outbox"), is_of_primary=True),
    "time_outs": Check(server_checks.time_outs, is_of_primary=True),
    "read_only": Check(server_checks.read_only),
    "encoding": Check(server_checks.encoding),
    "clock": Check(server_checks.clock, is_of_primary=True),
    "durability": Check(server_checks.durability, is_of_primary=True),
    "synchronous_commit": Check(server_checks.synchronous_commit, is_of_primary=True),
    "autovacuum": Check(vacuum_checks.autovacuum, ("outbox",), is_of_primary=True),
    "horizon": Check(vacuum_checks.horizon, is_of_primary=True),
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A finding with the name of its check."""

    name: str
    verdict: Severity
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    checks: Sequence[Diagnosis]
    standby: Standby | None = None
    """How far the server is behind its primary. None means that the server is not a standby."""

    @property
    def ok(self) -> bool:
        return not self.count(Severity.PROBLEM)

    def count(self, verdict: Severity) -> int:
        return sum(each.verdict is verdict for each in self.checks)


def examine(settings: Settings) -> Report:
    """Run all checks. Raises DatabaseUnavailable if the database cannot be reached."""
    # without prepared statements, any pooler works
    unprepared = settings.model_copy(update={"pooler": "transaction"})
    longest = max(settings.database_deadline_seconds, STATEMENT_SECONDS)
    database = Database(unprepared, connections=2, deadline_seconds=longest, looks=True)
    try:
        database.check()
        with database.snapshot() as session:
            standby = find_standby(session)
        look = partial(_look, database, settings, is_standby=standby is not None)
        found = [
            Diagnosis(name, each.verdict, each.evidence, each.remedy)
            for name, check in CHECKS.items()
            for each in look(check)
        ]
        return Report(found, standby)
    finally:
        database.close()


def _look(database: Database, settings: Settings, check: Check, *, is_standby: bool) -> Sequence[Finding]:
    """Run one check and return its findings. If the database refuses a statement, return the error as a finding."""
    if is_standby and check.is_of_primary:
        return [unseen("not checked, because this server is a standby", "run doctor on the primary")]
    tables = build_tables(settings)
    try:
        with database.snapshot() as session:
            needed = {role: table for role, table in tables.by_role().items() if role in check.needs}
            absent = [relation_name(table) for table in needed.values() if not exists(session, table)]
            if absent:
                return [unseen(f"not checked; missing tables: {', '.join(absent)}", "see the check `tables`")]
            return list(check.look(Subject(session, settings, tables, database)))
    except DBAPIError as error:
        database.check()
        return [
            unseen(
                f"not checked, because the database refused: {server_message(error)}",
                "see the checks `tables` and `grants`",
            )
        ]
