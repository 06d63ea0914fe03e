"""What the database must hold: the tables under their configured names, privileges, checks, and the migrations.

``tables.build_tables`` names them, ``requirements.check_schema`` says what is missing, ``migrate.upgrade`` creates it.
A new column goes into ``model.COLUMNS``, ``tables``, ``privileges``, a new revision in alembic/versions and
deploy/grants.sql. Do not read or write rows of the shop here.
"""
