"""deploy/grants.sql with names that need quotes, and with the option for the reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url

from tests.support import servers
from tests.support.premises import Premises, opened

READ = """id, "userId", course_id, amount, currency, status, created_at"""


@pytest.fixture
def empty(server: servers.Server) -> Iterator[Premises]:
    with opened(server) as made:
        yield made


@pytest.fixture
def odd(empty: Premises) -> Iterator[Premises]:
    """Make roles whose names need quotes."""
    made = replace(empty, names={role: f'{role.title()} of "{uuid4().hex[:8]}".x' for role in empty.names})
    yield made
    made.execute(f"DROP DATABASE {make_url(made.url).database} WITH (FORCE)", _of_postgres(made))
    for name in reversed([*made.names.values()]):
        made.execute(f"DROP ROLE IF EXISTS {quoted(name)}", _of_postgres(made))


def _of_postgres(made: Premises) -> str:
    return make_url(made.url).set(database="postgres").render_as_string(hide_password=False)


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def may(made: Premises, role: str, table: str, privilege: str) -> bool:
    with psycopg.connect(servers.libpq(made.url)) as connection:
        asked = "SELECT has_any_column_privilege(%s, %s, %s)"
        row = connection.execute(asked, [made.names[role], table, privilege]).fetchone()
    return bool(row and row[0])


@pytest.mark.parametrize("write", [str, quoted])
def test_names_that_need_quotes(odd: Premises, write: type[str]) -> None:
    for statement in (
        'CREATE SCHEMA "My.Shop"',
        'CREATE SCHEMA "Sp ace""q"',
        'CREATE TABLE "My.Shop"."Pay ""ment" (id uuid, "userId" int, course_id int, amount numeric, currency text,'
        " status text, created_at timestamptz, card text)",
        'CREATE TABLE "Sp ace""q"."Purchases" (id serial, is_active bool, deactivated_at timestamptz)',
        "CREATE TABLE public.marks (outcome text, payment_id uuid, recovered_at timestamptz)",
    ):
        odd.execute(statement)
    names = {role: write(name) for role, name in odd.names.items()}
    for _ in range(2):
        said = odd.grant(
            **names,
            schema=write('Sp ace"q'),
            payments='"My.Shop"."Pay ""ment"',
            payments_read=READ,
            purchases='"Purchases"' if write is quoted else "Purchases",
            processed_events="Public.Marks",
        )
        assert said.count("absent") == 5
    payments, purchases = '"My.Shop"."Pay ""ment"', '"Sp ace""q"."Purchases"'
    assert may(odd, "reader", payments, "SELECT")
    assert not may(odd, "reader", purchases, "INSERT")
    assert may(odd, "worker", purchases, "INSERT")
    assert may(odd, "operator", "public.marks", "UPDATE")
    with psycopg.connect(servers.libpq(odd.url)) as connection:
        row = connection.execute(
            "SELECT has_column_privilege(%s, %s, 'card', 'SELECT'), has_sequence_privilege(%s, %s, 'USAGE')",
            [odd.names["worker"], payments, odd.names["worker"], '"Sp ace""q"."Purchases_id_seq"'],
        ).fetchone()
    assert row == (False, True)


def test_the_reader_sees_other_sessions_only_if_asked_for(empty: Premises) -> None:
    def sees_all() -> bool:
        with psycopg.connect(servers.libpq(empty.url)) as connection:
            asked = "SELECT pg_has_role(%s, 'pg_read_all_stats', 'USAGE')"
            row = connection.execute(asked, [empty.names["reader"]]).fetchone()
        return bool(row and row[0])

    empty.grant()
    assert not sees_all()
    empty.grant(pg_read_all_stats="no")
    assert not sees_all()
    empty.grant(pg_read_all_stats="yes")
    assert sees_all()
