"""New purchases get ids that grow with time, but only in a table that the worker made."""

from __future__ import annotations

import importlib.util
import time
from types import ModuleType
from uuid import UUID

import pytest
from alembic import command

from tests.support import ROOT
from tests.support.installations import SHOPS_PURCHASES, Installation

DEFAULT = """
    SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef JOIN pg_attribute ON (attrelid, attnum) = (adrelid, adnum)
    WHERE attrelid = 'purchases'::regclass AND attname = 'id'
"""
BUY = """
    INSERT INTO purchases (student_id, course_id, amount, currency)
    VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'EUR') RETURNING id
"""


def default(site: Installation) -> str:
    ((found,),) = site.execute(DEFAULT)
    return str(found)


def revision() -> ModuleType:
    path = ROOT / "alembic/versions/core_0007_expand_ordered_ids.py"
    spec = importlib.util.spec_from_file_location("core_0007", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["as migrated", "before PostgreSQL 18"])
def test_ids_of_new_purchases_grow_with_time(migrated: Installation, form: str) -> None:
    if form != "as migrated":
        migrated.execute(f"ALTER TABLE purchases ALTER id SET DEFAULT {revision().BEFORE_18}")
    found: list[UUID] = []
    for _ in range(5):
        ((key,),) = migrated.execute(BUY)
        found.append(key)
        time.sleep(0.002)
    assert found == sorted(found)
    assert {(key.version, key.variant) for key in found} == {(7, "specified in RFC 4122")}
    assert all(abs((key.int >> 80) / 1000 - time.time()) < 60 for key in found), "the first 48 bits are the time"
    assert len({key.int & (2**62 - 1) for key in found}) == 5, "the last 62 bits are random"


def test_a_default_that_somebody_changed_stays(empty: Installation) -> None:
    empty.alembic(command.upgrade, "core_0006")
    assert default(empty) == "gen_random_uuid()"
    empty.execute("CREATE FUNCTION own_id() RETURNS uuid LANGUAGE sql AS 'SELECT gen_random_uuid()'")
    empty.execute("ALTER TABLE purchases ALTER id SET DEFAULT own_id()")
    empty.migrate()
    assert default(empty) == "own_id()"


def test_an_adopted_table_keeps_its_default(empty: Installation) -> None:
    empty.execute(SHOPS_PURCHASES)
    empty.migrate()
    assert default(empty) == "gen_random_uuid()"


def test_the_way_down_keeps_the_default(migrated: Installation) -> None:
    before = default(migrated)
    assert before != "gen_random_uuid()"
    migrated.alembic(command.downgrade, "core_0006")
    migrated.migrate()
    assert default(migrated) == before
