"""Runs the private PostgreSQL of ``embedded:DIR``. ``launcher`` is the parent process that ``server`` starts for it.

Other packages call only ``server.ensure_server`` and ``server.stop_server``. ``launcher`` must not import
``outbox_worker``, because it runs as a separate script.
"""
