"""Reads and writes the tables: every statement that claims and settles events, and the parts of these statements.

- ``outbox``: claims due events; deletes them, postpones them, or moves them to the dead letters
- ``purchases``: writes purchases and marks (``processed_events``), and locks pairs
- ``dead_letters``, ``workers``, ``backfill_runs``: one module for each of these tables
- ``crashes``: counts the proven deaths of workers for an event
- ``guard``: finds out which guard is in force
- parts of statements: ``pairs`` (the statements that ``purchases`` runs to lock and read pairs), ``claimed`` (finds
  the rows of claimed events), ``payload``, ``payment_classes`` (the SQL CASE that classifies payments), ``queries``
- ``processes``: finds out whether a process still runs

The first parameter of every function is the session, and the caller begins and commits the transaction. Do not commit,
retry or log here, and do not decide the outcome of an event.
"""
