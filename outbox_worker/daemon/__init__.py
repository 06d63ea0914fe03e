"""The process that ``outbox-worker run`` starts: threads, signals, systemd, HTTP, heartbeat, and their orderly end.

``Worker`` is the door: start, serve, drain. ``supervision`` says what systemd, /livez and /readyz are told; ``chores``
writes the heartbeat and the status line. Do not settle events here: ``settle`` does that, one batch per call.
"""
