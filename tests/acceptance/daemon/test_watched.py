"""What a service manager learns: the worker is up, each loop lives, the worker stops or reloads."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox_worker.embedded import server as embedded
from tests.support.factories import Shop
from tests.support.processes import Given, Process, eventually, finish, start, start_script
from tests.support.sites import ROLE, Site
from tests.support.watchers import WEDGED, Manager, address_of, eventually_answers, managed

NOWHERE = "postgresql://nobody@127.0.0.1:1/nowhere"
RESTS: Given = {"poll_min_seconds": 60, "poll_max_seconds": 60}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with managed(str(tmp_path / "notify")) as made:
        yield made


def test_ready_when_the_loops_run_and_stopping_when_told_to(database_url: str, shop: Shop, manager: Manager) -> None:
    shop.paid()
    with start("run", url=database_url, **manager.settings(60)) as process:
        manager.wait_for_ready()
        process.wait_for("worker_started")
        assert process.told("watchdog_short") == []
        manager.wait_for(lambda told: told.get("STATUS", "").startswith("due: 0;"), "what is due")
        process.end_well()
    assert manager.all("READY") == ["1"]
    assert manager.all("STOPPING") == ["1"]


def test_what_cannot_work_never_is_ready(database_url: str, shop: Shop, manager: Manager) -> None:
    """The start fails, and ``systemctl start`` reports it."""
    shop.rows("DROP TABLE dead_letters")
    assert finish("run", url=database_url, **manager.settings(60)).code == 78
    assert finish("run", url=database_url, batch_size=0, **manager.settings(60)).code == 78
    assert manager.all("READY") == []


def test_an_abstract_socket(database_url: str, tmp_path: Path) -> None:
    address = f"@outbox-worker-{tmp_path.name}-{time.monotonic_ns()}"
    with managed(address) as manager, start("run", url=database_url, **manager.settings(60)) as process:
        manager.wait_for_ready()
        process.end_well()


def test_a_daemon_that_waits_for_its_database_is_ready_and_alive(manager: Manager) -> None:
    with start("run", url=NOWHERE, database_deadline_seconds=1, **manager.settings(6)) as process:
        assert "without database" in manager.wait_for_ready()["STATUS"]
        manager.wait_for_feeds(5)
        process.end_well()
    assert manager.all("STOPPING") == ["1"]


def test_an_outage_longer_than_the_watchdog_starves_nobody(site: Site, manager: Manager) -> None:
    interval = 6.0
    settings: Given = {"concurrency": 2, "database_deadline_seconds": 1, "http_listen": "127.0.0.1:0"}
    with start("run", url=site.url(ROLE), **settings, **manager.settings(interval)) as process:
        process.wait_for("worker_started")
        embedded.stop_server(site.directory)
        process.wait_for("paused", failure="reconnect")
        gone = time.monotonic()
        address = address_of(process)
        eventually_answers(address, "/readyz", 503, "without database")
        eventually(lambda: time.monotonic() - gone > 2 * interval, "an outage of two intervals")
        feeds = [gone, *manager.feeds_since(gone), time.monotonic()]
        assert max(later - earlier for earlier, later in itertools.pairwise(feeds)) < interval
        eventually_answers(address, "/livez", 200)
        assert any("without database" in status for status in manager.all("STATUS"))
        site.start()
        eventually_answers(address, "/readyz", 200)
        process.end_well()


def test_a_rest_longer_than_the_watchdog_starves_nobody(database_url: str, manager: Manager) -> None:
    with start("run", url=database_url, **RESTS, **manager.settings(3)) as process:
        manager.wait_for(lambda told: "due: 0" in told.get("STATUS", ""), "all rest")
        manager.wait_for_feeds(4)
        process.end_well()


def test_one_wedged_loop_of_two_starves_the_watchdog_and_is_named(
    database_url: str, shop: Shop, manager: Manager, tmp_path: Path
) -> None:
    """The other loop works on. The watchdog gets no sign of life for the wedged loop."""
    flag, interval = tmp_path / "wedge", 8.0
    settings: Given = {"concurrency": 2, "database_deadline_seconds": 1, "http_listen": f"unix:{tmp_path}/http"}
    with start_script(WEDGED, str(flag), "run", url=database_url, **settings, **manager.settings(interval)) as process:
        process.wait_for("worker_started")
        manager.wait_for_feeds(3)
        flag.touch()
        address = address_of(process)
        assert "no step has ended" in eventually_answers(address, "/livez", 503).body
        checked = finish("healthcheck", **settings)
        assert (checked.code, checked.stdout[:10]) == (1, "claim loop")
        last = manager.feeds_since(0)[-1]
        _, event = shop.paid()
        eventually(lambda: shop.outcome_of(event) == "created", "the other loop works on")
        eventually(lambda: time.monotonic() - last > interval, "the interval is over")
        assert manager.feeds_since(last) == []


def test_a_stopped_process_is_noticed(database_url: str, manager: Manager, tmp_path: Path) -> None:
    settings: Given = {"http_listen": f"unix:{tmp_path}/http"}
    with start("run", url=database_url, **settings, **manager.settings(2)) as process:
        process.wait_for("worker_started")
        address_of(process)
        manager.wait_for_feeds(2)
        assert finish("healthcheck", **settings).code == 0
        process.signal(signal.SIGSTOP)
        eventually(lambda: "T" in Path(f"/proc/{process.popen.pid}/stat").read_text().split()[2], "it is stopped")
        stopped = time.monotonic()
        assert finish("healthcheck", **settings).code == 69
        assert time.monotonic() - stopped > 2
        assert manager.feeds_since(stopped) == []
        process.signal(signal.SIGCONT)
        manager.wait_for_feeds(2)
        process.end_well()


def test_a_statement_that_waits_for_a_lock_again_and_again_is_no_wedge(
    database_url: str, shop: Shop, manager: Manager, connect: object
) -> None:
    """One call of the processor tries a dozen times. Each try ends within its deadline."""
    shop.paid()
    with start("run", url=database_url, database_deadline_seconds=2, **manager.settings(20)) as process:
        process.wait_for("worker_started")
        blocker = connect()  # type: ignore[operator]
        blocker.execute("LOCK TABLE processed_events, outbox")
        manager.wait_for_feeds(1)
        before = len(process.told("paused"))
        manager.wait_for_feeds(4)
        assert len(process.told("paused")) == before, "these feeds came from within one call"
        blocker.rollback()
        process.end_well()


# --- reload


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text('log_level = "INFO"\nbatch_size = 100\n')
    return path


def reload(process: Process, manager: Manager) -> None:
    """Ask for a reload, and wait until the manager knows that it is over."""
    had = len(manager.told)
    process.signal(signal.SIGHUP)
    begun = manager.wait_for(lambda told: told.get("RELOADING") == "1", "RELOADING=1", had)
    assert int(begun["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    manager.wait_for(lambda told: told.get("READY") == "1", "READY=1 again", had)


def test_a_reload_takes_log_level_and_limits(database_url: str, shop: Shop, manager: Manager, config: Path) -> None:
    with start("run", url=database_url, config=config, **manager.settings(60)) as process:
        manager.wait_for_ready()
        config.write_text('log_level = "DEBUG"\nbatch_size = 7\nconcurrency = 3\n')
        reload(process, manager)
        assert sorted(process.wait_for("reloaded")["changed"]) == ["batch_size", "log_level"]
        assert process.wait_for("restart_needed")["settings"] == ["concurrency"]
        shop.pay_many(1)
        eventually(lambda: shop.count("outbox") == 0, "a step that may have begun before the reload has ended")
        shop.pay_many(50)
        process.wait_for("batch_committed", claimed=7)
        eventually(lambda: shop.count("outbox") == 0, "all are settled")
        assert max(record["claimed"] for record in process.told("batch_committed")) == 7
        process.end_well()


def test_a_bad_file_is_told_in_one_sentence_and_changes_nothing(
    database_url: str, shop: Shop, manager: Manager, config: Path
) -> None:
    with start("run", url=database_url, config=config, **manager.settings(60)) as process:
        manager.wait_for_ready()
        config.write_text('log_level = "DEBUG"\nbatch_size = 0\npoll_max_seconds = "often"\n')
        reload(process, manager)
        refused = process.wait_for("reload_refused")
        assert refused["level"] == "ERROR"
        assert "batch_size" in refused["message"]
        assert "poll_max_seconds" in refused["message"]
        assert process.told("reloaded") == []
        shop.pay_many(50)
        eventually(lambda: shop.count("outbox") == 0, "all are settled")
        assert process.told("batch_committed") == [], "the level is what it was"
        config.unlink()
        reload(process, manager)
        process.end_well()


def test_a_reload_while_the_database_is_away(manager: Manager, config: Path) -> None:
    with start("run", url=NOWHERE, config=config, **manager.settings(60)) as process:
        manager.wait_for_ready()
        config.write_text("batch_size = 7\n")
        reload(process, manager)
        assert process.wait_for("reloaded")["changed"] == ["batch_size"]
        process.end_well()
