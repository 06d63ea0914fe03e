"""The benchmark compares the worker with bare SQL on the same server, in a separate database.

Only ``cli`` and the scripts in ``benchmarks/`` import this package. Measure the real command. Do
not change the worker's behaviour for a measurement.
"""
