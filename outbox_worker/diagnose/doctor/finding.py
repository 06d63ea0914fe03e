"""The result of a check: its severity, the evidence, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Table
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.schema.catalogue import exists, role_name
from outbox_worker.schema.privileges import RoleKind, kind_of_role
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings


class Severity(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """The worker works, but a person should know about this finding."""
    PROBLEM = "problem"
    """The worker does not work, or it can lose purchases or make them twice."""
    UNSEEN = "unseen"
    """The check was not possible."""


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Severity
    evidence: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """The input of a check: a READ ONLY transaction, and the settings of a worker on this database."""

    session: Session
    settings: Settings
    tables: Tables
    database: Database

    def present(self) -> dict[str, Table]:
        """Return the tables that exist. Each key is the table's default name, for example ``outbox``."""
        return {key: table for key, table in self.tables.by_role().items() if exists(self.session, table)}

    @property
    def role(self) -> str:
        """Return the session's role, quoted as an SQL identifier."""
        return role_name(self.session)

    def kind_of_role(self) -> RoleKind:
        """Return the kind of the session's role: worker, operator or reader.

        If the role fits no kind, treat it as a worker's role that lacks privileges.
        """
        return kind_of_role(self.session, self.present()) or RoleKind.WORKER

    def is_of_a_worker(self) -> bool:
        """Return whether the role is a worker's.

        Parameters and limits that are set for another role do not apply to workers.
        """
        return self.kind_of_role() is RoleKind.WORKER


def ok(evidence: str, hint: str = "") -> Finding:
    return Finding(Severity.OK, evidence, hint)


def warning(evidence: str, remedy: str) -> Finding:
    return Finding(Severity.WARNING, evidence, remedy)


def problem(evidence: str, remedy: str) -> Finding:
    return Finding(Severity.PROBLEM, evidence, remedy)


def unseen(evidence: str, remedy: str) -> Finding:
    return Finding(Severity.UNSEEN, evidence, remedy)
