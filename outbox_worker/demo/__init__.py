"""The demonstration: a simulated payments service, a killed worker, and the proof that nothing is owed (``make demo``).

Only ``cli`` imports from here. Do not put code here that the worker needs.
"""
