"""Helpers of the tests: rows and readers, processes, servers, faults, and the models that results are held against."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
