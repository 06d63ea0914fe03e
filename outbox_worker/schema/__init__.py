"""Defines the tables and privileges that the worker needs, checks them, and runs the migrations.

``tables.build_tables`` builds the tables with their configured names.
``requirements.check_schema`` reports missing tables, columns and privileges. ``migrate.upgrade``
creates missing tables.

To add a column, change ``model.COLUMNS``, ``tables``, ``privileges`` and deploy/grants.sql. Then
write a new revision in alembic/versions. Code in this package must not write rows of the tables.
"""
