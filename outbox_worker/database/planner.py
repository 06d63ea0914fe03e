"""Settings of one transaction, above all those that tell the planner to use indexes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy.orm import Session

INDEX_PLANS: Mapping[str, str] = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}
"""The statistics of queue-like tables mislead the planner; where an index path is meant, only that is left to it, and
the plan is made once: looking for a better one at each execution costs a small batch more than its work."""

FREE_PLANS: Mapping[str, str] = {
    **dict.fromkeys(("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin"), "on"),
    "plan_cache_mode": "force_custom_plan",
}
"""Where no index path may be there: the planner's choice, made anew each time, by what the tables hold now."""

# what: parameters that end with the transaction · lock: none · safe behind a pooler
_SET_LOCAL = "SELECT set_config(key, value, true) FROM jsonb_each_text(CAST(%(parameters)s AS jsonb))"

# what: the same, with the values before · lock: none
_SWITCH_LOCAL = (
    "SELECT key, current_setting(key), set_config(key, value, true) FROM jsonb_each_text(CAST(%(parameters)s AS jsonb))"
)


@contextmanager
def planned(session: Session, **parameters: str) -> Iterator[None]:
    """Parameters of the planner for the statements inside; then those before. A failure leaves that to its rollback."""
    given = {"parameters": json.dumps(parameters)}
    before = {key: value for key, value, _ in session.connection().exec_driver_sql(_SWITCH_LOCAL, given)}
    yield
    set_local(session, before)


def set_local(session: Session, parameters: Mapping[str, str]) -> None:
    """Set parameters that hold until the transaction ends."""
    session.connection().exec_driver_sql(_SET_LOCAL, {"parameters": json.dumps(parameters)})
