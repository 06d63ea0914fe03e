"""What a check found: how bad it is, the evidence, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Table
from sqlalchemy.orm import Session

from outbox_worker.database.engine import Database
from outbox_worker.schema.catalogue import exists, role_name
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings


class Severity(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """It works, but a person should know."""
    PROBLEM = "problem"
    """It does not work, or purchases may be lost or made twice."""
    UNSEEN = "unseen"
    """It could not be checked."""


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Severity
    evidence: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a check may look at: a READ ONLY transaction, and the settings of a worker of this database."""

    session: Session
    settings: Settings
    tables: Tables
    database: Database

    def present(self) -> dict[str, Table]:
        """The tables that exist, by their roles."""
        return {key: table for key, table in self.tables.by_role().items() if exists(self.session, table)}

    @property
    def role(self) -> str:
        """The role of the session, quoted."""
        return role_name(self.session)


def ok(evidence: str) -> Finding:
    return Finding(Severity.OK, evidence)


def warning(evidence: str, remedy: str) -> Finding:
    return Finding(Severity.WARNING, evidence, remedy)


def problem(evidence: str, remedy: str) -> Finding:
    return Finding(Severity.PROBLEM, evidence, remedy)


def unseen(evidence: str, remedy: str) -> Finding:
    return Finding(Severity.UNSEEN, evidence, remedy)
