"""What people see on a terminal, and what scripts read."""

from __future__ import annotations

import json
import re
import signal
from datetime import datetime
from uuid import UUID

import pytest

from tests.support.commands import PASSWORD
from tests.support.factories import Shop
from tests.support.processes import (
    eventually,
    finish,
    finish_on_terminal,
    start,
)

# --- what people see


@pytest.mark.parametrize("columns", [80, 50, 250])
@pytest.mark.parametrize("command", ["status", "audit", "dead-letters list"])
def test_nothing_is_cut_or_broken_on_a_terminal(command: str, columns: int, database_url: str, shop: Shop) -> None:
    """If a table is too wide, each row becomes a block. An id stays one word that can be copied."""
    lost = shop.payment(currency="USD")
    letter = shop.dead_letter(shop.payment())
    shop.paid()
    shown = finish_on_terminal(*command.split(), url=database_url, columns=columns)
    assert "…" not in shown
    assert "Traceback" not in shown
    ids = {"audit": [lost.id, lost.student_id, lost.course_id], "dead-letters list": [letter], "status": []}[command]
    for each in ids:
        assert str(each) in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= columns
    if command != "status":
        assert (len(re.findall(f"^.*{ids[0]}.*$", shown, re.MULTILINE)[0].split()) > 2) is (columns == 250)


# --- what scripts read


def is_moment(value: str) -> bool:
    """Tell whether a text is a moment as RFC 3339 writes it, in UTC."""
    return value.endswith("Z") and datetime.fromisoformat(value).tzinfo is not None


def test_status_as_an_object(both_guards: str, database_url: str, shop: Shop) -> None:
    assert finish("run", "--drain", url=database_url).code == 0
    shop.pay_many(3, due_in="-100 seconds")
    shop.paid(due_in="1 hour")
    shop.dead_letter()
    done = finish("status", "--json", url=database_url)
    assert done.code == 0, done.stderr
    found = done.object
    assert found.keys() >= {"time", "guard", "backlog", "dead_letters", "events_per_second", "workers", "metrics"}
    assert is_moment(found["time"])
    assert found["guard"] == both_guards
    assert (found["backlog"]["due"], found["backlog"]["waiting"]) == (3, 1)
    assert 100 <= found["backlog"]["oldest_due_seconds"] < 160
    assert found["dead_letters"] == {"open": 1}
    assert isinstance(found["events_per_second"], int | float)
    (worker,) = found["workers"]
    assert str(UUID(worker["id"])) == worker["id"]
    assert isinstance(worker["pid"], int)
    assert (worker["state"], worker["guard"], worker["settled"]) == ("stopped", both_guards, 0)
    assert is_moment(worker["started_at"])
    assert worker["silent_seconds"] >= 0
    assert all(isinstance(value, int | float) for value in found["metrics"].values())
    assert found["metrics"][f'outbox_guard{{mode="{both_guards}"}}'] == 1
    assert found["metrics"]["outbox_due_events"] == 3


def test_status_is_watched_through_an_outage_until_ctrl_c(database_url: str, shop: Shop) -> None:
    with start("status", "--watch", "--json", url=database_url, piped=True) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["backlog"]["due"] == 0
        shop.pay_many(3)
        assert json.loads(watching.stdout.readline())["backlog"]["due"] == 3
        shop.rows("ALTER TABLE workers RENAME TO elsewhere")
        eventually(lambda: "public.workers" in watching.stderr, "told")
        shop.rows("ALTER TABLE elsewhere RENAME TO workers")
        assert json.loads(watching.stdout.readline())["backlog"]["due"] == 3
        watching.signal(signal.SIGINT)
        assert watching.wait() == 0
        assert "Traceback" not in watching.stderr


def test_audit_as_an_object(database_url: str, shop: Shop) -> None:
    first = shop.payment(amount="10.00")
    shop.purchase(first)
    shop.payment(student=first.student_id, course=first.course_id, amount="0.10")
    shop.payment(student=first.student_id, course=first.course_id, amount="0.20")
    shop.paid(amount="5.50", currency="USD")
    lost = shop.payment(amount="1234567.80")
    refunded = shop.payment(status="refunded")
    shop.purchase(refunded)
    done = finish("audit", "--json", url=database_url)
    found = done.object
    assert (done.code, found["ok"]) == (1, False)
    assert found.keys() == {
        "ok",
        "pairs_twice_active",
        "counts",
        "money",
        "unexplained",
        "refunded_but_active",
        "cannot_be_judged",
        "unknown_statuses",
        "dated_ahead",
    }
    counts = {"active": 1, "revoked": 0, "duplicate": 2, "in_flight": 1, "dead": 0, "waived": 0, "unexplained": 1}
    assert found["counts"] == counts
    assert found["money"].keys() == counts.keys()
    assert found["money"]["active"] == {"EUR": "10.00"}
    assert found["money"]["duplicate"] == {"EUR": "0.30"}
    assert found["money"]["in_flight"] == {"USD": "5.50"}
    assert found["money"]["unexplained"] == {"EUR": "1234567.80"}
    (unexplained,) = found["unexplained"]
    assert UUID(unexplained["payment_id"]) == lost.id
    assert (unexplained["amount"], unexplained["currency"]) == ("1234567.80", "EUR")
    assert (UUID(unexplained["student_id"]), UUID(unexplained["course_id"])) == lost.pair
    assert is_moment(unexplained["created_at"])
    assert [UUID(each["payment_id"]) for each in found["refunded_but_active"]] == [refunded.id]


def test_payments_of_a_status_that_is_not_known_are_told(database_url: str, shop: Shop) -> None:
    """The worker grants nothing for such payments and knows nothing of them.

    The audit must say so.
    """
    shop.rows("ALTER TABLE payments DROP CONSTRAINT payments_status_check")
    for status in ("PAID", "captured", "PAID", "pending", "failed", "refunded", "succeeded"):
        shop.purchase(shop.payment(status=status)) if status == "succeeded" else shop.payment(status=status)
    assert finish("audit", "--json", url=database_url).object["unknown_statuses"] == {"PAID": 2, "captured": 1}
    assert "PAID (2), captured (1)." in finish("audit", url=database_url).stdout


def test_payments_of_the_future_are_told(database_url: str, shop: Shop) -> None:
    for moment in ("infinity", "2999-01-01"):
        shop.rows("UPDATE payments SET created_at = %s WHERE id = %s", moment, shop.payment().id)
    assert finish("audit", "--json", url=database_url).object["dated_ahead"] == 2
    shown = finish("audit", url=database_url).stdout
    assert "Not audited, because created_at is in the future: 2 payments." in shown
    shop.rows("UPDATE payments SET status = 'refunded'")
    assert "future" not in finish("audit", url=database_url).stdout


def test_audit_of_a_shop_that_owes_nothing(database_url: str, shop: Shop) -> None:
    shop.pay_many(3)
    assert finish("run", "--drain", url=database_url).code == 0
    done = finish("audit", "--json", url=database_url)
    assert (done.code, done.object["ok"]) == (0, True)
    assert done.object["counts"]["active"] == 3
    told = finish("audit", url=database_url)
    assert told.code == 0
    assert "Nothing is owed" in told.stdout


def test_dead_letters_as_an_object(database_url: str, shop: Shop) -> None:
    payment, _ = shop.paid(payload={"currency": "USD"})
    shop.paid(payload={"payment_id": None})
    closed = shop.dead_letter(state="discarded")
    assert finish("run", "--drain", url=database_url).code == 0
    listed = finish("dead-letters", "list", "--json", url=database_url)
    assert listed.code == 0
    letters = listed.object["dead_letters"]
    assert {letter["reason"] for letter in letters} == {"payment_mismatch", "invalid_payload"}
    (mismatch,) = [letter for letter in letters if letter["reason"] == "payment_mismatch"]
    assert str(UUID(mismatch["event_id"])) == mismatch["event_id"]
    assert UUID(mismatch["payment_id"]) == payment.id
    assert (mismatch["attempts"], mismatch["state"], mismatch["event_type"]) == (1, "open", "PURCHASE_CONFIRMED")
    assert "currency" in mismatch["detail"]
    assert is_moment(mismatch["dead_at"])
    assert is_moment(mismatch["created_at"])
    by_reason = finish("dead-letters", "list", "--json", "--reason", "payment_mismatch", url=database_url)
    assert by_reason.object["dead_letters"] == [mismatch]
    discarded = finish("dead-letters", "list", "--json", "--state", "discarded", url=database_url)
    assert [UUID(letter["event_id"]) for letter in discarded.object["dead_letters"]] == [closed]
    assert len(finish("dead-letters", "list", "--json", "--limit", "1", url=database_url).object["dead_letters"]) == 1
    assert finish("dead-letters", "list", "--json", "--reason", "crashed_worker", url=database_url).object == {
        "dead_letters": [],
        "next": None,
    }


def test_stdout_is_for_results_and_stderr_for_records(database_url: str, shop: Shop) -> None:
    shop.paid(payload={"payment_id": PASSWORD})
    done = finish("run", "--drain", url=database_url, log_level="DEBUG")
    assert (done.code, done.stdout, done.sentences()) == (0, "", "")
    assert all(is_moment(record["time"]) and record["level"] and record["message"] for record in done.records)
    assert PASSWORD not in done.stderr, "a payload's text is in the log"
