"""A process gets events that no worker can settle. It ends well and logs each event on one line.

It repeats no value of the events.
"""

from __future__ import annotations

import json

import pytest

from tests.support.factories import Shop
from tests.support.payloads import CANARY, EVERYTHING, NO_OBJECT, TYPES, document, put, retype
from tests.support.processes import finish

KEYS = ("payment_id", "student_id", "amount", "extra")


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("column", TYPES)
def test_every_evil_payload(column: str, style: str, database_url: str, shop: Shop) -> None:
    retype(shop, column)
    good = [shop.payment() for _ in range(50)]
    evil = [
        put(shop, column, document(shop.payment(), note=f'"{CANARY}"', **{key: value}))
        for key in KEYS
        for value in EVERYTHING.values()
    ]
    if column == "text":
        evil += [put(shop, column, text.replace("%s", str(shop.payment().id)) + CANARY) for text in NO_OBJECT.values()]
    odd_type = put(shop, column, document(good[0]), CANARY + '\n{"event": "worker_started"}\x1b[2J')
    for payment in good:
        put(shop, column, document(payment, note=f'"{CANARY}"'))
    done = finish("run", "--drain", url=database_url, log_level="DEBUG", log_format=style, batch_size=30)
    assert done.code == 0, done.stderr
    assert odd_type
    assert shop.count("outbox") == 0
    assert all(len(shop.purchases(payment)) == 1 for payment in good)
    buried = shop.count("dead_letters")
    assert buried + shop.count("processed_events") == len([each for each in evil if each]) + len(good) + 1
    assert CANARY not in done.stderr + done.stdout
    told = [line for line in done.stderr.splitlines() if "it is a dead letter now" in line]
    assert len(told) == buried > 20
    if style == "json":
        assert {json.loads(line)["event"] for line in told} == {"event_buried"}
        assert len(done.records) == len(done.stderr.splitlines())
