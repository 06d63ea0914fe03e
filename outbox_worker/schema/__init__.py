"""What the database must hold: the tables under their configured names, privileges, checks, and the migrations.

``tables.build_tables`` names them, ``requirements.check_schema`` says what is missing, ``migrate.upgrade`` creates it.
Do not read or write rows of the shop here.
"""
