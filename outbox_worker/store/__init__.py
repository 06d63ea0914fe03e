"""The doors to the tables: every statement on them, one module per table.

Every function takes the session first; the caller owns the transaction. Do not commit, retry or log here, and do not
decide what becomes of an event.
"""
