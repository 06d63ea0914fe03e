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

The planner gets no choice because the statistics of a queue are often outdated. Each statement is planned only once
because for a small batch, planning takes longer than the execution.
"""


def index_plans(has_indexes: bool) -> Mapping[str, str]:
    """Return ``INDEX_PLANS`` if the tables have the indexes that the statements need; otherwise nothing."""
    return INDEX_PLANS if has_indexes else {}


FREE_PLANS: Mapping[str, str] = {
    **dict.fromkeys(("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin"), "on"),
    "plan_cache_mode": "force_custom_plan",
}
"""Parameters that let the planner choose freely at each execution. They suit statements without an index."""

# what: set parameters until the transaction ends, except those that this server does not know · lock: none
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
    """Set parameters for the ``with`` block, then restore them. After an error, the rollback restores them."""
    given = {"parameters": json.dumps(parameters)}
    before = {key: value for key, value, _ in session.connection().exec_driver_sql(_SWITCH_LOCAL, given)}
    yield
    set_local(session, before)


def set_local(session: Session, parameters: Mapping[str, str]) -> None:
    """Set parameters until the transaction ends. A parameter that the server's version does not have is ignored."""
    session.connection().exec_driver_sql(SET_LOCAL, {"parameters": json.dumps(parameters)})
