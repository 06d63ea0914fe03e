"""Connections, transactions, retries and statements, for any tables.

Everything above may import from here; nothing of the domain is imported. Only ``failures`` says what an error means for
events (retry, this event, pause, …). Do not name a table, an event or a purchase here.
"""
