"""Which loops live, which are late, how a long rest is split, and what is sent to systemd."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from unittest.mock import Mock

import psycopg
import pytest

from outbox_worker.address import Listen, parse_listen
from outbox_worker.daemon.bell import Bell
from outbox_worker.daemon.claim_loop import ClaimLoop
from outbox_worker.daemon.liveness import FEED_SECONDS, STOPPING, Liveness
from outbox_worker.daemon.signals import Signals, make_signals
from outbox_worker.daemon.supervision import Pulse, reason
from outbox_worker.daemon.systemd import Notifier
from outbox_worker.settings import load_settings

LIMIT = 60.0


def serving(loops: int, now: float = 0.0) -> Liveness:
    made = Liveness(LIMIT)
    made.expect(loops, now)
    made.enter(None)
    return made


# --- liveness


def test_the_slowest_loop_counts() -> None:
    liveness = serving(3)
    for now in (10, 50, 90):
        liveness.returned(0, now)
        liveness.returned(2, now)
    assert liveness.why_not_alive(LIMIT) is None
    assert liveness.why_not_alive(91) == "claim loop 2: no step has ended for 91 s (limit 60 s)"
    liveness.returned(1, 91)
    assert liveness.why_not_alive(92) is None


def test_the_watchdog_is_fed_when_every_loop_has_returned_since_it_last_was() -> None:
    liveness = serving(2)
    assert [liveness.returned(0, now) for now in (1, 2, 3)] == [False] * 3
    assert liveness.returned(1, 4)
    assert not liveness.returned(1, 5)
    assert liveness.returned(0, 6)
    assert [liveness.returned(0, now) for now in range(7, 1000)] == [False] * 993, "one loop vouches for no other"


def test_the_watchdog_is_not_overfed() -> None:
    liveness = serving(1)
    assert liveness.returned(0, 1)
    assert not liveness.returned(0, 1 + FEED_SECONDS / 2)
    assert liveness.returned(0, 1 + FEED_SECONDS)


def test_why_nothing_is_settled() -> None:
    liveness = Liveness(LIMIT)
    assert (liveness.why_not_ready(0) or "").startswith("starting")
    liveness.expect(1, 0)
    liveness.told(0, "without database")
    assert liveness.why_not_ready(0) == "starting: without database"
    liveness.expect(2, 0)
    liveness.enter(None)
    assert liveness.why_not_ready(0) is None
    liveness.told(1, "paused: DiskFull")
    assert liveness.why_not_ready(0) == "paused: DiskFull"
    liveness.told(1, None)
    liveness.reached("without database")
    assert liveness.why_not_ready(0) == "without database"
    liveness.reached(None)
    assert liveness.why_not_ready(LIMIT + 1) == liveness.why_not_alive(LIMIT + 1) is not None
    liveness.enter(STOPPING)
    assert liveness.why_not_ready(0) == "stopping"
    assert liveness.why_not_alive(0) is None


# --- pulse


class Flag:
    """A flag that is set after some waits. It remembers the length of each wait."""

    def __init__(self, waits: int) -> None:
        self.waits, self.timeouts = waits, list[float]()

    def is_set(self) -> bool:
        return len(self.timeouts) > self.waits

    def wait(self, timeout: float) -> bool:
        self.timeouts.append(timeout)
        return self.is_set()


def test_a_long_pause_is_waited_in_parts_with_a_beat_after_each() -> None:
    liveness, feed, flag = serving(1), Mock(), Flag(waits=4)
    beats: list[float] = []

    def beat(loop: int, now: float) -> bool:
        assert loop == 0
        beats.append(now)
        return True

    liveness.returned = beat  # type: ignore[method-assign]
    assert Pulse(flag, liveness, 0, feed, slice_seconds=2.0).wait(3600)
    assert max(flag.timeouts) == 2.0
    assert len(beats) == feed.call_count == 4


def test_a_short_pause_ends_in_time() -> None:
    flag = Flag(waits=1000)
    assert not Pulse(flag, serving(1), 0, Mock(), slice_seconds=2.0).wait(0)
    assert flag.timeouts == [0.0]


def test_a_loop_without_database_beats_through_its_pauses() -> None:
    """The pauses grow to ten seconds. The interval of a watchdog can be shorter."""
    flag, feed = Flag(waits=200), Mock()
    processor = Mock(process_batch=Mock(side_effect=psycopg.OperationalError("gone")))
    pulse = Pulse(flag, serving(1), 0, feed, slice_seconds=0.01)
    assert ClaimLoop(processor, load_settings(), pulse, Mock(), threading.Event(), Bell()).run_once() is None
    assert len(flag.timeouts) > 200
    assert max(flag.timeouts) <= 0.01


def test_reasons_repeat_nothing_that_libpq_says() -> None:
    refused = psycopg.OperationalError('connection to "db.internal" failed: password "hunter2"')
    assert reason(refused) == "without database: no usable connection"
    assert reason(ValueError("hunter2")) == "paused: ValueError"


# --- systemd


def test_without_a_manager_nothing_is_sent_or_watched() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"})
    notifier.tell(READY=1)
    assert notifier.watchdog_seconds is None


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "90000000"}, 90.0),
        ({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": str(os.getpid())}, 90.0),
        ({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_of_this_process(variables: dict[str, str], seconds: float | None) -> None:
    environment = {"NOTIFY_SOCKET": "/nowhere", "PATH": "/bin"} | variables
    assert Notifier(environment).watchdog_seconds == seconds
    assert environment == {"PATH": "/bin"}, "a child of ours is not the service"


def test_one_datagram_of_lines(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        Notifier({"NOTIFY_SOCKET": path}).tell(READY=1, STATUS="one\nREADY=0")
        assert manager.recv(4096) == b"READY=1\nSTATUS=one READY=0"


def test_a_manager_that_is_gone_hinders_nothing(tmp_path: Path) -> None:
    for address in (str(tmp_path / "gone"), "@gone", "x" * 200, "vsock:2:1"):
        Notifier({"NOTIFY_SOCKET": address}).tell(READY=1)


# --- signals


def test_a_reload_stops_nothing() -> None:
    with Signals(reload=signal.SIGHUP) as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.wait(0)
        assert [signals.take_reload(), signals.take_reload()] == [True, False]
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.wait(0)


@pytest.mark.parametrize("on_terminal", [True, False])
def test_on_a_terminal_hanging_up_stops(on_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Mock(isatty=lambda: on_terminal))
    with make_signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.wait(0) == on_terminal
        assert signals.take_reload() != on_terminal


# --- addresses


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("off", None),
        ("127.0.0.1:9464", Listen("127.0.0.1", 9464)),
        ("localhost:0", Listen("localhost", 0)),
        ("[::1]:80", Listen("::1", 80)),
        ("unix:/run/http.sock", Listen(path="/run/http.sock")),
    ],
)
def test_where_http_listens(text: str, listen: Listen | None) -> None:
    assert parse_listen(text) == listen
    assert listen is None or str(listen) == text


@pytest.mark.parametrize(
    "text", ["", "9464", ":9464", "localhost", "localhost:", "::1:80", "a:70000", "unix:", "unix:x"]
)
def test_what_is_no_place_to_listen(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected HOST:PORT|needs an absolute path"):
        parse_listen(text)
