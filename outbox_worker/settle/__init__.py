"""The path of an event, from the claim to COMMIT: processor → settlement → handlers → ``store``.

``Processor.process_batch`` is the door; it owns the transaction. Do not write SQL here: every statement is in
``store``. Do not report before COMMIT.
"""
