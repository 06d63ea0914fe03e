"""Logs and metrics: ``reporter.Telemetry`` turns committed facts into records and counters; ``metrics`` defines these.

Do not read the database here, and do not put payload text or secrets into a record.
"""
