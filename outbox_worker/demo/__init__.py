"""The demonstration (``make demo``): a simulated payments service, a killed worker, and a proof that nothing is owed.

Only ``cli`` imports from here. Do not put code here that the worker needs.
"""
