"""Connections, transactions, retries and statements, for any tables.

Everything above may import from here. Do not mention a table, an event or a purchase: this package knows no domain.
"""
