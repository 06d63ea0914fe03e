"""Operators and dead letters: they list them, preview a decision, decide, and find it recorded."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from tests.support.factories import Shop
from tests.support.makers import Connect
from tests.support.payloads import document, put, retype
from tests.support.processes import Finished, eventually, finish, finish_on_terminal, start

WHO = ("--actor", "ann", "--reason", "the producer is mended")


def decide(url: str, verb: str, *arguments: str, code: int = 0) -> Finished:
    done = finish("dead-letters", verb, *arguments, url=url)
    assert done.code == code, done.stderr + done.stdout
    return done


def drain(url: str) -> None:
    assert finish("run", "--drain", url=url).code == 0


def states(shop: Shop) -> dict[UUID, str]:
    return {row.event_id: row.state for row in shop.rows("SELECT event_id, state FROM dead_letters")}


@pytest.mark.usefixtures("both_guards")
def test_requeued_it_goes_through_the_same_queue_and_guard(database_url: str, shop: Shop) -> None:
    """The event was buried because its payment did not exist. The payment came later."""
    late, twin = shop.payment(), shop.payment()
    shop.purchase(None, *twin.pair)
    dead = [shop.dead_letter(payment, reason="payment_not_found") for payment in (late, twin)]
    seen = decide(database_url, "requeue", "--all", *WHO, "--json").object
    assert seen["is_done"] is True
    assert seen["preview"]["count"] == 2
    assert seen["preview"]["money"] == {"EUR": "99.80"}
    assert seen["preview"]["reasons"] == {"payment_not_found": 2}
    assert set(states(shop).values()) == {"requeued"}
    assert shop.scalar("SELECT count(*) FROM outbox WHERE due_at <= clock_timestamp() AND attempts = 0") == 2
    drain(database_url)
    assert [shop.outcome_of(event) for event in dead] == ["created", "duplicate_payment"]
    letter = shop.letter_of(dead[0])
    assert letter.actor == "ann"
    assert letter.note.startswith("requeued by ann, ")
    assert letter.note.endswith(": the producer is mended")
    assert letter.resolved_at is not None


def test_what_dies_again_is_open_again_and_its_history_is_kept(database_url: str, shop: Shop) -> None:
    event = shop.dead_letter(shop.payment(), reason="payment_mismatch", payload={"currency": "USD"})
    for who in ("ann", "bob"):
        decide(database_url, "requeue", str(event), "--actor", who, "--reason", f"{who} tries")
        drain(database_url)
    letter = shop.letter_of(event)
    assert (letter.state, letter.resolved_at, letter.reason) == ("open", None, "payment_mismatch")
    assert [line.partition(",")[0] for line in letter.note.splitlines()] == ["requeued by ann", "requeued by bob"]


def test_discarded_its_payment_is_waived(database_url: str, shop: Shop) -> None:
    payment = shop.payment()
    event = shop.dead_letter(payment, reason="payment_mismatch")
    told = decide(database_url, "discard", str(event), *WHO)
    assert "never given       49.90 EUR" in told.stdout
    assert "1 dead letter discarded. 49.90 EUR waived: the students get no course for it." in told.stdout
    audit = finish("audit", "--json", url=database_url)
    assert (audit.code, audit.object["counts"]["waived"]) == (0, 1)
    assert shop.count("outbox") == 0
    again = decide(database_url, "discard", str(event), *WHO, code=1)
    assert f"{event} is discarded" in again.stderr
    decide(database_url, "requeue", str(event), *WHO)
    assert states(shop) == {event: "requeued"}


def test_where_nothing_is_given_up_by_a_discard_that_is_said(database_url: str, shop: Shop) -> None:
    """Only one of the dead letters is of a successful payment that is owed a purchase."""
    given = shop.payment()
    shop.purchase(given)
    for payment in (given, shop.payment("refunded")):
        shop.dead_letter(payment, reason="payment_mismatch")
    shop.dead_letter(shop.payment(), reason="unsupported_event_type", event_type="COURSE_VIEWED")
    seen = decide(database_url, "discard", "--all", "--dry-run", "--json").object["preview"]
    assert (seen["count"], seen["waived"]) == (3, {})
    shop.dead_letter(shop.payment(amount="7.00"), reason="payment_mismatch")
    seen = decide(database_url, "discard", "--all", "--dry-run", "--json").object["preview"]
    assert (seen["count"], seen["waived"]) == (4, {"EUR": "7.00"})
    decide(database_url, "discard", "--all", *WHO)
    counts = finish("audit", "--json", url=database_url).object["counts"]
    assert (counts["waived"], counts["unexplained"]) == (1, 1)


def test_only_those_that_match(database_url: str, shop: Shop) -> None:
    old = shop.dead_letter(reason="invalid_payload", event_type="A")
    shop.rows("UPDATE dead_letters SET dead_at = now() - interval '2 hours'")
    young = shop.dead_letter(reason="invalid_payload", event_type="B")
    other = shop.dead_letter(reason="payment_not_found", event_type="A")
    for arguments, found in {
        ("--all",): {old, young, other},
        ("--dead-reason", "invalid_payload"): {old, young},
        ("--type", "A"): {old, other},
        ("--older-than", "1h"): {old},
        ("--type", "A", "--dead-reason", "payment_not_found"): {other},
        ("--older-than", "1d"): set(),
    }.items():
        seen = decide(database_url, "discard", *arguments, "--dry-run", "--json").object
        assert (seen["preview"]["count"], seen["is_done"]) == (len(found), False)
        listed = finish(
            "dead-letters", "list", "--json", *(each for each in arguments if each != "--all"), url=database_url
        )
        assert {UUID(letter["event_id"]) for letter in listed.object["dead_letters"]} == found
    assert set(states(shop).values()) == {"open"}
    decide(database_url, "discard", "--type", "A", *WHO)
    assert {key for key, state in states(shop).items() if state == "discarded"} == {old, other}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE payments SET status = 'refunded'",
        "UPDATE payments SET amount = 1",
        "UPDATE payments SET currency = 'USD'",
        "UPDATE payments SET student_id = gen_random_uuid()",
        "UPDATE dead_letters SET attempts = attempts + 1",
        "UPDATE dead_letters SET state = 'settled' WHERE reason = 'payment_not_found'",
        "UPDATE dead_letters SET dead_at = clock_timestamp()",
        "DELETE FROM dead_letters WHERE reason = 'invalid_payload'",
    ],
)
def test_a_world_that_changed_since_the_preview_is_left_alone(change: str, database_url: str, shop: Shop) -> None:
    shop.dead_letter(shop.payment(), reason="payment_not_found")
    shop.dead_letter(reason="invalid_payload")
    token = decide(database_url, "requeue", "--all", "--dry-run", "--json").object["preview"]["token"]
    shop.rows(change)
    before = shop.rows("SELECT * FROM dead_letters ORDER BY event_id")
    refused = decide(database_url, "requeue", "--all", "--preview", token, *WHO, code=1)
    assert "changed since the preview" in refused.stderr
    assert shop.rows("SELECT * FROM dead_letters ORDER BY event_id") == before
    assert shop.count("outbox") == 0
    token = decide(database_url, "requeue", "--all", "--dry-run", "--json").object["preview"]["token"]
    decide(database_url, "requeue", "--all", "--preview", token, *WHO)
    assert "open" not in states(shop).values()


def test_an_event_that_was_delivered_again_meanwhile_stays_as_it_is(database_url: str, shop: Shop) -> None:
    payment = shop.payment()
    event = shop.dead_letter(payment, reason="payment_not_found")
    shop.confirm(payment, event, due_in="1 hour")
    before = shop.event(event)
    decide(database_url, "requeue", str(event), *WHO)
    assert shop.event(event) == before
    assert states(shop) == {event: "requeued"}


def test_an_event_that_the_outbox_does_not_take_is_listed(database_url: str, shop: Shop) -> None:
    sound, taken = shop.dead_letter(shop.payment()), shop.dead_letter(shop.payment())
    shop.confirm(shop.payment(), taken)
    done = decide(database_url, "requeue", "--all", *WHO, code=1)
    assert "1 event requeued." in done.stdout
    assert "1 dead letter could not be requeued:" in done.stdout
    assert str(taken) in done.stdout
    again = decide(database_url, "requeue", "--all", *WHO, "--json", code=1).object
    assert (again["is_done"], [each["event_id"] for each in again["refused"]]) == (False, [str(taken)])
    assert states(shop) == {sound: "requeued", taken: "open"}


@pytest.mark.parametrize("column", ["json", "text"])
def test_a_document_is_delivered_again_as_it_was(column: str, database_url: str, shop: Shop) -> None:
    retype(shop, column)
    payment = shop.payment()
    shop.rows("UPDATE payments SET status = 'pending'")
    raw = document(payment, note=r'"\u0000 \ud800"', twice="1") + "  \n"
    event = put(shop, column, raw)
    assert event is not None
    assert finish("run", "--drain", url=database_url, max_attempts=1).code == 0
    assert shop.letter_of(event).reason == "payment_not_succeeded"
    shop.rows("UPDATE payments SET status = 'succeeded'")
    decide(database_url, "requeue", str(event), *WHO)
    assert shop.scalar("SELECT payload::text FROM outbox") == raw
    drain(database_url)
    assert shop.outcome_of(event) == "created"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--actor", "ann", "--reason", "x"], "Give ids of events, or choose"),
        (["--all", str(uuid4()), *WHO], "Give ids of events, or choose"),
        (["--all"], "--actor and --reason are required"),
        (["--all", "--actor", "ann"], "--actor and --reason are required"),
        (["--older-than", "soon", *WHO], "--older-than: a duration is expected"),
        (["no-uuid", *WHO], "cannot be the id of an event"),
    ],
)
@pytest.mark.parametrize("verb", ["requeue", "discard"])
def test_wrong_usage(verb: str, arguments: list[str], said: str, database_url: str) -> None:
    assert said in decide(database_url, verb, *arguments, code=2).stderr


@pytest.mark.parametrize("verb", ["list", "requeue", "discard"])
def test_a_reason_that_nothing_dies_of(verb: str, database_url: str, shop: Shop) -> None:
    shop.dead_letter(reason="payment_mismatch")
    who = [] if verb == "list" else WHO
    said = decide(database_url, verb, "--dead-reason", "paymentmismatch", *who, code=2).stderr
    assert "payment_mismatch" in said


def test_an_event_without_a_letter(database_url: str) -> None:
    assert "no dead letter for" in decide(database_url, "requeue", str(uuid4()), *WHO, code=1).stderr


def test_nothing_to_decide(database_url: str) -> None:
    assert "Nothing to requeue" in decide(database_url, "requeue", "--all", *WHO).stdout
    assert "No open dead letters" in finish("dead-letters", "list", url=database_url).stdout


def test_pages_go_through_all(database_url: str, shop: Shop) -> None:
    made = [shop.dead_letter(reason="invalid_payload") for _ in range(7)]
    shop.rows("UPDATE dead_letters SET dead_at = '2026-01-01' WHERE event_id = ANY(%s)", made[:4])
    found, after = [], list[str]()
    while True:
        page = finish("dead-letters", "list", "--json", "--limit", "3", *after, url=database_url).object
        found += [UUID(letter["event_id"]) for letter in page["dead_letters"]]
        if page["next"] is None:
            break
        after = ["--after", page["next"]]
    assert len(found) == 7
    assert set(found) == set(made)
    assert finish("dead-letters", "list", "--after", "there", url=database_url).code == 2


@pytest.mark.slow
def test_a_hundred_thousand(database_url: str, shop: Shop) -> None:
    shop.rows(
        "INSERT INTO dead_letters (event_id, event_type, payload, created_at, attempts, reason, detail)"
        " SELECT gen_random_uuid(), 'X', '{}', now(), 1, 'unsupported_event_type', 'd' FROM generate_series(1, 100000)"
    )
    assert finish_on_terminal("dead-letters", "list", url=database_url).count("unsupported_event_type") == 100
    seen = decide(database_url, "requeue", "--all", *WHO, "--json").object
    assert seen["preview"]["count"] == shop.count("outbox") == 100_000
    assert set(states(shop).values()) == {"requeued"}


def test_on_a_terminal_one_is_asked(database_url: str, shop: Shop) -> None:
    event = shop.dead_letter(shop.payment(), reason="payment_mismatch")
    shown = finish_on_terminal("dead-letters", "discard", "--all", url=database_url, typed="ann\nrefunded by hand\nn\n")
    assert "49.90 EUR" in shown
    assert "Aborted" in shown
    assert states(shop) == {event: "open"}
    finish_on_terminal("dead-letters", "discard", "--all", url=database_url, typed="ann\nrefunded by hand\ny\n")
    assert states(shop) == {event: "discarded"}
    assert shop.letter_of(event).note.endswith(": refunded by hand")


def test_two_people_at_once_decide_once(database_url: str, shop: Shop, connect: Connect) -> None:
    """The second person waits for the first, and is told that the dead letters have changed."""
    event = shop.dead_letter(shop.payment(), reason="payment_mismatch")
    first = connect()
    first.execute("UPDATE dead_letters SET state = 'discarded', note = 'first' WHERE event_id = %s", [event])
    with start("dead-letters", "requeue", "--all", *WHO, url=database_url) as second:
        eventually(shop.waiting, "the second waits for the first")
        first.commit()
        assert second.wait() == 1
        assert "changed since the preview" in second.stderr
    assert shop.letter_of(event).note == "first"
    assert shop.count("outbox") == 0
