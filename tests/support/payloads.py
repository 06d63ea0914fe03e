"""Malicious payloads, and events with these payloads in columns of every type that the worker
accepts."""

from __future__ import annotations

import json
from uuid import UUID, uuid4

import psycopg

from tests.support.factories import Payment, Shop

TYPES = ("jsonb", "json", "text")
CANARY = "hunter2-canary"
"""A secret text in payloads. It must not appear anywhere else."""

DEEP, DIGITS = 8_000, 10_000
EVERYTHING = {
    "NUL": r'"\u0000"',
    "a lone surrogate": r'"\ud800"',
    "surrogates in the wrong order": r'"\udc00\ud800"',
    "half a pair at the end": r'"x\ud83d"',
    "newline and ANSI": r'"\n\u001b[31mred\r\n{\"event\": \"worker_started\"}"',
    "braces of a format": '"{event} {0} {{}} %s %(x)s $1 :x"',
    "quotes and commas": r'"\",{}\\ NULL,\""',
    "deep": "[" * DEEP + "]" * DEEP,
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "many digits": "9" * DIGITS,
    "many decimals": "0." + "3" * DIGITS,
    "a huge exponent": "1e400",
    "brackets in strings": '["}]{[", "\\\\", {"a": "\\"}"}]',
}
"""Values that the worker must ignore except in the five keys that it reads. jsonb refuses some of
them."""
NO_OBJECT = {
    "nothing": "",
    "a blank": " ",
    "NaN": "NaN",
    "prose": "payment_id",
    "unquoted": "{payment_id: 1}",
    "cut off": '{"payment_id": "',
    "behind it more": '{"payment_id": "%s"} {}',
    "NaN in it": '{"payment_id": "%s", "amount": NaN}',
    "infinity in it": '{"payment_id": "%s", "amount": -Infinity}',
    "a comma too many": '{"payment_id": "%s",}',
    "a raw newline in a string": '{"payment_id": "%s", "note": "\n"}',
    "a byte-order mark": '\ufeff{"payment_id": "%s"}',
    "deep and broken": '{"payment_id": "%s", "x": ' + "[" * DEEP + "}",
}
"""Texts that are not JSON. Only a text column accepts them."""


def retype(shop: Shop, column: str) -> None:
    """Make ``outbox.payload`` a column of this type."""
    shop.rows(f"ALTER TABLE outbox ALTER payload TYPE {column} USING payload::text::{column}")


def put(shop: Shop, column: str, document: str, event_type: str = "PURCHASE_CONFIRMED") -> UUID | None:
    """Write an event with exactly this payload, and return its id. Return None if the column
    refuses the payload."""
    event_id = uuid4()
    try:
        shop.rows(
            f"INSERT INTO outbox (event_id, event_type, payload) VALUES (%s, %s, CAST(CAST(%s AS text) AS {column}))",
            *(event_id, event_type, document),
        )
    except psycopg.DataError:
        return None
    return event_id


def document(payment: Payment, **more: str) -> str:
    """Return a JSON object with the five keys of a payment and the keys in ``more``. The values in
    ``more`` are JSON texts."""
    own = {
        "payment_id": payment.id,
        "student_id": payment.student_id,
        "course_id": payment.course_id,
        "amount": payment.amount,
        "currency": payment.currency,
    }
    written = {key: json.dumps(str(value)) for key, value in own.items()} | more
    return "{" + ", ".join(f'"{key}": {value}' for key, value in written.items()) + "}"
