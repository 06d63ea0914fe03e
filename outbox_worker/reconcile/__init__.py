"""Compares payments with purchases: ``audit`` proves that no purchase is owed, ``backfill`` makes those that are owed.

``audit``, ``duplicates`` and both backfills read the payments by ``scan``, which uses ``store.payment_classes``.
``owed`` inserts purchases through the daemon's repository and guard. Do not insert purchases by other statements.
"""
