"""The commands that an operator types. Each file has a group of commands. ``views`` prints results.

Only ``__main__`` imports this package. A command parses options and calls one function of another
package. Then it prints the result and suggests the next command. It ends with exit code 0 or 1. If
an error is raised, the class of the error defines the exit code (see ``errors``). Do not put SQL,
transactions or rules here.
"""
