"""What a person sees on 80 columns, what `cut` reads in a pipe, and which command comes next."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.factories import Shop
from tests.support.processes import finish, finish_in_shell, finish_on_terminal

PYTHON = sys.executable
LONG = "no purchase can be made " * 100


def next_commands(shown: str) -> list[list[str]]:
    """Return the commands after `Next:`, as a shell reads them."""
    lines = shown.replace(" \\\n", " ").partition("\nNext: ")[2].splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip()]


# --- in a pipe


def test_cut_and_awk_read_the_columns(database_url: str, shop: Shop) -> None:
    """A long cell does not cut another cell. Several currencies are one cell."""
    payment = shop.payment(amount="12.30")
    shop.payment(amount="2.00", currency="USD")
    event = shop.dead_letter(payment, reason="rejected_by_database")
    shop.rows("UPDATE dead_letters SET detail = %s", LONG)
    letters = finish_in_shell("$WORKER dead-letters list | cut -f 1,3,7 | sed -n 2p", database_url)
    assert letters.stdout.rstrip("\n").split("\t") == [str(event), str(payment.id), LONG]
    money = finish_in_shell("$WORKER audit | awk -F '\\t' '$1 == \"unexplained\" && NF > 1 { print $3 }'", database_url)
    assert sorted(money.stdout.strip().split(", ")) == ["12.30 EUR", "2.00 USD"]


# --- on a terminal


def test_errors_break_at_spaces_only(database_url: str) -> None:
    asked = str(uuid4())
    shown = finish_on_terminal("why", asked, url=database_url, typed="")
    assert asked in shown
    assert max(map(len, shown.splitlines())) <= 80
    unset = finish_on_terminal("status", url="", typed="")
    assert "postgresql://USER:PASSWORD@HOST/DATABASE" in unset
    assert max(map(len, unset.splitlines())) <= 80


def test_a_word_longer_than_the_terminal_stays_whole(database_url: str, shop: Shop) -> None:
    payload = "x" * 200
    event = shop.dead_letter(shop.payment(), payload={"note": payload})
    shown = finish_on_terminal("dead-letters", "show", str(event), url=database_url)
    assert payload in shown


def test_problems_come_last(database_url: str, shop: Shop) -> None:
    shop.rows("DROP TABLE backfill_runs")
    shown = finish_on_terminal("doctor", url=database_url)
    order = re.findall("^(ok|unseen|warning|problem) ", shown, re.MULTILINE)
    assert order == sorted(order, key=["ok", "unseen", "warning", "problem"].index)
    assert {"ok", "problem"} <= set(order)


def test_the_progress_of_an_audit_goes_on_after_the_count(database_url: str, shop: Shop) -> None:
    shop.payment()
    shown = finish_on_terminal("audit", url=database_url, typed="")
    assert "1 payments" in shown
    assert "checking payments without a purchase" in shown


def test_one_is_asked_for_name_and_reason(database_url: str, shop: Shop) -> None:
    shop.dead_letter(payment=None, reason="invalid_payload")
    shown = finish_on_terminal("dead-letters", "discard", "--all", url=database_url, typed="ann\na test\ny\n")
    for said in ("Your name [", "Reason: ", "Discard 1 event? [y/N]: ", "The letters name no known payment"):
        assert said in shown


def test_a_discard_that_waives_nothing_does_not_say_that_nothing_is_owed(database_url: str, shop: Shop) -> None:
    event = shop.dead_letter(shop.payment(), reason="unsupported_event_type", event_type="COURSE_VIEWED")
    who = ("--actor", "ann", "--reason", "x")
    told = finish("dead-letters", "discard", str(event), *who, url=database_url).stdout
    assert "No payment is waived. Purchases that are owed stay owed." in told


def test_status_calls_what_is_due_later_waiting(database_url: str, shop: Shop) -> None:
    shop.paid(due_in="1 hour")
    shown = finish("status", url=database_url).stdout
    assert re.search(r"^waiting +1 \(due later\)$", shown, re.MULTILINE)
    assert "postponed" not in shown


# --- the next command


def test_each_next_command_is_one_that_runs(database_url: str, shop: Shop) -> None:
    """The printed commands lead from the audit to the purchases. Each runs as it is printed."""
    first = shop.payment(ago="1 hour")
    for _ in range(2):
        shop.payment(ago="30 minutes")
    shop.dead_letter(shop.payment(), reason="payment_mismatch", payload={"currency": "USD"})
    audit = next_commands(finish("audit", url=database_url).stdout)
    assert audit == [["backfill", "--dry-run"], ["why", str(first.id)], ["dead-letters", "list"]]
    assert next_commands(finish(*audit[1], url=database_url).stdout) == [["backfill", "--dry-run"]]
    dry = finish("backfill", "--dry-run", "--max-repairs", "2", "--older-than", "1m", url=database_url)
    (backfill,) = next_commands(dry.stdout)
    assert backfill == ["backfill", "--older-than", "1m", "--max-repairs", "3"]
    assert next_commands(finish(*backfill, url=database_url).stdout) == [["audit"]]
    assert shop.count("purchases") == 3


def test_a_dead_letter_leads_to_its_decisions(database_url: str, shop: Shop) -> None:
    event = shop.dead_letter(shop.payment(), reason="payment_mismatch")
    (show,) = next_commands(finish("dead-letters", "list", url=database_url).stdout)
    about, *decisions = next_commands(finish(*show, url=database_url).stdout)
    assert about[0] == "why"
    assert decisions == [["dead-letters", verb, str(event)] for verb in ("requeue", "discard")]
    who = ("--actor", "ann", "--reason", "it's not ours")
    (discard,) = next_commands(finish(*decisions[1], "--dry-run", *who, url=database_url).stdout)
    assert discard[-5:] == [*who, str(event)]
    assert finish(*discard, url=database_url).code == 0
    assert shop.letter_of(event).state == "discarded"


def test_a_page_names_the_next_one_with_its_options(database_url: str, shop: Shop, tmp_path: Path) -> None:
    file = tmp_path / "outbox.toml"
    file.write_text(f'database_url = "{database_url}"\n')
    made = {str(shop.dead_letter(reason="invalid_payload")) for _ in range(3)}
    shop.dead_letter(reason="payment_mismatch")
    found = []
    command = ["dead-letters", "list", "--reason", "invalid_payload", "--limit", "2", "--config", str(file)]
    while command:
        shown = finish(*command).stdout
        found += re.findall(r"^([0-9a-f-]{36})\t", shown, re.MULTILINE)
        command = next((each for each in next_commands(shown) if "--after" in each), [])
    assert (len(found), set(found)) == (3, made)


def test_a_command_too_long_for_the_terminal_can_be_pasted(database_url: str, shop: Shop) -> None:
    event = shop.dead_letter(shop.payment())
    command = ("dead-letters", "requeue", str(event), "--dry-run", "--actor", "ann", "--reason", "it's all right again")
    shown = finish_on_terminal(*command, url=database_url)
    assert max(map(len, shown.splitlines())) <= 80
    (named,) = next_commands(shown)
    assert (named[:2], named[-1]) == (["dead-letters", "requeue"], str(event))
    assert named[named.index("--reason") + 1] == "it's all right again"


# --- completion in shells


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("outbox-worker dead", {"dead-letters"}),
        ("outbox-worker dead-letters requeue --dead-reason crashed", {"crashed_worker"}),
        ("outbox-worker run --dr", {"--drain"}),
    ],
)
def test_a_shell_completes_the_installed_command(typed: str, offered: set[str]) -> None:
    asked = f'_OUTBOX_WORKER_COMPLETE=complete_bash COMP_WORDS="{typed}" COMP_CWORD={typed.count(" ")}'
    done = finish_in_shell(f'{asked} "$(dirname {shlex.quote(PYTHON)})/outbox-worker"')
    assert (done.code, set(done.stdout.split()), done.stderr) == (0, offered, "")


def test_the_script_for_a_shell_is_printed() -> None:
    done = finish_in_shell(f'_OUTBOX_WORKER_COMPLETE=source_bash "$(dirname {shlex.quote(PYTHON)})/outbox-worker"')
    assert (done.code, "_OUTBOX_WORKER_COMPLETE=complete_bash" in done.stdout) == (0, True)
