"""Measures procrastinate, an asynchronous worker that runs many jobs at once.

Each job first commits its work, and then commits its deletion.

Usage: python procrastinate_peer.py CONNECTION fill|drain EVENTS
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import procrastinate
from procrastinate.jobs import DeleteJobCondition

CONCURRENCY = 24
EACH = """
    WITH bought AS (
        INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)
        VALUES (%(student_id)s, %(course_id)s, %(payment_id)s, %(amount)s, %(currency)s) ON CONFLICT DO NOTHING
    )
    INSERT INTO processed_events (event_id, event_type, outcome, payment_id)
    VALUES (%(event_id)s, 'PURCHASE_CONFIRMED', 'created', %(payment_id)s) ON CONFLICT DO NOTHING
"""
"""The work of one event. It is the same as in work.mjs."""

conninfo, step, events = sys.argv[1], sys.argv[2], int(sys.argv[3])
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=conninfo, max_size=CONCURRENCY + 1))


@app.task(name="buy")
async def buy(event: dict[str, Any]) -> None:
    await app.connector.execute_query_async(EACH, **event)


async def fill() -> None:
    found = await app.connector.execute_query_one_async("SELECT to_regclass('procrastinate_jobs') AS jobs")
    if found["jobs"] is None:
        await app.schema_manager.apply_schema_async()
    rows = await app.connector.execute_query_all_async("SELECT event FROM peer_events")
    for begin in range(0, len(rows), 1000):
        await buy.batch_defer_async(*({"event": row["event"]} for row in rows[begin : begin + 1000]))


async def drain() -> None:
    begin = time.monotonic()
    await app.run_worker_async(
        concurrency=CONCURRENCY, wait=False, delete_jobs=DeleteJobCondition.ALWAYS, install_signal_handlers=False
    )
    print(json.dumps({"seconds": time.monotonic() - begin}))


async def main() -> None:
    async with app.open_async():
        await (fill() if step == "fill" else drain())


asyncio.run(main())
