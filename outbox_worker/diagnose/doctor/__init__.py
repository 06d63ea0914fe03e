"""The checks of ``outbox-worker doctor``: each yields findings with evidence and a remedy.

``report`` lists and runs the checks; ``finding`` defines their results. A check only reads the database. If one check
fails, the others still run.
"""
