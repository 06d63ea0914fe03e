"""The output of commands: text (``print_…``), objects for ``--json``, and commands to run next (``next_…``).

Only ``cli`` imports from here. Views only format results: do not query a database or decide anything here.
"""
