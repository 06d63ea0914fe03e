"""The checks of the command ``outbox-worker doctor``. Each check yields findings.

Add a check to the module of its topic and to ``report.CHECKS``. The modules are ``access``
(privileges), ``server`` (configuration), ``setup`` (tables, guard, indexes, notify, backfill),
``refusals`` (refused writes) and ``vacuum``. A finding has evidence and a remedy, see ``finding``.
A check only reads the database. If one check fails, the next checks still run.
"""
