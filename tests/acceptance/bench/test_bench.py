"""The benchmark measures in a database of its own, changes no other, and leaves nothing behind."""

from __future__ import annotations

import psycopg

from outbox_worker.bench.run import DATABASE
from tests.support import servers
from tests.support.processes import PATIENCE, finish

SMALL = ("bench", "--events", "1000", "--rounds", "2", "--no-latency")


def test_it_refuses_somebodys_database_and_measures_in_its_own(server: servers.Server) -> None:
    """Both cases are one test, because the name of the benchmark's database is fixed."""
    nowhere = finish(*SMALL, url="postgresql://nobody@127.0.0.1:1/nowhere")
    assert (nowhere.code, "No connection" in nowhere.stderr) == (69, True)
    own = servers.libpq(servers.with_database(server.url, DATABASE))
    with psycopg.connect(servers.libpq(server.url), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {DATABASE}")
        try:
            with psycopg.connect(own, autocommit=True) as theirs:
                theirs.execute("CREATE TABLE customers AS SELECT 1 AS n")
            refused = finish(*SMALL, url=server.url)
            assert refused.code == 1
            assert "has tables that the benchmark did not create: public.customers" in refused.stderr
            with psycopg.connect(own, autocommit=True) as theirs:
                assert theirs.execute("SELECT n FROM customers").fetchall() == [(1,)]
        finally:
            connection.execute(f"DROP DATABASE {DATABASE}")
        found = finish(*SMALL, "--json", url=server.url, patience=4 * PATIENCE).object
        assert connection.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone() is None
    assert found["contestants"].keys() == {"worker", "worker, mixed load", "bare SQL", "one by one"}
    assert found["contestants"]["bare SQL"]["ratio_to_bare"] == 1
    for each in found["contestants"].values():
        assert each["events_per_second"] > 0
        assert each["ratio_to_bare"] > 0
        assert each["wal_bytes_per_event"] > 100
    assert found["contestants"]["worker"]["client_cpu_seconds_per_10k"] is not None
    assert found["plan"]["events"] == 1000
    assert 2 <= found["statements_per_batch"] < 3, "two, and now and then an empty look behind the mark"
    assert found["start_up_ratio"] > 0
