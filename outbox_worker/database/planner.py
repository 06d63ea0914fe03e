"""Sets PostgreSQL parameters for one transaction, mainly parameters that make the planner use indexes."""

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
"""Parameters that make the planner use indexes and plan each statement only once.

The planner gets no choice: the statistics of a queue table are often outdated. The planner plans
each statement only once. For a small batch, planning takes longer than the execution.
"""


def index_plans(has_indexes: bool) -> Mapping[str, str]:
    """Return ``INDEX_PLANS`` if the tables have the indexes that the statements need.

    Return an empty mapping if an index is missing.
    """
    return INDEX_PLANS if has_indexes else {}


FREE_PLANS: Mapping[str, str] = {
    **dict.fromkeys(("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin"), "on"),
    "plan_cache_mode": "force_custom_plan",
}
"""Parameters that let the planner choose freely at each execution.

Use these parameters for statements that have no suitable index.
"""

# what: set the parameters that this server knows, until the transaction ends · lock: none
# safe behind a pooler
SET_LOCAL = (
    "SELECT set_config(key, value, true) FROM jsonb_each_text(CAST(%(parameters)s AS jsonb))"
    " WHERE current_setting(key, true) IS NOT NULL"
)

# what: set parameters until the transaction ends, and return their previous values · lock: none
_SWITCH_LOCAL = (
    "SELECT key, current_setting(key), set_config(key, value, true) FROM jsonb_each_text(CAST(%(parameters)s AS jsonb))"
)


@contextmanager
def planned(session: Session, **parameters: str) -> Iterator[None]:
    """Set parameters for the ``with`` block, then restore the previous values.

    If the block raises an error, the rollback restores the previous values.
    """
    given = {"parameters": json.dumps(parameters)}
    before = {key: value for key, value, _ in session.connection().exec_driver_sql(_SWITCH_LOCAL, given)}
    yield
    set_local(session, before)


def set_local(session: Session, parameters: Mapping[str, str]) -> None:
    """Set parameters until the transaction ends. Ignore parameters unknown to the server."""
    session.connection().exec_driver_sql(SET_LOCAL, {"parameters": json.dumps(parameters)})
