"""The benchmark compares the worker with bare SQL on the same server, in a separate database.

Only ``cli`` imports from here. Measure the real command; do not change how the worker behaves for a measurement.
"""
