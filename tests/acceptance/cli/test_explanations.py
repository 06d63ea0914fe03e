"""``why`` and ``dead-letters show`` as an operator types them."""

from __future__ import annotations

from uuid import uuid4

import pytest

from outbox_worker.keys import KeyKind
from outbox_worker.store.purchases import backfill_event_id
from tests.support.factories import Shop
from tests.support.payloads import TYPES, put, retype
from tests.support.processes import finish, finish_on_terminal

ESCAPE = "\x1b[31m"


def lose(shop: Shop) -> tuple[object, object]:
    """Write a payment whose event was marked and whose purchase was never written."""
    payment = shop.payment()
    return payment.id, shop.mark(uuid4(), "processed", payment.id)


def test_one_reads_what_happened_which_rule_decided_and_what_would_happen(database_url: str, shop: Shop) -> None:
    payment, event = lose(shop)
    done = finish("why", str(payment), url=database_url)
    assert (done.code, done.stderr) == (0, "")
    for said in (
        f"event marked {event}: processed",
        "unexplained: money taken, no purchase, no known reason",
        "rule 9",
    ):
        assert said in done.stdout


def test_as_an_object(database_url: str, shop: Shop) -> None:
    payment, event = lose(shop)
    found = finish("why", str(event), "--json", url=database_url).object
    assert (found["id"], found["found_as"], found["has_more"], found["gifts"]) == (str(event), ["event"], False, [])
    (story,) = found["payments"]
    assert (story["payment_id"], story["class"]) == (str(payment), "unexplained")
    assert story["payment"]["amount"] == "49.90"
    assert [(each["what"], each["subject"]) for each in story["timeline"]] == [
        ("paid", str(payment)),
        ("event marked", str(event)),
    ]
    assert all(each["at"].endswith("Z") for each in story["timeline"])
    assert [(each["place"], each["outcome"]) for each in story["events"]] == [("mark", "processed")]
    again, backfill = story["now"]
    assert (again["occasion"], again["outcome"], again["rule"]) == ("delivered_again", "recovered", 9)
    assert again["writes_purchase"] is True
    assert backfill["event_id"] == str(backfill_event_id(payment, KeyKind.UUID))  # type: ignore[arg-type]


def test_nothing_has_this_id(database_url: str) -> None:
    for asked in (str(uuid4()), "'; DROP TABLE payments"):
        done = finish("why", asked, url=database_url)
        assert (done.code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"outbox-worker: No event, payment, purchase or student has the id {asked}.")
    done = finish("dead-letters", "show", str(uuid4()), url=database_url)
    assert (done.code, done.stdout) == (1, "")
    assert "no dead letter for" in done.stderr


def test_what_is_asked_for_does_not_drive_the_terminal(database_url: str) -> None:
    for asked, shown in (
        (f"{ESCAPE}x", "\\x1b[31mx"),
        (b"\xff\xfe".decode(errors="surrogateescape"), "?"),
        ("x" * 9999, "x"),
    ):
        done = finish("why", asked, "--json", url=database_url)
        assert (done.code, done.object["ok"]) == (1, False)
        assert f"student has the id {shown}" in done.stderr
        assert len(done.stderr) < 300


def test_all_about_a_dead_letter(database_url: str, shop: Shop) -> None:
    payment, event = shop.paid(payload={"currency": "USD", "note": ["kept"]})
    assert finish("run", "--drain", url=database_url).code == 0
    assert finish("dead-letters", "requeue", str(event), "--actor", "ann", "--reason", "x", url=database_url).code == 0
    assert finish("run", "--drain", url=database_url).code == 0
    found = finish("dead-letters", "show", str(event), "--json", url=database_url).object
    letter = found["dead_letter"]
    assert (letter["state"], letter["reason"], letter["attempts"]) == ("open", "payment_mismatch", 1)
    assert '"note": ["kept"]' in letter["payload"]
    assert [(each["state"], each["actor"], each["why"]) for each in found["history"]] == [("requeued", "ann", "x")]
    assert (found["payment"]["id"], found["class"]) == (str(payment.id), "dead")
    assert (found["now"]["occasion"], found["now"]["reason"]) == ("requeued", "payment_mismatch")
    shop.rows("UPDATE payments SET currency = 'USD'")
    shown = finish("dead-letters", "show", str(event), url=database_url).stdout
    for said in ("requeued by ann: x", "now, if it is requeued", "outcome  created", "rule 9"):
        assert said in shown


@pytest.mark.parametrize("column", TYPES)
def test_what_others_have_written_does_not_drive_the_terminal(column: str, database_url: str, shop: Shop) -> None:
    """The names of control characters are printed in their place. Markup is printed as text."""
    retype(shop, column)
    payload = '{"payment_id": "[red]", "note": "\\u001b[31m"}'
    event = put(shop, column, payload, f"[bold]{ESCAPE}\nTYPE")
    assert finish("run", "--drain", url=database_url).code == 0
    for command in (["dead-letters", "show", str(event)], ["why", str(event)], ["dead-letters", "list"]):
        for columns in (80, 250):
            shown = finish_on_terminal(*command, url=database_url, columns=columns)
            assert "Traceback" not in shown
            assert "\\x1b[31m" in shown.replace("\n", "").replace("\r", ""), "by its name"
            assert ESCAPE not in shown
            assert "[bold]" in shown
    assert "[red]" in finish("dead-letters", "show", str(event), url=database_url).stdout
