"""Defines the result of the table checks: a problem with a remedy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchemaProblem:
    finding: str
    remedy: str
