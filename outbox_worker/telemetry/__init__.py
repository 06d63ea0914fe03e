"""Writes logs and metrics.

``reporter.Telemetry`` writes log records and counts. ``metrics`` defines the metrics. Code in this
package must not read the database. It must not put payload text or secrets into a log record.
"""
