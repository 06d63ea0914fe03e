"""The benchmark: the worker beside bare SQL on the same machine and database, in a database of its own.

Only ``cli`` imports from here. Do not change the product's behaviour to be measured; measure it as it is.
"""
