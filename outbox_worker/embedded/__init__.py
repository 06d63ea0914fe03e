"""The private PostgreSQL of ``embedded:DIR``: ``server`` starts and finds it, ``launcher`` is its parent process.

``ensure_server`` is the door. Do not import the product from ``launcher``: it runs as a script of its own.
"""
