"""Commands that only read: ``status``, ``doctor``, and ``why`` (``records`` reads, ``explanation`` explains).

Do not write to the database here. To predict what happens to an event, call ``decision``; do not write other rules
here.
"""
