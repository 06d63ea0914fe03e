"""What commands show: one file per command, as text for people (``print_…``) and as the object of ``--json``.

Only ``cli`` imports from here. Views get finished results: do not ask a database or decide anything here.
"""
