"""The demonstration (``make demo``). It simulates a payments service and kills a worker.

At the end, it proves that nothing is owed. Only ``cli`` imports this package. Do not put code here
that the worker needs.
"""
