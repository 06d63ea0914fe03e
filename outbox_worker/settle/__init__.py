"""Settles events, from the claim to COMMIT.

Call ``Processor.process_batch``. First, the module ``fast`` settles a batch by one statement. Then
a careful transaction settles the events that this statement left unchanged. A careful transaction
first locks the pairs of the events. A careful transaction calls processor → settlement → handlers →
``store``. ``settlement`` marks and deletes settled events. ``recording`` writes retries and dead
letters. ``pacing`` stores how many events the next claim asks for, and where in the queue the claim
begins. ``isolation`` processes single events alone after a worker has died.

``decision.decide`` decides the outcome of an event. ``decision.retry_delay`` computes the delay of
the next try. Write SQL only in ``store``, not in this package. Log and count an outcome only after
COMMIT.
"""
