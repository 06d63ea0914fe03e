"""The commands that an operator types: one file per group of commands, and ``views`` for their output.

Only ``__main__`` imports from here. A command parses options, calls one function of another package, prints the
result, suggests the next command and chooses the exit code. Do not put SQL, transactions or rules here.
"""
