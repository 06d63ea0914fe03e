"""Reads and writes the tables: every statement that claims and settles events, and the parts of these statements.

- ``fast_path``: the statement that claims a batch, writes its purchases and marks, and deletes its events; under the
  guard ``lock``, a statement that locks the pairs first
- ``doors``: groups ``fast_path``, ``outbox`` and ``purchases`` for a claim loop
- ``outbox``: claims due events; deletes them, postpones them, or moves them to the dead letters
- ``purchases``: writes purchases and marks (``processed_events``), and locks pairs
- ``dead_letters``, ``workers``, ``backfill_runs``: one module for each of these tables
- ``crashes``: counts the proven deaths of workers for an event
- ``set_aside``: the events that no claim takes; ``ignored``: counts events of types that no handler settles
- ``doubled``: finds pairs with more than one active purchase
- ``guard``: finds out which guard is in force; ``statuses``: finds statuses of payments that nobody explained
- ``processes``: finds out whether a process still runs
- parts of statements: ``claims`` (locks due events, for ``outbox``), ``pairs`` (locks and reads pairs, for
  ``purchases``), ``claimed`` (finds the rows of claimed events), ``identity`` (compares ids), ``payload``,
  ``payment_classes`` (the SQL CASE that classifies payments), ``queries``

The first parameter of every function that runs a statement is the session, and the caller begins and commits the
transaction. Do not commit, retry or log here. Do not decide the outcome of an event here, except that ``fast_path``
leaves only the outcome ``created`` possible.
"""
