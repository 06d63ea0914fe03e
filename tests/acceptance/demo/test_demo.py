"""The demonstration proves what it says. It leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import ANY

import pytest

from outbox_worker.demo.run import DOUBLED, UNPAID, Proof
from outbox_worker.model import Outcome
from outbox_worker.reconcile.audit import AuditReport
from outbox_worker.store.payment_classes import PaymentClass
from tests.support.factories import Shop
from tests.support.processes import environment, eventually


@pytest.fixture
def short() -> Iterator[Path]:
    """Make a directory whose short name leaves room for the path of a socket."""
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as name:
        yield Path(name)


def demo(directory: Path) -> subprocess.Popen[str]:
    """Start a demonstration whose temporary files are in `directory`."""
    settings = environment("postgresql://nobody@127.0.0.1:1/ignored", {}) | {"TMPDIR": str(directory)}
    command = [sys.executable, "-m", "outbox_worker", "demo", "--payments", "200"]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processes_of(directory: Path) -> list[str]:
    """Return the processes that name `directory`: server, launcher and workers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(directory).encode() in words and int(entry.name) != os.getpid():
            found.append(words.replace(b"\0", b" ").decode(errors="replace")[:80])
    return found


def test_it_proves_that_nothing_is_owed(short: Path) -> None:
    with demo(short) as process:
        shown, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    assert "kill -9" in shown
    assert "Proved: of 200 payments," in shown
    assert "No payment was taken for nothing. None of 10 refunded" in shown.replace("\n", " ")
    assert all(f"\n{name} " in shown for name in set(Outcome) - {Outcome.RETRIED, Outcome.DEAD})
    assert max(map(len, shown.splitlines())) <= 80
    assert list(short.iterdir()) == []


@pytest.mark.parametrize("fault", ["doubled", "unpaid", "lost", "unexplained", None])
def test_the_proof_fails_where_anything_is_wrong(fault: str | None) -> None:
    found = {each: int(each == fault) for each in ("doubled", "unpaid", "lost")}
    report = AuditReport(dict.fromkeys(PaymentClass, 2), {}, [ANY] * (fault == "unexplained"), [], [], [], {}, 0)
    proof = Proof(audit=report, outcomes={}, **found)
    assert proof.holds is (fault is None)
    assert proof.sentence().startswith("NOT proved: " if fault else "Proved: of 14 payments,")
    assert fault is None or re.search(rf"\b1 (\w+ )*({SAID[fault]})", proof.sentence())


SAID = {"doubled": "too many", "unpaid": "without payment", "lost": "lost", "unexplained": "unexplained"}


def test_what_the_proof_counts(shop: Shop) -> None:
    for _ in range(3):
        shop.purchase(shop.payment())
    assert (shop.scalar(DOUBLED), shop.scalar(UNPAID)) == (0, 0)
    shop.purchase(shop.payment(status="pending"))
    shop.purchase()
    twice = shop.payment()
    shop.purchase(twice._replace(amount="1.00"))
    assert (shop.scalar(DOUBLED), shop.scalar(UNPAID)) == (0, 3)
    shop.rows("DROP INDEX purchases_active_student_course_key")
    shop.purchase(shop.payment(student=twice.student_id, course=twice.course_id))
    assert (shop.scalar(DOUBLED), shop.scalar(UNPAID)) == (1, 3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_however_it_ends_nothing_is_left_running(number: signal.Signals, short: Path) -> None:
    with demo(short) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "starts to write payments" in line:
                break
        assert len(processes_of(short)) > 3
        process.send_signal(number)
        shown, complaints = process.communicate(timeout=60)
    eventually(lambda: not processes_of(short), "its processes are gone")
    if number != signal.SIGKILL:
        assert (process.returncode, complaints) == (0, "")
        assert "interrupted; all processes stop" in shown
        assert list(short.iterdir()) == []
