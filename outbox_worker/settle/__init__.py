"""Settles events, from the claim to COMMIT. The order of calls is processor → settlement → handlers → ``store``.

Call ``Processor.process_batch``, which owns the transaction. ``settlement`` marks and deletes settled events, and
``recording`` writes retries and dead letters: a new outcome is added in ``model`` and ``decision``, not here.
``pacing`` decides how many events the next claim asks for, and where the claim begins in the queue. ``isolation``
processes single events alone after a worker has died. ``decision.retry_delay`` decides how long a failed event waits.
Do not write SQL here: statements are in ``store``. Do not log or count an outcome before COMMIT.
"""
