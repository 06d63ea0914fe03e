"""Contains connections, transactions, retries and statements, all independent of the tables.

Every layer above may import from here. The package imports no code about events or purchases. Only ``failures``
mentions events, because it classifies what a database error means for them. Do not name a table, an event or a purchase
here.
"""
