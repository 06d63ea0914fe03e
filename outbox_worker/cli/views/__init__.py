"""What commands show: text for people (``print_…``), the object of ``--json``, and commands to run next (``next_…``).

Only ``cli`` imports from here. Views get finished results: do not query a database or decide anything here.
"""
