"""Opens connections and transactions, executes statements, and repeats failed transactions.

Every package that uses the database can import this package. This package imports no code about
events or purchases. The module ``failures`` mentions events. It decides what a database error
means for an event. All other modules must not name a table, an event or a purchase.
"""
