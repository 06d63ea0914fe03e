"""Turns every paid event of an outbox into exactly one purchase.

The rooms, from the top:

- ``cli``: what an operator types · ``demo``, ``bench``: the demonstration and the benchmark
- ``daemon``: the process · ``diagnose``: status, doctor, why
- ``reconcile``: audit and backfill · ``settle``: the path of an event
- ``store``: every statement on the tables · ``schema``: what the database must hold · ``telemetry``: logs and metrics
- ``database``: connections and transactions, for any tables
- ``embedded``: the private PostgreSQL · ``settings`` · ``terminal``
- ``decision``: the rules · ``durations`` · ``escapes`` · ``address`` · ``errors`` · ``model``: the words

A room imports only from rooms below it; ``make check`` enforces that.
"""

__version__ = "0.1.0"
