"""Runs all checks of the doctor, even if some fail. Each check runs in its own short READ ONLY transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy.exc import DBAPIError

from outbox_worker.database.engine import Database
from outbox_worker.database.failures import server_message
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
    """A check. It cannot run if a table whose role is in ``needs`` is missing."""

    look: Look
    needs: Sequence[str] = ()


CHECKS: Mapping[str, Check] = {
    "server": Check(server_checks.server),
    "tables": Check(setup_checks.tables),
    "grants": Check(access_checks.grants),
    "row_security": Check(access_checks.row_security),
    "guard": Check(setup_checks.guard, ("purchases",)),
    "set_aside": Check(refusal_checks.set_aside, ("workers", "outbox")),
    "swallowed_writes": Check(refusal_checks.swallowed),
    "replica_identity": Check(refusal_checks.replica_identity),
    "sequences": Check(refusal_checks.sequences_behind),
    "invalid_indexes": Check(setup_checks.invalid_indexes),
    "indexes": Check(setup_checks.indexes, ("payments",)),
    "notify": Check(setup_checks.notify, ("outbox",)),
    "backfill": Check(setup_checks.backfill, ("backfill_runs",)),
    "pooler": Check(server_checks.pooler),
    "connections": Check(server_checks.connections, ("workers", "outbox")),
    "time_outs": Check(server_checks.time_outs),
    "clock": Check(server_checks.clock),
    "durability": Check(server_checks.durability),
    "synchronous_commit": Check(server_checks.synchronous_commit),
    "autovacuum": Check(vacuum_checks.autovacuum, ("outbox",)),
    "horizon": Check(vacuum_checks.horizon),
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

    @property
    def ok(self) -> bool:
        return not self.count(Severity.PROBLEM)

    def count(self, verdict: Severity) -> int:
        return sum(each.verdict is verdict for each in self.checks)


def examine(settings: Settings) -> Report:
    """Run all checks. Raises DatabaseUnavailable if the database cannot be reached."""
    unprepared = settings.model_copy(update={"pooler": "transaction"})  # no prepared statements, so any pooler works
    longest = max(settings.database_deadline_seconds, STATEMENT_SECONDS)
    database = Database(unprepared, connections=2, deadline_seconds=longest)
    try:
        database.check()
        look = partial(_look, database, settings)
        return Report(
            [
                Diagnosis(name, found.verdict, found.evidence, found.remedy)
                for name, check in CHECKS.items()
                for found in look(check)
            ]
        )
    finally:
        database.close()


def _look(database: Database, settings: Settings, check: Check) -> Sequence[Finding]:
    """Run one check and return its findings. If the database refuses a statement, return the error as a finding."""
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
