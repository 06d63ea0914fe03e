"""The output of commands: text (``print_…``), objects for ``--json``, and commands to run next (``next_…``).

Only the package ``cli`` imports this package. Views only format results. Do not query a database or
decide anything here.
"""
