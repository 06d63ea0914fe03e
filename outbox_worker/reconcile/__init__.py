"""Compares payments with purchases. ``audit`` checks whether any purchase is owed; ``backfill`` makes owed purchases.

``audit``, ``duplicates`` and both backfills read the payments by ``scan``. ``scan`` uses the statements of
``store.payment_classes``. ``owed`` inserts purchases with the daemon's statements and its guard against duplicates. Do
not insert purchases by other statements.
"""
