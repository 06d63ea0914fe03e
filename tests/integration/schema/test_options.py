"""The options ``unique_index`` and ``notify``: up and down in any order, and what blocks them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from uuid import uuid4

import psycopg
import pytest
from alembic import command

from outbox_worker.errors import Refused
from outbox_worker.model import Guard
from outbox_worker.schema.tables import NOTIFY_CHANNEL, NOTIFY_TRIGGER, PAIR_INDEX, PAIR_LOOKUP_INDEX
from tests.support import catalogue, servers
from tests.support.factories import Shop
from tests.support.installations import OWN, Installation

# --- unique_index


def test_the_unique_index_replaces_the_look_up_index_and_back(migrated: Installation) -> None:
    before = migrated.snapshot()
    assert PAIR_LOOKUP_INDEX in migrated.indexes()
    migrated.migrate("unique_index")
    assert migrated.indexes()[PAIR_INDEX] is True
    assert PAIR_LOOKUP_INDEX not in migrated.indexes()
    assert migrated.guard() is Guard.INDEX
    migrated.downgrade("unique_index")
    assert migrated.snapshot() == before
    assert migrated.guard() is Guard.LOCK


def test_duplicates_stop_the_unique_index_and_are_listed(migrated: Installation, stock: Shop) -> None:
    twice, thrice = uuid4(), uuid4()
    course = uuid4()
    for student, times in ((twice, 2), (thrice, 3)):
        for _ in range(times):
            stock.purchase(student=student, course=course)
        stock.purchase(student=student, course=course, active=False)
    once = stock.payment()
    stock.purchase(once)
    before = migrated.snapshot()
    with pytest.raises(Refused) as caught:
        migrated.migrate("unique_index")
    told = str(caught.value)
    assert f"student {twice}, course {course}: 2 active purchases" in told
    assert f"student {thrice}, course {course}: 3 active purchases" in told
    assert str(once.student_id) not in told
    assert "and more" not in told
    assert migrated.snapshot() == before


def test_many_duplicates_are_not_all_listed(migrated: Installation, stock: Shop) -> None:
    stock.rows(
        "INSERT INTO purchases (student_id, course_id, amount, currency)"
        " SELECT md5(CAST(i AS text))::uuid, md5('c')::uuid, 0, 'EUR'"
        " FROM generate_series(1, 21) i, generate_series(1, 2) n"
    )
    with pytest.raises(Refused) as caught:
        migrated.migrate("unique_index")
    assert str(caught.value).count("2 active purchases") == 20
    assert "and more" in str(caught.value)


def test_once_the_duplicates_are_gone_the_index_is_built(migrated: Installation, stock: Shop) -> None:
    gift = stock.payment()
    stock.purchase(gift)
    extra = stock.purchase(student=gift.student_id, course=gift.course_id)
    with pytest.raises(Refused):
        migrated.migrate("unique_index")
    stock.rows("UPDATE purchases SET is_active = false WHERE id = %s", extra)
    migrated.migrate("unique_index")
    assert migrated.guard() is Guard.INDEX


@pytest.fixture
def leftover(migrated: Installation, stock: Shop) -> Installation:
    """Make an INVALID index with the worker's name, as a failed build leaves it.

    The duplicates that made the build fail are gone.
    """
    pair = stock.payment()
    stock.purchase(pair)
    extra = stock.purchase(student=pair.student_id, course=pair.course_id)
    with pytest.raises(psycopg.errors.UniqueViolation):
        migrated.execute(
            f"CREATE UNIQUE INDEX CONCURRENTLY {PAIR_INDEX} ON purchases (student_id, course_id) WHERE is_active"
        )
    assert migrated.indexes()[PAIR_INDEX] is False
    stock.rows("UPDATE purchases SET is_active = false WHERE id = %s", extra)
    return migrated


def test_an_invalid_leftover_is_rebuilt(leftover: Installation) -> None:
    assert leftover.guard() is Guard.LOCK
    leftover.migrate("unique_index")
    assert leftover.indexes()[PAIR_INDEX] is True
    assert leftover.guard() is Guard.INDEX


@pytest.mark.parametrize("option", ["unique_index", "notify"])
def test_an_option_that_was_lost_since_is_put_up_again(migrated: Installation, option: str) -> None:
    """The version table says what was done, not what exists now."""
    assert (migrated.migrate(option).built, migrated.migrate(option).found) == ((option,), (option,))
    before = migrated.snapshot()
    lost = {"unique_index": f"DROP INDEX {PAIR_INDEX}", "notify": f"DROP TRIGGER {NOTIFY_TRIGGER} ON outbox"}
    migrated.execute(lost[option])
    assert migrated.migrate(option).built == (option,)
    assert migrated.snapshot() == before


def test_a_trigger_that_was_disabled_is_enabled_again(migrated: Installation) -> None:
    migrated.migrate("notify")
    before = migrated.snapshot()
    migrated.execute(f"ALTER TABLE outbox DISABLE TRIGGER {NOTIFY_TRIGGER}")
    assert migrated.migrate("notify").built == ("notify",)
    assert migrated.execute("SELECT tgenabled FROM pg_trigger WHERE tgname = %s", NOTIFY_TRIGGER) == [("O",)]
    assert migrated.snapshot() == before


def test_an_index_of_our_name_on_another_table_is_not_ours_either(migrated: Installation) -> None:
    migrated.execute(f"CREATE TABLE notes (id int); CREATE INDEX {PAIR_INDEX} ON notes (id)")
    before = migrated.snapshot()
    with pytest.raises(Refused, match=f"{PAIR_INDEX} already exists, but it is another index, on notes"):
        migrated.migrate("unique_index")
    assert migrated.snapshot() == before


def test_a_lost_index_that_duplicates_keep_from_coming_back_changes_nothing(
    migrated: Installation, stock: Shop
) -> None:
    migrated.migrate("unique_index")
    migrated.execute(f"DROP INDEX {PAIR_INDEX}")
    pair = stock.payment()
    stock.purchase(pair)
    stock.purchase(student=pair.student_id, course=pair.course_id)
    before = migrated.snapshot()["public.purchases"]
    for _ in range(2):
        with pytest.raises(Refused, match="more than one active purchase"):
            migrated.migrate("unique_index")
        assert migrated.snapshot()["public.purchases"] == before


def test_an_invalid_leftover_and_duplicates_change_nothing(leftover: Installation, stock: Shop) -> None:
    leftover.execute(f"DROP INDEX {PAIR_INDEX}")
    stock.rows("UPDATE purchases SET is_active = true")
    with pytest.raises(psycopg.errors.UniqueViolation):
        leftover.execute(
            f"CREATE UNIQUE INDEX CONCURRENTLY {PAIR_INDEX} ON purchases (student_id, course_id) WHERE is_active"
        )
    before = leftover.snapshot()
    with pytest.raises(Refused):
        leftover.migrate("unique_index")
    assert leftover.snapshot() == before


@pytest.mark.parametrize(
    ("columns", "predicate"),
    [
        ("student_id, course_id", "is_active"),
        ("student_id, course_id", "(is_active = true)"),
        ("student_id, course_id", "is_active IS TRUE"),
        ("course_id, student_id", "(is_active = true)"),
    ],
)
def test_an_index_of_another_form_is_recognised_and_not_made_twice(
    migrated: Installation, columns: str, predicate: str
) -> None:
    migrated.execute(f"CREATE UNIQUE INDEX the_seeds ON purchases ({columns}) WHERE {predicate}")
    migrated.migrate("unique_index")
    assert PAIR_INDEX not in migrated.indexes()
    assert migrated.indexes()["the_seeds"] is True
    assert migrated.guard() is Guard.INDEX
    migrated.downgrade("unique_index")
    assert migrated.indexes()["the_seeds"] is True


@pytest.mark.parametrize(
    "definition",
    [
        "UNIQUE INDEX other ON purchases (student_id, course_id) WHERE is_active AND amount > 0",
        "UNIQUE INDEX other ON purchases (student_id, course_id, currency) WHERE is_active",
        "UNIQUE INDEX other ON purchases (student_id, payment_id) WHERE is_active",
        "UNIQUE INDEX other ON purchases (student_id, (course_id::text)) WHERE is_active",
        "UNIQUE INDEX other ON purchases (student_id, course_id) WHERE NOT is_active",
        "UNIQUE INDEX other ON purchases (student_id, course_id)",
        "INDEX other ON purchases (student_id, course_id) WHERE is_active",
    ],
)
def test_an_index_that_is_no_guard_is_not_taken_for_one(migrated: Installation, definition: str) -> None:
    migrated.execute(f"CREATE {definition}")
    assert migrated.guard() is Guard.LOCK
    migrated.migrate("unique_index")
    assert migrated.indexes()[PAIR_INDEX] is True
    assert migrated.guard() is Guard.INDEX


# --- notify


def test_notify_tells_of_events_at_their_commit(migrated: Installation, stock: Shop) -> None:
    migrated.migrate("notify")
    with psycopg.connect(servers.libpq(migrated.url), autocommit=True) as listener:
        listener.execute(f"LISTEN {NOTIFY_CHANNEL}")
        stock.pay_many(3)
        told = list(listener.notifies(timeout=5, stop_after=1))
        assert [(note.channel, note.payload) for note in told] == [(NOTIFY_CHANNEL, "public.outbox")]
        migrated.downgrade("notify")
        stock.pay_many(3)
        assert list(listener.notifies(timeout=0.2)) == []  # one statement notifies once


# --- branches


def has_index(site: Installation) -> bool:
    return site.guard() is Guard.INDEX


def has_trigger(site: Installation) -> bool:
    return bool(catalogue.describe(site.connection, "outbox")["triggers"])


STATES = {"unique_index": has_index, "notify": has_trigger}

ORDERS = list(permutations(STATES))


@pytest.mark.parametrize("up", ORDERS, ids="-".join)
@pytest.mark.parametrize("down", ORDERS, ids="-".join)
def test_options_are_independent_in_each_order(
    migrated: Installation, up: tuple[str, ...], down: tuple[str, ...]
) -> None:
    before = migrated.snapshot()
    here: set[str] = set()
    for option in up:
        migrated.migrate(option)
        here.add(option)
        assert {name for name, holds in STATES.items() if holds(migrated)} == here
    for option in down:
        migrated.downgrade(option)
        here.remove(option)
        assert {name for name, holds in STATES.items() if holds(migrated)} == here
    assert migrated.snapshot() == before


@pytest.mark.parametrize("option", STATES)
def test_core_goes_down_before_an_option(make_site: Callable[[str | None], Installation], option: str) -> None:
    """A user who goes back does not have to know the order."""
    site = make_site(None)
    site.migrate(option)
    site.downgrade("core")
    site.downgrade(option)
    assert site.own_tables() == set()
    assert site.revisions() == set()


def test_all_heads_at_once(empty: Installation) -> None:
    """``alembic upgrade heads`` chooses the order of the branches."""
    empty.alembic(command.upgrade, "heads")
    assert empty.own_tables() == OWN
    assert empty.guard() is Guard.INDEX
    assert has_trigger(empty)
