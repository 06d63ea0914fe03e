"""Payments against purchases: ``audit`` proves that nothing is owed, ``backfill`` makes what is owed.

``scan`` walks through the payments once for all of them and counts by ``store.payment_classes``; ``owed`` makes
purchases through the repository and the guard of the daemon. Do not insert purchases by statements of your own.
"""
