"""Settles events, from the claim to COMMIT: first ``fast``, by one statement; what falls out, carefully.

Call ``Processor.process_batch``. In a careful transaction, the order of calls is processor → settlement → handlers →
``store``. ``settlement`` marks and deletes settled events, and ``recording`` writes retries and dead letters.
``pacing`` is the memory of a claim loop between two batches: how many events the next claim asks for, and where in the
queue the claim begins. ``isolation``
processes single events alone after a worker has died. Two decisions are made outside this package:
``decision.decide`` decides the outcome of an event, and ``decision.retry_delay`` the delay of its next try. Do not
write SQL here, because all statements are in ``store``. Do not log or count an outcome before COMMIT.
"""
