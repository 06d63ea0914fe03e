"""Runs the process of ``outbox-worker run``: threads, signals, systemd, HTTP, heartbeat, and a clean stop.

Start with ``Worker``. ``supervision`` decides what is reported to systemd, /livez and /readyz. ``chores`` writes the
heartbeat and collects the figures of the status line. Do not settle events here, because ``settle`` settles them,
one batch per call.
"""
