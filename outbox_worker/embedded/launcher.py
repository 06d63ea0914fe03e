"""Runs as the parent process of one private PostgreSQL. ``server`` starts this script in a new session.

The owner is the process that started the server in order to use it. The standard input of this script is called the
lifeline. The lifeline is a pipe whose other end is open only in the owner. End-of-file therefore means that the owner
has ended, even if somebody killed the owner. PostgreSQL ends if this process ends.

The owner has locked a file in the directory. This process and PostgreSQL inherit this lock. The
lock becomes free when the last of these processes has ended. The script has one thread. ``server``
runs the script by its path with ``python -I -S``. Therefore the script can import only the standard
library.

Arguments: DIRECTORY BINARIES SOCKET_DIRECTORY LOCK_FD durable|volatile
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LIFELINE = 0
LOG_BYTES_MAX = 10 * 1024 * 1024
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
STOP_SIGNALS = ((signal.SIGINT, 30), (signal.SIGQUIT, 10), (signal.SIGKILL, 10))
"""The signals for a fast shutdown, an immediate shutdown and a kill.

The number after each signal is how many seconds to wait for the end of the server.
"""
VOLATILE = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
README = """A private PostgreSQL, managed by outbox-worker (OUTBOX_DATABASE_URL=embedded:<this directory>).
data/    the database: never edit, back up with pg_dump    socket/  the socket of the running server
log      messages of the server                            lock     locked while any process of the server runs
"""

libc = ctypes.CDLL(None, use_errno=True)


class Home(NamedTuple):
    """The paths and options of one server. ``lock`` is the inherited file descriptor of the lock."""

    directory: Path
    binaries: Path
    socket: Path
    lock: int
    durable: bool

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def log(self) -> Path:
        return self.directory / "log"


def main(arguments: list[str]) -> None:
    """Create missing files and run the server until it ends. The owner raises the exit message as an error."""
    directory, binaries, socket, lock, durability = arguments
    home = Home(Path(directory), Path(binaries), Path(socket), int(lock), durability == "durable")
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if os.geteuid() == 0:
        leave_root(home)
    require_reach(home.directory, home.binaries / "postgres")
    furnish(home)
    log_start = home.log.stat().st_size
    if not home.data.exists():
        initialise(home, log_start)
    status = hold(home)
    with contextlib.suppress(OSError):
        home.socket.rmdir()
    if status:
        sys.exit(telling_line(home.log, log_start))


def leave_root(home: Home) -> None:
    """Stop running as uid 0, because PostgreSQL refuses to run as root.

    If another account owns the directory, change to this account. If root owns the directory, enter a user namespace.
    In this namespace, the process can still access root's files, but has no other rights of root. If user
    namespaces are not permitted, become `nobody` and give the files to `nobody`.
    """
    status = home.directory.stat()
    if status.st_uid == 0 and namespace_permitted():
        enter_namespace()
        return
    uid, gid = (status.st_uid, status.st_gid) if status.st_uid else nobody()
    os.setgroups([])
    os.setegid(gid)
    os.seteuid(uid)
    require_reach(home.directory.parent, home.binaries / "postgres")
    os.seteuid(0)
    os.fchown(home.lock, uid, gid)
    if status.st_uid == 0:
        for path in (home.directory, *home.directory.rglob("*")):
            os.chown(path, uid, gid, follow_symlinks=False)
    os.setgid(gid)
    os.setuid(uid)


def namespace_permitted() -> bool:
    """Return whether this process may enter a user namespace. macOS has no user namespaces.

    A process that has entered a user namespace cannot leave it. Therefore only a child process
    tries to enter one.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            enter_namespace()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def enter_namespace() -> None:
    """Enter a user namespace in which this process has the uid and gid of `nobody`."""
    (uid, gid), group_outside = nobody(), os.getegid()
    if libc.unshare(CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/uid_map").write_text(f"{uid} 0 1", encoding="ascii")
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{gid} {group_outside} 1", encoding="ascii")


def nobody() -> tuple[int, int]:
    """Return uid and gid of the account `nobody`. initdb needs a uid that has an account name."""
    try:
        account = pwd.getpwnam("nobody")
    except KeyError:
        sys.exit("PostgreSQL refuses to run as root, and there is no user `nobody`: run as an ordinary user")
    return account.pw_uid, account.pw_gid


def require_reach(*paths: Path) -> None:
    """Exit with a message if the account that runs the server has no access to one of the paths."""
    for path in paths:
        if not os.access(path, os.X_OK, effective_ids=True):
            sys.exit(
                f"the server runs as uid {os.geteuid()} without the rights of root, and may not access {path}: "
                "move the directory and the PostgreSQL programs to where it may access them, or run as an ordinary user"
            )


def furnish(home: Home) -> None:
    """Create all files except the data, and remove the files that a killed initdb left behind.

    The removal is safe because no other initdb is running. This process holds the lock.
    """
    os.umask(0o077)
    (home.directory / "README").write_text(README, encoding="utf-8")
    home.socket.mkdir(exist_ok=True)
    status = home.socket.lstat()
    if not home.socket.is_dir() or home.socket.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        sys.exit(f"{home.socket} is not a private directory of uid {os.geteuid()}: remove it")
    if home.log.exists() and home.log.stat().st_size > LOG_BYTES_MAX:
        os.truncate(home.log, 0)
    home.log.touch()
    shutil.rmtree(home.directory / "data.new", ignore_errors=True)


def initialise(home: Home, log_start: int) -> None:
    """Create the data in ``data.new``, then rename it to ``data``. ``data`` is never incomplete."""
    new = home.directory / "data.new"
    locale = ("--encoding=UTF8", "--no-locale", "--username=postgres", "--auth=trust", "--no-instructions")
    sync = () if home.durable else ("--no-sync",)
    if spawn(home, "initdb", f"--pgdata={new}", *locale, *sync).wait() != 0:
        sys.exit(f"initdb failed: {telling_line(home.log, log_start)}")
    new.rename(home.data)
    descriptor = os.open(home.directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def hold(home: Home) -> int:
    """Run the server until it ends, and return its exit status.

    Stop the server early if the owner ends or a signal arrives.
    """
    wake, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    signal.set_wakeup_fd(wake_writer)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    server = spawn(home, "postgres", *server_arguments(home))
    while server.poll() is None:
        readable, _, _ = select.select([LIFELINE, wake], [], [])
        if LIFELINE in readable or set(os.read(wake, 64)) != {signal.SIGCHLD}:
            stop(server)
    return server.returncode


def note(_number: int, _frame: object) -> None:
    """Do nothing. Without a handler, Python would not write the number of the signal to the wake-up pipe."""


def stop(server: subprocess.Popen[bytes]) -> None:
    """Stop the server with a fast shutdown.

    If the shutdown takes too long, kill the server. No committed data is lost.
    """
    for number, patience_seconds in STOP_SIGNALS:
        server.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(patience_seconds)
            return


def server_arguments(home: Home) -> list[str]:
    """Return the options of the server.

    The only socket of the server is in a private directory. Other users cannot connect.
    """
    quoted = '"' + str(home.socket).replace('"', '""') + '"'
    settings = ["listen_addresses=", f"unix_socket_directories={quoted}", "unix_socket_permissions=0700", "port=5432"]
    if not home.durable:
        settings += VOLATILE
    return ["-D", str(home.data), *(word for setting in settings for word in ("-c", setting))]


def spawn(home: Home, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a PostgreSQL program.

    The program writes to the log, inherits the lock, and ends if this process ends.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    with home.log.open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own arguments, no shell
            [home.binaries / program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment | {"LC_ALL": "C"},
            pass_fds=[home.lock],
            preexec_fn=functools.partial(end_with, os.getpid()),  # noqa: PLW1509 - this process has one thread
        )


def end_with(parent: int) -> None:
    """Let the kernel send SIGINT (fast shutdown) when the parent dies. Exit if the parent has died already."""
    if sys.platform.startswith("linux"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # `&` of a shell makes programs ignore it
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def telling_line(log: Path, start: int) -> str:
    """Return the last line after byte `start` that reports an error.

    If no line reports an error, return the last line.
    """
    with log.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").strip().splitlines() or ["the log is empty"]
    telling = [line for line in lines if "FATAL:" in line or "PANIC:" in line or "error:" in line]
    return (telling or lines)[-1]


if __name__ == "__main__":
    main(sys.argv[1:])
