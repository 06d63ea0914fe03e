"""The commands that an operator types: one file per group of commands, and ``views`` for their output.

Only ``__main__`` imports from here. A command parses options, calls one function of another package, prints the
result, suggests the next command, and ends with exit code 0 or 1. For an error, ``errors`` defines the exit code by the
class of the error. Do not put SQL, transactions or rules here.
"""
