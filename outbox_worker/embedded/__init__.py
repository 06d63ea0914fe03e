"""Runs the private PostgreSQL of ``embedded:DIR``.

The module ``server`` starts the script ``launcher``. ``launcher`` is the parent process of
PostgreSQL.

Other packages call only ``ensure_server``, ``stop_server`` and ``find_binaries`` of ``server``, and
``end_with`` of ``launcher``. ``launcher`` runs as a separate script. Therefore it must not import
``outbox_worker``.
"""
