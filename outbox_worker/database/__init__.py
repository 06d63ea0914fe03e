"""Contains connections, transactions, retries and statements, all independent of the tables.

Every layer above may import from here. The package imports no code about events or purchases; only ``failures``
classifies what a database error means for events. Do not name a table, an event or a purchase here.
"""
