"""Logs and metrics. ``reporter.Telemetry`` turns facts that are committed into records and counters.

Do not read the database here, and do not put payload text or secrets into a record.
"""
