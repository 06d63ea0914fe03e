"""Contains connections, transactions, retries and statements, all independent of the tables.

Every package that uses the database may import from here. This package imports no code about events or purchases. Only
``failures`` mentions events, because it classifies what a database error means for them. No other module may name a
table, an event or a purchase.
"""
