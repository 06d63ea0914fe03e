"""A worker tests whether notifications reach it. If they do not, its pauses stay short."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
from sqlalchemy import make_url

from outbox_worker.daemon.bell import Bell
from outbox_worker.daemon.listener import Listener
from outbox_worker.database.engine import Database
from outbox_worker.schema.tables import Tables
from outbox_worker.settings import Settings, load_settings
from tests.support.factories import Shop
from tests.support.processes import eventually

PID = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%%' AND application_name = 'outbox-worker'"


@contextmanager
def listening(database: Database, tables: Tables, settings: Settings) -> Iterator[tuple[Bell, Mock]]:
    bell, stop, trouble = Bell(), threading.Event(), Mock()
    listener = Listener(settings, database, tables, bell, stop, trouble)
    listener.start()
    try:
        yield bell, trouble
    finally:
        stop.set()
        bell.silence()
        listener.join(20)
        assert not listener.is_alive()


def test_notifications_of_the_own_database_are_heard(
    shop: Shop, database: Database, tables: Tables, settings: Settings
) -> None:
    with listening(database, tables, settings) as (bell, _):
        assert bell.wait(20), "the bell rings once at the connect"
        assert bell.is_heard
        shop.rows(f"NOTIFY outbox_worker, '{tables.outbox}'")
        assert bell.wait(20)
        shop.rows("NOTIFY outbox_worker, 'another table'")
        assert not bell.wait(0.1)


def test_a_loss_of_the_connection_is_met_by_the_loop_that_sleeps(
    shop: Shop, database: Database, tables: Tables, settings: Settings
) -> None:
    with listening(database, tables, settings) as (bell, trouble):
        assert bell.wait(20)
        for pid in eventually(lambda: shop.rows(PID), "a connection listens"):
            shop.rows("SELECT pg_terminate_backend(%s)", pid.pid)
        assert bell.wait(20), "the loop looks for itself"
        assert not bell.is_heard
        eventually(lambda: trouble.called, "the loss is told")
        assert bell.wait(20)
        assert bell.is_heard, "and is over after the next connect"


def test_a_connection_to_another_database_hears_nothing_and_is_not_relied_on(
    database: Database, tables: Tables, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox_worker.daemon.listener._PATIENCE_SECONDS", 0.2)
    elsewhere = make_url(database_url).set(database="postgres").render_as_string(hide_password=False)
    settings = load_settings(database_url=database_url, listen_database_url=elsewhere)
    with listening(database, tables, settings) as (bell, _):
        assert bell.wait(20)
        assert not bell.is_heard
