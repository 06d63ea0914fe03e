"""The commands that only read the database: ``status``, ``doctor`` and ``why``.

For ``why``, ``records`` reads the rows and ``explanation`` explains them. Do not write to the
database in this package. To predict the outcome of an event, call ``decision.decide``. Do not write
other rules in this package.
"""
