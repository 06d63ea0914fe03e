"""Reads and writes the tables of the worker and of the shop.

This package contains every statement that claims or settles events, and the parts of these
statements.

- ``fast_path``: one statement claims a batch of events, writes their purchases and marks, and
  deletes the events. Under the guard ``lock``, another statement first claims them and locks pairs
- ``doors``: groups ``fast_path``, ``outbox`` and ``purchases`` for a claim loop
- ``outbox``: claims due events, then deletes or postpones them, or moves them to the dead letters
- ``purchases``: writes purchases and marks (rows of ``processed_events``), and locks pairs (a
  student and a course)
- ``dead_letters``, ``workers``, ``backfill_runs``: each of these modules reads and writes the table
  of the same name
- ``crashes``: counts the workers that are proven to have died while they processed only one event
- ``set_aside``: keeps the events that claims skip, because the database refuses to change them
- ``ignored``: counts the events of types that no handler settles
- ``doubled``: finds pairs with more than one active purchase
- ``guard``: finds out whether the unique index or locks prevent a second active purchase of a pair
- ``statuses``: finds statuses of payments that the worker does not know
- ``processes``: finds out whether a process still runs
- parts of statements: ``claims`` (locks due events, for ``outbox``), ``pairs`` (locks and reads
  pairs, for ``purchases``), ``claimed`` (finds the rows of claimed events), ``identity`` (compares
  ids), ``payload``, ``payment_classes`` (the SQL CASE that classifies payments), ``queries``

The first parameter of a function that runs a statement is the session, or a ``Fetch`` that runs
statements in the session. The caller begins and commits the transaction. Do not commit, retry or
log in this package. Do not decide the outcome of an event here. The only exception is
``fast_path``. Every event that ``fast_path`` settles has the outcome ``created``.
"""
