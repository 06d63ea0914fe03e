"""Runs the private PostgreSQL of ``embedded:DIR``. ``server`` starts the script ``launcher``, which is the parent
process of PostgreSQL.

Other packages call only ``server.ensure_server`` and ``server.stop_server``. ``launcher`` must not import
``outbox_worker``, because it runs as a separate script.
"""
