"""Creates exactly one purchase for every paid event of an outbox.

This list shows the layers of the package from top to bottom. Modules with ``|`` between them are in
one layer and do not import each other:

- ``cli``: the commands for operators
- ``demo`` | ``bench``: the demonstration | the benchmark
- ``daemon`` | ``diagnose``: the worker process | the commands status, doctor and why
- ``reconcile``: audit and backfill
- ``settle``: handles the events
- ``store``: all SQL statements that read or write the tables
- ``schema`` | ``telemetry``: the tables and privileges that the worker needs | logs and metrics
- ``database``: connections and transactions, independent of the tables
- ``embedded`` | ``settings`` | ``terminal``: the private PostgreSQL | the settings | formatting for terminals
- ``mapping``: the names that tables, columns, statuses and event types have in the user's database
- ``decision`` | ``durations`` | ``escapes`` | ``interrupts``: the rules for events and retries | times as text | text
  without control characters | signals that arrive while the program starts
- ``address``: parses URLs and addresses
- ``errors``: the tree of errors, with exit codes
- ``model``: enumerations and records, such as ``Outcome`` and ``Event``
- ``keys`` | ``money``: parse ids of payments and events | format and add amounts of money

A module imports only from lower layers. In addition, only ``cli`` imports ``demo`` and ``bench``.
Only ``cli``, ``demo`` and ``bench`` import ``terminal``. ``model`` and ``decision`` import no
database library. The import contracts in pyproject.toml contain these rules. ``make check``
enforces the rules. If you add a package, add it to the import contracts.
docs/explanation/architecture.md explains which package to change for which purpose.
"""

__version__ = "0.1.0"
