"""Write docs/statements.sql: each statement that claims and settles events, as it is sent under default names.

``make statements`` runs this script. A test fails if the committed file differs from what the script would write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from outbox_worker.database.statements import Statement
from outbox_worker.model import Guard
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import Settings
from outbox_worker.store import claims, fast_path, outbox, pairs, purchases
from outbox_worker.store.doors import Doors
from outbox_worker.store.guard import GuardState

PAGE = Path(__file__).parent / "statements.sql"
_WIDTH = 118
_HEAD = """\
-- The statements that claim and settle events, as the worker sends them under default table names, with the payload
-- column of type jsonb. Written by `make statements`; do not edit. Parameters are written as :name.
--
-- A fast transaction sends 1, or under the guard `lock` 2 and 3. All other statements belong to careful transactions.
-- The parameters of each transaction (docs/explanation/performance.md) make PostgreSQL plan each statement once.
"""

Builder = Callable[..., Any]


def page() -> str:
    """Return the text of the file."""
    numbered = enumerate(statements(), 1)
    return "\n".join([_HEAD, *(written(number, *each) for number, each in numbered)])


def statements() -> Iterator[tuple[str, Builder, Statement]]:
    """Yield the title of each statement, the function whose docstring describes it, and the statement."""
    doors = Doors.of(build_tables(Settings()), None)
    fast, events, repository = doors
    index, lock = GuardState(Guard.INDEX, "is_active"), GuardState(Guard.LOCK)
    yield "claim and settle (guard index)", fast_path.fast_statement, fast._statement(index, claims=True)
    yield "claim, and lock the pairs (guard lock)", fast_path._lock_due_statement, fast._lock_due
    yield "settle what is locked (guard lock)", fast_path.fast_statement, fast._statement(lock, claims=False)
    yield "claim what fell out", claims.claim_these_statement, events._claim_these
    yield "claim after a failure", claims.claim_statement, events._claim
    yield "choose an event to process alone", claims.isolate_statement, events._isolate_first
    yield "claim that event", claims.claim_isolated_statement, events._claim_isolated
    yield "lock the pairs", pairs.lock_statement, repository._lock
    yield "look", pairs.look_statement, repository._look
    yield "create purchases (guard index)", purchases._insert_statement, repository._insert(Guard.INDEX, "is_active")
    yield "create purchases (guard lock)", purchases._insert_statement, repository._insert(Guard.LOCK, "")
    yield "refund", purchases._revoke_statement, repository._revoke
    yield "find the next payment of a pair", pairs.standing_statement, repository._standing
    yield "mark", purchases._remark_statement, repository._mark
    yield "remove", outbox._remove_statement, events._remove
    yield "postpone", outbox._postpone_statement, events._postpone
    yield "write dead letters", outbox._bury_statement, events._bury
    yield "close dead letters", outbox._close_letters_statement, events._close_letters


def written(number: int, title: str, builder: Builder, statement: Statement) -> str:
    """Return one statement with its number, its title and its header."""
    header = inspect.cleandoc(builder.__doc__ or "").split("\n\n")[0].splitlines()
    return "\n".join([f"-- {number}. {title}", *(f"-- {line}" for line in header), *_lines(str(statement)), ""])


def _lines(sql: str) -> Iterator[str]:
    """Break the SQL into lines, and write its parameters as psql writes variables."""
    named = re.sub(r"%\((\w+)\)s", r":\1", sql).replace("%%", "%")
    parts = [line.strip() for line in f"{named};".splitlines()]
    for part in re.sub(r" (AND|FROM|WHERE|ORDER BY|ON CONFLICT|RETURNING) ", r"\n\1 ", "\n".join(parts)).splitlines():
        while len(part) > _WIDTH and " " in part[:_WIDTH]:
            head, _, rest = part[:_WIDTH].rpartition(" ")
            yield head
            part = f"    {rest}{part[_WIDTH:]}"  # noqa: PLW2901 - what is left of the line
        yield part


if __name__ == "__main__":
    PAGE.write_text(page())
