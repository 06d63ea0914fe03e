"""Compares payments with purchases: ``audit`` finds owed purchases, ``backfill`` makes them.

The modules ``audit``, ``duplicates``, ``backfill`` and ``periodic`` use ``scan`` to read the
payments. ``scan`` uses the statements of ``store.payment_classes``. ``owed`` inserts purchases with
the statements and the guard of the daemon. Do not insert purchases with other statements.
"""
