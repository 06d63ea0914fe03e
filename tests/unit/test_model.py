"""The words of the model. The schema uses the same words."""

from __future__ import annotations

import pytest

from outbox_worker.model import COLUMNS, FINAL, GRANTS, MARKS_WITHOUT_PURCHASE, DeadLetterState, Outcome
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import load_settings


def test_the_schema_has_these_tables_and_columns_in_this_order() -> None:
    by_role = build_tables(load_settings()).by_role()
    assert {role: tuple(table.c.keys()) for role, table in by_role.items()} == dict(COLUMNS)


@pytest.mark.parametrize("role", COLUMNS)
def test_every_table_and_column_can_be_renamed(role: str) -> None:
    """Keys stay and names follow the settings. No default name is left."""
    columns = {f"{role}.{key}": f"{key}_x" for key in COLUMNS[role]}
    table = build_tables(load_settings(tables={role: f"other.{role}_x"}, columns=columns)).by_role()[role]
    assert (table.schema, table.name) == ("other", f"{role}_x")
    assert tuple(table.c.keys()) == COLUMNS[role]
    assert [column.name for column in table.c] == [f"{key}_x" for key in COLUMNS[role]]


def test_outcomes_are_a_closed_set() -> None:
    assert {*FINAL, Outcome.RETRIED, Outcome.DEAD} == set(Outcome)
    assert GRANTS <= FINAL
    assert MARKS_WITHOUT_PURCHASE <= FINAL
    assert not GRANTS & MARKS_WITHOUT_PURCHASE


def test_words_are_written_as_the_database_holds_them() -> None:
    assert [str(outcome) for outcome in Outcome] == [
        *("created", "recovered", "already_exists", "duplicate_payment", "suppressed", "revoked"),
        *("retried", "dead"),
    ]
    assert [str(state) for state in DeadLetterState] == ["open", "requeued", "discarded", "settled"]
