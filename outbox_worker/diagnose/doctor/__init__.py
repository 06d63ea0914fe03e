"""The checks of ``outbox-worker doctor``: each yields findings with evidence and a remedy.

``report`` lists and runs them; ``finding`` holds their result. A check only reads; if it
fails, the others run all the same.
"""
