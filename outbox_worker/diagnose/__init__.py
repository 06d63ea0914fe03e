"""Looking without changing anything: ``status``, ``doctor``, and ``why`` (records, then their explanation).

All of it runs in READ ONLY transactions. Do not write here, and do not judge by rules of your own: call ``decision``.
"""
