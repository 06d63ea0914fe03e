"""The doors to the tables: every statement on them, one module per table.

``queries`` and ``queue`` hold the expressions that several of them share, ``processes`` says which process still runs.
Every function takes the session first; the caller owns the transaction. Do not commit, retry or log here, and do not
decide what becomes of an event.
"""
