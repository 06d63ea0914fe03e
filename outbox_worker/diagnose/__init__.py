"""Commands that look and change nothing: ``status``, ``doctor``, and ``why`` (``records``, then ``explanation``).

Do not write here, and do not judge by rules of your own: call ``decision``.
"""
