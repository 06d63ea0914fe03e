"""The checks of ``outbox-worker doctor``: each yields findings with evidence and a remedy.

``report`` lists and runs them; ``finding`` holds their result. A check reads only, and never fails the other checks.
"""
