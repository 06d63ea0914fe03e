"""Helpers of the tests: rows, processes, servers, faults, and models to compare results with."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
