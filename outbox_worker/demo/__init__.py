"""The demonstration: a simulated shop, workers that are killed, and the proof that nothing is owed (``make demo``).

Only ``cli`` imports from here. Do not put anything here that the product needs.
"""
