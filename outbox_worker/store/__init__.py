"""The doors to the tables: every statement that claims, settles or writes, and what such statements are made of.

- ``outbox``: claims due events; removes, postpones and buries them
- ``purchases``: purchases and marks (``processed_events``); takes the locks of pairs (``lock_pairs``)
- ``dead_letters``, ``workers``, ``backfill_runs``: the tables of those names
- ``guard``: which guard is in force; takes no lock
- parts of statements: ``pairs`` (lock and facts of a pair), ``claimed`` (finds claimed events again), ``payload``,
  ``payment_classes`` (the equation behind audit, backfill and why), ``queries``, ``processes`` (which process runs)

Every function takes the session first; the caller owns the transaction. Do not commit, retry or log here, and do not
decide what becomes of an event.
"""
