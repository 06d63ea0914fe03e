"""Defines what the checks of tables return: a problem with its remedy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchemaProblem:
    finding: str
    remedy: str
