"""The path of an event, from the claim to COMMIT: processor → settlement → handlers → ``store``.

``Processor.process_batch`` is the door; it owns the transaction. ``settlement`` records outcomes (mark, removal, retry,
dead letter); ``pacing`` sizes and places the next claim; how long a failed event waits is ``decision.retry_delay``.
Do not write SQL here: statements are in ``store``. Do not report before COMMIT.
"""
