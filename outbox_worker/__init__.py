"""Turns every paid event of an outbox into exactly one purchase.

The rooms, one floor per line, from the top; rooms divided by ``|`` do not know each other:

- ``cli``: what an operator types
- ``demo`` | ``bench``: the demonstration | the benchmark
- ``daemon`` | ``diagnose``: the process | status, doctor and why
- ``reconcile``: audit and backfill
- ``settle``: the path of an event
- ``store``: the statements on the tables
- ``schema`` | ``telemetry``: what the database must hold | logs and metrics
- ``database``: connections and transactions, for any tables
- ``embedded`` | ``settings`` | ``terminal``: the private PostgreSQL | the choices | how things look on a terminal
- ``decision`` | ``durations`` | ``escapes``: the rules, and how long a failed event waits | times as text | safe text
- ``address``: parses URLs and addresses
- ``errors``: the tree of errors, with exit codes
- ``model``: the words, such as ``Outcome`` and ``COLUMNS``

A room imports only from floors below it. Besides, only ``cli`` imports ``demo`` and ``bench``, only these three import
``terminal``, and ``model`` and ``decision`` know no database library. The contracts in pyproject.toml say so, and
``make check`` enforces them; add a new room there. Where to change what: docs/explanation/architecture.md.
"""

__version__ = "0.1.0"
