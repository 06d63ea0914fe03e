"""Payments against purchases: ``audit`` proves that nothing is owed, ``backfill`` makes what is owed.

``scan`` reads and classes the payments for all of them. Do not insert purchases by statements of your own: ``owed``
uses the repository and the guard of the daemon.
"""
