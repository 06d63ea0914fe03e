"""Run every block of code in the pages that people copy from, page by page.

Each page has a server of its own. Its blocks run in order, as in one terminal. A block sees what
earlier blocks exported. A comment directly above a block says what is special about the block:

    <!-- not run: REASON -->       it cannot be run here
    <!-- output of: COMMAND -->    it shows what a command printed (language `text`)
    <!-- in the background -->     it is started and goes on to the end of the page

Names in capitals (EVENT_ID, postgresql://OWNER:PASSWORD@HOST/DATABASE, ...) are replaced as a
reader would.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest

from outbox_worker.embedded import server as embedded
from outbox_worker.settings import load_settings
from tests.support import ROOT
from tests.support.factories import Shop
from tests.support.premises import find_psql
from tests.support.processes import command_for_shells, environment, eventually, finish

_HOW_TO = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/how-to/*.md"))
PAGES = ["README.md", "docs/runbook.md", "docs/contract.md", *_HOW_TO]
_BLOCK = re.compile(
    r"(?P<comment><!-- [^\n]* -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
_OUTPUT = re.compile(r"<!-- output of: (?:outbox-worker|make) \S.* -->")
_BACKGROUND = "<!-- in the background -->"
_URL = re.compile(r"postgresql://(\w+):PASSWORD@HOST/DATABASE")
PATIENCE = 180.0


class Block(NamedTuple):
    language: str
    text: str
    comment: str


def blocks_of(page: str) -> list[Block]:
    found = _BLOCK.finditer((ROOT / page).read_text())
    return [Block(each["language"], each["text"], (each["comment"] or "").strip()) for each in found]


def is_run(block: Block) -> bool:
    return block.language in RUNNERS and not _NOT_RUN.fullmatch(block.comment)


@dataclass
class Terminal:
    """The terminal of a reader, with a directory, an environment and a database."""

    directory: Path
    server: Path
    where: Mapping[str, str]
    """Where the server is, in libpq's keywords."""
    names: dict[str, str] = field(default_factory=dict)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0

    def url_of(self, role: str) -> str:
        user = self.where["user"] if role == "OWNER" else role
        return f"postgresql://{user}@/{self.where['dbname']}?host={self.where['host']}&port={self.where['port']}"

    def filled_in(self, text: str) -> str:
        text = _URL.sub(lambda found: f"'{self.url_of(found[1])}'", text)
        text = text.replace("-d DATABASE", f"-d '{self.url_of('OWNER')}'").replace("9464", str(self.port))
        for name, value in self.names.items():
            text = re.sub(rf"\b{name}\b", value, text)
        assert not re.search(r"\b(?:[A-Z]+_ID|PASSWORD|HOST|DATABASE)\b", re.sub(r"\w*DATABASE_URL\w*", "", text)), text
        return text

    def shell(self, text: str) -> None:
        exports = self.directory / "exports"
        script = f". {exports}\nset -eu\n{self.filled_in(text)}\nexport -p > {exports}\n"
        self.expect_fine(["/bin/sh", "-c", script])

    def sql(self, text: str) -> None:
        (self.directory / "block.sql").write_text(self.filled_in(text))
        self.expect_fine(["psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", self.url_of("OWNER"), "-f", "block.sql"])

    def python(self, text: str) -> None:
        self.expect_fine([sys.executable, "-c", self.filled_in(text)])

    def toml(self, text: str) -> None:
        """Write a file with the name in its first line.

        It must load, whether or not the block adds a URL.
        """
        named = re.match(r"# (\S+\.toml)\n", text)
        assert named is not None, "the first line names the file"
        path = self.directory / named[1]
        path.write_text(self.filled_in(text))
        load_settings(config=path)

    def start(self, text: str) -> None:
        """Start a worker and wait until it works."""
        log = self.directory / f"background{len(self.running)}"
        script = f". {self.directory / 'exports'}\nset -eu\nexec {self.filled_in(text)}"
        with log.open("wb") as output:
            started = subprocess.Popen(
                ["/bin/sh", "-c", script],
                cwd=self.directory,
                env=self.environment(),
                stderr=output,
                stdout=output,
                start_new_session=True,
            )
        self.running.append(started)
        eventually(
            lambda: b'"worker_started"' in log.read_bytes() or started.poll() is not None, f"starts: {text}", PATIENCE
        )
        assert started.poll() is None, log.read_text()

    def stop(self) -> None:
        for each in self.running:
            os.killpg(each.pid, signal.SIGTERM)
            each.wait(PATIENCE)
        self.running.clear()

    def expect_fine(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"

    def environment(self) -> dict[str, str]:
        path = f"{self.directory / 'bin'}{os.pathsep}{os.environ['PATH']}"
        sqlalchemy = self.url_of("OWNER").replace("postgresql:", "postgresql+psycopg:")
        return environment(None, {"http_listen": f"127.0.0.1:{self.port}", "DATABASE_URL": sqlalchemy, "PATH": path})


RUNNERS: Mapping[str, Callable[[Terminal, str], None]] = {
    "sh": Terminal.shell,
    "sql": Terminal.sql,
    "python": Terminal.python,
    "toml": Terminal.toml,
}


# --- what exists before a page begins, and what must be true after it


def migrated(terminal: Terminal) -> Shop:
    done = finish("migrate", "--with", "unique_index", url=terminal.url_of("OWNER"))
    assert done.code == 0, done
    return Shop(psycopg.connect(terminal.url_of("OWNER"), autocommit=True))


def nothing(_: Terminal) -> None:
    """The page begins with an empty database."""


def the_private_one(terminal: Terminal) -> None:
    """`make` uses an embedded server if no URL is set."""
    (terminal.directory / "exports").write_text(f"export OUTBOX_DATABASE_URL='embedded:{terminal.server}'\n")


def tables(terminal: Terminal) -> None:
    migrated(terminal).connection.close()


def tables_and_a_payment(terminal: Terminal) -> None:
    shop = migrated(terminal)
    paid, _ = shop.paid()
    terminal.names |= {"PAYMENT_ID": str(paid.id), "STUDENT_ID": str(paid.student_id)}
    shop.connection.close()


def tables_without_index(terminal: Terminal) -> None:
    shop = migrated(terminal)
    shop.rows("DROP INDEX purchases_active_student_course_key")
    shop.connection.close()


def payments_of_a_shop(terminal: Terminal) -> None:
    """Create payments with the names that the page on adoption uses."""
    with psycopg.connect(terminal.url_of("OWNER"), autocommit=True) as connection:
        connection.execute("CREATE SCHEMA billing")
        connection.execute(
            "CREATE TABLE billing.payment (id uuid PRIMARY KEY, user_id int NOT NULL, product_id int NOT NULL,"
            " amount numeric NOT NULL, currency text NOT NULL, status text NOT NULL,"
            " created_at timestamptz NOT NULL DEFAULT now())"
        )


def one_owed(terminal: Terminal) -> None:
    shop = migrated(terminal)
    shop.payment(ago="1 hour")
    shop.connection.close()


def dead_letters(terminal: Terminal) -> None:
    shop = migrated(terminal)
    terminal.names |= {
        "OTHER_EVENT_ID": str(shop.dead_letter(shop.payment(status="failed"), reason="payment_not_succeeded")),
        "EVENT_ID": str(shop.dead_letter(shop.payment(), reason="payment_mismatch")),
    }
    shop.connection.close()


def paid_twice_and_refunded(terminal: Terminal) -> None:
    """Write a pair that was paid twice, and a refund without an event."""
    shop = migrated(terminal)
    bought = shop.payment(ago="1 hour")
    shop.purchase(bought)
    shop.payment("succeeded", *bought.pair, ago="30 minutes")
    shop.purchase(shop.payment("refunded", ago="1 hour"))
    shop.connection.close()


BEFORE: Mapping[str, Callable[[Terminal], None]] = {
    "README.md": the_private_one,
    "docs/contract.md": tables_and_a_payment,
    "docs/how-to/adopt-a-database.md": payments_of_a_shop,
    "docs/how-to/backfill.md": one_owed,
    "docs/how-to/dead-letters.md": dead_letters,
    "docs/how-to/duplicates-and-refunds.md": paid_twice_and_refunded,
    "docs/how-to/find-out-why.md": tables_and_a_payment,
    "docs/how-to/monitor.md": tables,
    "docs/how-to/tune.md": tables,
    "docs/how-to/unique-index.md": tables_without_index,
    "docs/how-to/write-events.md": tables,
    "docs/runbook.md": tables,
}
AFTER: Mapping[str, str] = {
    "README.md": "SELECT count(*) = 1 FROM purchases",
    "docs/how-to/adopt-a-database.md": "SELECT to_regclass('purchases') IS NOT NULL"
    " AND to_regclass('payments') IS NULL",
    "docs/how-to/backfill.md": "SELECT count(*) = 1 FROM processed_events WHERE event_type = 'PURCHASE_BACKFILLED'",
    "docs/how-to/dead-letters.md": "SELECT array_agg(state ORDER BY state) = '{discarded,requeued}' FROM dead_letters",
    "docs/how-to/duplicates-and-refunds.md": "SELECT count(*) = 1 FROM processed_events WHERE outcome = 'revoked'",
    "docs/how-to/roles.md": "SELECT count(*) = 7 FROM pg_roles WHERE rolname ~ '^(outbox|shop)_'",
    "docs/how-to/unique-index.md": "SELECT count(*) = 2 FROM pg_index WHERE indrelid = 'purchases'::regclass"
    " AND indisunique AND indpred IS NOT NULL",
    "docs/how-to/write-events.md": "SELECT array_agg(event_type ORDER BY id) = '{PURCHASE_CONFIRMED,PURCHASE_REFUNDED}'"
    " FROM outbox",
}
"""What must be true of the database after a reader followed the page."""


# --- the tests


def test_the_pages_are_there() -> None:
    assert len(PAGES) >= 16
    assert set(BEFORE) | set(AFTER) <= set(PAGES)
    assert sum(is_run(block) for page in PAGES for block in blocks_of(page)) > 40


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    text = (ROOT / page).read_text()
    blocks = blocks_of(page)
    assert text.count("\n```") == 2 * len(blocks), "a block that is not found"
    for block in blocks:
        if block.language == "text":
            assert _OUTPUT.fullmatch(block.comment), f"which command printed it?\n{block.text}"
        elif block.comment == _BACKGROUND:
            assert block.language == "sh"
        else:
            assert is_run(block) or _NOT_RUN.fullmatch(block.comment), f"why is it not run?\n{block.text}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, blocks_of(page)))])
def test_the_blocks_of_a_page_do_what_they_say(page: str, terminal: Terminal) -> None:
    BEFORE.get(page, nothing)(terminal)
    for block in filter(is_run, blocks_of(page)):
        if block.comment == _BACKGROUND:
            terminal.start(block.text)
        else:
            RUNNERS[block.language](terminal, block.text)
    if page in AFTER:
        with psycopg.connect(terminal.url_of("OWNER")) as connection:
            assert connection.execute(AFTER[page].encode()).fetchone() == (True,)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (Block("sh", "outbox-worker status --jsn\n", ""), "No such option"),
        (Block("sql", "INSERT INTO outbox (event) VALUES (1);\n", ""), "does not exist"),
        (Block("python", "import outbox_wrker\n", ""), "No module named"),
    ],
)
def test_a_block_that_fails_is_found(block: Block, error: str, terminal: Terminal) -> None:
    with pytest.raises(AssertionError, match=error):
        RUNNERS[block.language](terminal, block.text)


# --- the terminal


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an empty server that does not run. Tests copy it."""
    directory = tmp_path_factory.mktemp("docs") / "pg"
    embedded.ensure_server(directory, bin_dir=find_psql().parent)
    embedded.stop_server(directory)
    return directory


@contextmanager
def served(directory: Path) -> Iterator[Mapping[str, str]]:
    try:
        yield embedded.ensure_server(directory, bin_dir=find_psql().parent)
    finally:
        embedded.stop_server(directory)


@pytest.fixture
def terminal(template: Path, tmp_path: Path) -> Iterator[Terminal]:
    server, directory = tmp_path / "pg", tmp_path / "reader"
    shutil.copytree(template, server)
    directory.mkdir()
    (directory / "deploy").symlink_to(ROOT / "deploy")
    write_commands(directory / "bin")
    command = directory / "bin" / "outbox-worker"
    with served(server) as where, command_for_shells(command), socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        made = Terminal(directory, server, where, port=port)
        (directory / "exports").write_text(f"export OUTBOX_DATABASE_URL='{made.url_of('OWNER')}'\n")
        try:
            yield made
        finally:
            made.stop()


def write_commands(directory: Path) -> None:
    """Write scripts `psql` and `make` that call the usual programs.

    They install nothing.
    """
    make = shutil.which("make")
    assert make is not None
    directory.mkdir()
    scripts = {
        "psql": f'exec {find_psql()} "$@"',
        "make": f'exec {make} -s -C {ROOT} -o .venv/run -o .venv/dev BIN={directory} "$@"',
    }
    for name, line in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{line}\n")
        (directory / name).chmod(0o755)
