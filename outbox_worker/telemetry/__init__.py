"""Writes logs and metrics. ``reporter.Telemetry`` writes log records and counts; ``metrics`` defines the metrics.

Do not read the database here, and do not put payload text or secrets into a log record.
"""
