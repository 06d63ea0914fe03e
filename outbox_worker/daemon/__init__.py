"""Runs the process of ``outbox-worker run``: threads, signals, systemd, HTTP, heartbeat, and a clean stop.

To understand this package, begin with ``Worker``. ``supervision`` decides what this process reports
to systemd, /livez and /readyz. ``chores`` writes the heartbeat and collects the figures of the
status line. This package does not settle events. It calls the package ``settle``. Each call settles
one batch.
"""
