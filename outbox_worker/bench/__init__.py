"""The benchmark: the worker beside bare SQL on the same machine and database, in a database of its own.

Only ``cli`` imports from here. Do not change how the worker behaves for a measurement; measure the real command.
"""
