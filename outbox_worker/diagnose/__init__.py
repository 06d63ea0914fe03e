"""Commands that only read: ``status``, ``doctor``, and ``why`` (``records`` reads, ``explanation`` explains).

Do not write to the database here. Do not decide about events by other rules: call ``decision``.
"""
