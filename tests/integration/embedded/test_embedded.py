"""The embedded PostgreSQL with real processes and real kills. No test sleeps for a fixed time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from outbox_worker.embedded import launcher as _embedded_launcher
from outbox_worker.embedded import server as embedded
from outbox_worker.embedded.server import ensure_server, find_binaries, stop_server
from outbox_worker.errors import EmbeddedServerError, SettingError
from tests.support import ROOT

NOBODY = 65534
OWNER = """
import sys, pathlib
from outbox_worker.embedded.server import ensure_server
directory, binaries = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
sys.stdin.readline()
print(ensure_server(directory, durable=False, bin_dir=binaries)["host"], flush=True)
sys.stdin.readline()
"""

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells of a parent's death")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


def until(condition: Callable[[], bool], what: str, seconds: float = 15) -> None:
    """Poll until the condition holds, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """A zombie does not live. The first process of a container does not always reap it."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def parent_of(pid: int) -> int:
    return int(subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout)


def postmaster(directory: Path) -> int:
    return int((directory / "data" / "postmaster.pid").read_text().split()[0])


def lock_is_free(directory: Path) -> bool:
    with (directory / "lock").open("r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def all_gone(directory: Path, *pids: int) -> Callable[[], bool]:
    return lambda: lock_is_free(directory) and not any(map(alive, pids))


def run_sql(connection: dict[str, str], statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(**connection, autocommit=True) as session:  # type: ignore[arg-type]
        cursor = session.execute(statement)
        return cursor.fetchall() if cursor.description else []


def starts(directory: Path) -> int:
    return (directory / "log").read_text().count("starting PostgreSQL")


def refused(directory: Path, bin_dir: Path | None = None) -> str:
    with pytest.raises(EmbeddedServerError) as caught:
        ensure_server(directory, durable=False, bin_dir=bin_dir)
    return str(caught.value)


class Owner(contextlib.AbstractContextManager["Owner"]):
    """Another process that calls ensure_server on request, and ends on request."""

    def __init__(
        self, directory: Path, *, python: tuple[str, ...] = (sys.executable,), user: int | None = None
    ) -> None:
        self.process = subprocess.Popen(
            [*python, "-c", OWNER, str(directory), str(find_binaries())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])},
        )

    def ask(self) -> Owner:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self

    def host(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def start(self) -> Owner:
        assert self.ask().host(), self.last_words()
        return self

    def last_words(self) -> str:
        return self.process.communicate()[1]

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Return a directory that does not exist yet. Its server is stopped at the end."""
    path = tmp_path / "pg"
    yield path
    stop_server(path)


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """Return a directory that every user can reach. Other users cannot reach ``tmp_path``."""
    path = Path(tempfile.mkdtemp()).resolve()
    path.chmod(0o755)
    yield path / "pg"
    stop_server(path / "pg")
    shutil.rmtree(path)


def test_data_outlives_the_server(directory: Path) -> None:
    connection = ensure_server(directory)
    assert run_sql(connection, "SELECT current_setting('fsync'), current_setting('synchronous_commit')") == [
        ("on", "on")
    ]
    run_sql(connection, "CREATE TABLE kept AS SELECT 7 AS n")

    stop_server(directory)
    with pytest.raises(psycopg.OperationalError):
        run_sql(connection, "SELECT 1")

    assert run_sql(ensure_server(directory), "SELECT n FROM kept") == [(7,)]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_running_server_is_used_and_private(directory: Path) -> None:
    first = ensure_server(directory, durable=False)
    pid = postmaster(directory)

    assert ensure_server(directory) == first
    assert postmaster(directory) == pid
    assert first == {"host": str(directory / "socket"), "port": "5432", "user": "postgres", "dbname": "postgres"}
    assert stat.S_IMODE((directory / "socket").stat().st_mode) == 0o700
    shown = "current_setting('listen_addresses'), current_setting('fsync'), current_setting('server_encoding')"
    assert run_sql(first, f"SELECT {shown}") == [("", "off", "UTF8")]


def test_a_terminals_interrupt_does_not_reach_it(directory: Path) -> None:
    ensure_server(directory, durable=False)
    assert os.getsid(postmaster(directory)) == parent_of(postmaster(directory)) != os.getsid(0)


def test_killing_the_owner_ends_server_and_launcher(directory: Path) -> None:
    with Owner(directory).start() as owner:
        pid = postmaster(directory)
        launcher = parent_of(pid)
        owner.process.kill()
        until(all_gone(directory, pid, launcher), "server and launcher are gone")
    assert "received fast shutdown request" in (directory / "log").read_text()


def test_an_owner_that_exits_waits_for_the_stop(directory: Path) -> None:
    """A stopped backend delays the shutdown of the server.

    An owner that did not wait would end before the server.
    """
    with Owner(directory).start() as owner, psycopg.connect(**ensure_server(directory)) as session:  # type: ignore[arg-type]
        pid = postmaster(directory)
        os.kill(session.info.backend_pid, signal.SIGSTOP)
        owner.ask()
        with pytest.raises(subprocess.TimeoutExpired):
            owner.process.wait(timeout=1)
        os.kill(session.info.backend_pid, signal.SIGCONT)
        assert owner.last_words() == ""
        assert owner.process.returncode == 0
        assert all_gone(directory, pid)()


@linux_only
def test_killing_the_launcher_ends_the_server(directory: Path) -> None:
    ensure_server(directory, durable=False)
    pid = postmaster(directory)
    os.kill(parent_of(pid), signal.SIGKILL)
    until(all_gone(directory, pid), "the server is gone")
    assert run_sql(ensure_server(directory, durable=False), "SELECT 1") == [(1,)]


def test_killing_the_postmaster_loses_nothing_committed(directory: Path) -> None:
    run_sql(ensure_server(directory), "CREATE TABLE kept AS SELECT 7 AS n")
    pid = postmaster(directory)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "the postmaster is gone")
    assert run_sql(ensure_server(directory), "SELECT n FROM kept") == [(7,)]


def test_a_server_that_is_stopping_is_waited_for(directory: Path) -> None:
    """The last backend still holds the lock of the server.

    The test stops a backend, and the backend outlives its postmaster.
    """
    connection = ensure_server(directory, durable=False)
    with psycopg.connect(**connection) as session:  # type: ignore[arg-type]
        backend, pid = session.info.backend_pid, postmaster(directory)
        launcher = parent_of(pid)
        os.kill(backend, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid) and not alive(launcher), "postmaster and launcher are gone")
        with ThreadPoolExecutor() as pool:
            assert not lock_is_free(directory)
            again = pool.submit(ensure_server, directory, durable=False)
            os.kill(backend, signal.SIGKILL)
            assert run_sql(again.result(), "SELECT 1") == [(1,)]
    assert "FATAL" not in (directory / "log").read_text()


def test_processes_that_start_at_once_share_one_server(directory: Path) -> None:
    with contextlib.ExitStack() as stack:
        owners = [stack.enter_context(Owner(directory)) for _ in range(3)]
        for owner in owners:
            owner.ask()
        assert [owner.host() for owner in owners] == [str(directory / "socket")] * 3
        assert starts(directory) == 1
        assert run_sql(ensure_server(directory), "SELECT 1") == [(1,)]


def test_threads_that_start_at_once_share_one_server(directory: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ensure_server(directory, durable=False), range(8)))
    assert found == [found[0]] * 8
    assert starts(directory) == 1


def test_the_server_outlives_the_thread_that_started_it(directory: Path) -> None:
    thread = threading.Thread(target=ensure_server, args=(directory,), kwargs={"durable": False})
    thread.start()
    thread.join()
    pid = postmaster(directory)
    assert run_sql(ensure_server(directory, durable=False), "SELECT pg_sleep(0.3)")
    assert postmaster(directory) == pid
    assert starts(directory) == 1


def test_a_user_of_the_server_restarts_it_after_its_owner(directory: Path) -> None:
    with Owner(directory).start() as owner:
        connection = ensure_server(directory, durable=False)
        run_sql(connection, "CREATE TABLE kept AS SELECT 7 AS n")
        with psycopg.connect(**connection) as session:  # type: ignore[arg-type]
            owner.process.kill()
            with pytest.raises(psycopg.OperationalError):
                session.execute("SELECT pg_sleep(15)")
    until(lambda: lock_is_free(directory), "the server is gone")
    assert run_sql(ensure_server(directory, durable=False), "SELECT n FROM kept") == [(7,)]


@pytest.mark.parametrize("name", ["x" * 100, "a,b 'c\" ü"])
def test_a_path_that_libpq_cannot_name(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    connection = ensure_server(directory, durable=False)
    outside = Path(connection["host"])
    assert run_sql(connection, "SELECT 1") == [(1,)]
    assert ensure_server(directory) == connection
    assert tmp_path not in outside.parents
    assert stat.S_IMODE(outside.stat().st_mode) == 0o700
    stop_server(directory)
    until(lambda: not outside.exists(), "the socket's directory is gone")


def test_a_socket_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    outside = embedded._socket_directory(directory)
    outside.mkdir(mode=0o755)
    try:
        assert "is not a private directory" in refused(directory)
    finally:
        outside.rmdir()


def test_a_stale_pid_file_with_a_foreign_process(directory: Path) -> None:
    ensure_server(directory, durable=False)
    pid_file = directory / "data" / "postmaster.pid"
    stale = pid_file.read_text()
    stop_server(directory)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as foreigner:
        pid_file.write_text(stale.replace(stale.split()[0], str(foreigner.pid), 1))
        assert run_sql(ensure_server(directory, durable=False), "SELECT 1") == [(1,)]
        assert foreigner.poll() is None


def test_a_copy_is_a_server_of_its_own(directory: Path, tmp_path: Path) -> None:
    ensure_server(directory, durable=False)
    stop_server(directory)
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    original = ensure_server(directory, durable=False)
    shutil.copy(directory / "data" / "postmaster.pid", copy / "data")
    try:
        assert ensure_server(copy, durable=False) != original
        assert postmaster(copy) != postmaster(directory)
    finally:
        stop_server(copy)


def test_directories_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "PG_VERSION").write_text("18\n")
    (tmp_path / "empty").mkdir()
    assert "cannot be used" in refused(tmp_path / "file")
    assert "cannot be used" in refused(tmp_path / "file" / "below")
    assert "name a new or an empty directory" in refused(tmp_path / "full")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to uid" in refused(tmp_path / "empty")
    stop_server(tmp_path / "empty")
    stop_server(tmp_path / "absent")


def test_programs_that_are_missing_or_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="OUTBOX_EMBEDDED_BIN_DIR"):
        ensure_server(tmp_path / "pg", durable=False, bin_dir=tmp_path / "bin")
    fake_programs(tmp_path / "bin", postgres="exit 3")
    assert "does not run here" in refused(tmp_path / "pg", tmp_path / "bin")
    fake_programs(tmp_path / "bin", postgres="echo 'postgres (PostgreSQL) 14.1'")
    assert "15 or newer" in refused(tmp_path / "pg", tmp_path / "bin")
    monkeypatch.setattr(embedded, "WHEELS", {"no_such_wheel": "bin"})
    monkeypatch.setattr(embedded, "SYSTEM", ())
    monkeypatch.setenv("PATH", "")
    assert "pip install 'purchase-outbox-worker[embedded]'" in refused(tmp_path / "pg")


def test_the_systems_newest_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("9.6", "15", "16"):
        fake_programs(tmp_path / version)
    monkeypatch.setattr(embedded, "WHEELS", {})
    monkeypatch.setattr(embedded, "SYSTEM", (f"{str(tmp_path).lstrip('/')}/*",))
    assert find_binaries() == tmp_path / "16"


def fake_programs(directory: Path, postgres: str = "echo 'postgres (PostgreSQL) 18.0'", initdb: str = "exit 1") -> None:
    directory.mkdir(exist_ok=True)
    for name, script in (("postgres", postgres), ("initdb", initdb)):
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)


def test_data_of_another_major_version(directory: Path) -> None:
    ensure_server(directory, durable=False)
    stop_server(directory)
    (directory / "data" / "PG_VERSION").write_text("9\n")
    assert "was created by PostgreSQL 9" in refused(directory)
    (directory / "data" / "PG_VERSION").unlink()
    assert "contains no PostgreSQL data" in refused(directory)


def test_a_failed_initdb_tells_why_and_leaves_nothing(directory: Path, tmp_path: Path) -> None:
    fake_programs(tmp_path / "bin", initdb="echo 'initdb: error: the disk is full'; echo 'initdb: removed'; exit 1")
    sentence = refused(directory, tmp_path / "bin")
    assert sentence.endswith("did not start: initdb failed: initdb: error: the disk is full")
    assert not (directory / "data").exists()
    assert run_sql(ensure_server(directory, durable=False), "SELECT 1") == [(1,)]


def test_a_server_that_cannot_start_tells_why(directory: Path) -> None:
    ensure_server(directory, durable=False)
    stop_server(directory)
    (directory / "data" / "postgresql.conf").write_text("max_connections = many\n")
    assert "FATAL" in refused(directory)


@linux_only
def test_an_initdb_killed_half_way_leaves_nothing_half_made(directory: Path, tmp_path: Path) -> None:
    note = tmp_path / "launcher"
    half = 'new="${1#--pgdata=}"; mkdir "$new"; echo 18 > "$new/PG_VERSION"'
    fake_programs(
        tmp_path / "bin", initdb=f'{half}; echo $PPID > "{note}.new"; mv "{note}.new" "{note}"; exec sleep 60'
    )
    with ThreadPoolExecutor() as pool:
        started = pool.submit(ensure_server, directory, durable=False, bin_dir=tmp_path / "bin")
        until(note.exists, "initdb is half-way")
        os.kill(int(note.read_text()), signal.SIGKILL)
        with pytest.raises(EmbeddedServerError):
            started.result()
    until(lambda: lock_is_free(directory), "initdb is gone")
    assert run_sql(ensure_server(directory, durable=False), "SELECT 1") == [(1,)]
    assert not (directory / "data.new").exists()


def test_a_large_log_is_begun_anew(directory: Path) -> None:
    ensure_server(directory, durable=False)
    stop_server(directory)
    os.truncate(directory / "log", _embedded_launcher.LOG_BYTES_MAX + 1)
    ensure_server(directory, durable=False)
    assert (directory / "log").stat().st_size < 10_000


@root_only
@linux_only
def test_as_root_nothing_changes_hands(directory: Path) -> None:
    if not _embedded_launcher.namespace_permitted():
        pytest.skip("this kernel or container permits no user namespace")
    ensure_server(directory, durable=False)
    assert {path.stat().st_uid for path in (directory, directory / "data", directory / "log")} == {0}


@root_only
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv, to take a capability away")
def test_as_root_without_a_namespace_it_runs_as_nobody(directory: Path, public_directory: Path) -> None:
    weaker = ("setpriv", "--bounding-set=-setfcap", sys.executable)
    with Owner(directory, python=weaker) as owner:
        assert "may not access" in owner.ask().last_words()
    assert directory.stat().st_uid == 0
    if not within_reach(str(find_binaries() / "postgres"), "--version"):
        pytest.skip("the PostgreSQL programs are where only root can get")
    with Owner(public_directory, python=weaker).start():
        assert public_directory.stat().st_uid == NOBODY
        pid = postmaster(public_directory)
        assert run_sql(ensure_server(public_directory), "SELECT 1") == [(1,)]
    until(all_gone(public_directory, pid), "the server is gone")
    ensure_server(public_directory, durable=False)
    assert (public_directory / "log").stat().st_uid == NOBODY


@root_only
def test_as_an_ordinary_user(public_directory: Path) -> None:
    python = next(filter(may_run_the_project, (sys.executable, "/usr/bin/python3")), None)
    if python is None:
        pytest.skip("no Python and PostgreSQL programs that an ordinary user can reach")
    os.chown(public_directory.parent, NOBODY, NOBODY)
    with Owner(public_directory, python=(python,), user=NOBODY).start() as owner:
        pid = postmaster(public_directory)
        assert run_sql(ensure_server(public_directory), "SELECT 1") == [(1,)]
        owner.process.kill()
        until(all_gone(public_directory, pid), "the server is gone")
    assert {path.stat().st_uid for path in public_directory.rglob("*")} == {NOBODY}


def may_run_the_project(python: str) -> bool:
    version = f"import sys; sys.path[:0] = {[str(ROOT), *sys.path]!r}; import outbox_worker.embedded.server"
    same = f"{version}; assert sys.version_info[:2] == {tuple(sys.version_info[:2])}"
    return within_reach(python, "-c", same) and within_reach(str(find_binaries() / "postgres"), "--version")


def within_reach(*command: str) -> bool:
    try:
        done = subprocess.run(
            command, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0
