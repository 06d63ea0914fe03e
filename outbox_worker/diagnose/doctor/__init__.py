"""The checks of ``outbox-worker doctor``: each yields findings with evidence and a remedy.

Add a check to the file of its topic and to ``report.CHECKS``: ``access`` (privileges), ``server`` (its
configuration), ``setup`` (tables, guard, indexes, notify, backfill) or ``vacuum``. ``finding`` defines the results
of checks. A check only reads the database. If one check fails, the others still run.
"""
