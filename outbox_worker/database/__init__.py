"""Opens connections and transactions, executes statements, and repeats failed transactions.

Every package that uses the database can import this package. This package imports no code about
events or purchases. Only the module ``failures`` mentions events, to decide what a database error
means for an event. The other modules of this package must not name a table, an event or a purchase.
"""
