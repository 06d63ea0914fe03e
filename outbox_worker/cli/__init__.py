"""What an operator types: one file per group of commands, and ``views`` for what each command shows.

Nothing is imported from here but by ``__main__``. A command parses options, calls one function of the product, shows
the result and chooses the exit code. Do not put SQL, transactions or rules here.
"""
