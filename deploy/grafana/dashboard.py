"""The source of outbox-worker.json. `make dashboard` writes that file.

The rows are in the order in which an operator needs them during an incident. All workers of a
database export the same gauges. Therefore queries use max for gauges. Each process counts its own
events. Therefore queries use sum for counters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A panel. ``asks`` maps legends to queries. Values of ``bad`` or more are red.

    In the queries, $job selects the database.
    """

    title: str
    asks: Mapping[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    bad: float | None = None
    about: str = ""


def rate(metric: str, by: str, labels: str = "") -> str:
    return f'sum by ({by}) (rate({metric}{{job="$job"{labels}}}[$__rate_interval]))'


def quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, {rate(metric + '_bucket', 'le')})"


def gauge(metric: str, by: str = "job", labels: str = "") -> str:
    return f'max by ({by}) ({metric}{{job="$job"{labels}}})'


ROWS: Mapping[str, list[Panel]] = {
    "Is anything owed?": [
        Panel(
            title="Unexplained payments",
            asks={"payments": gauge("outbox_unexplained_payments")},
            kind="stat",
            bad=1,
            about="Money was taken, nothing given, and nothing tells why; as the last look of a backfill left it.",
        ),
        Panel(
            title="Value at risk",
            asks={"{{currency}}": gauge("outbox_value_at_risk", "currency")},
            kind="stat",
            bad=0.01,
            about="The money of unexplained payments.",
        ),
        Panel(
            title="Open dead letters",
            asks={"letters": gauge("outbox_open_dead_letters")},
            kind="stat",
            bad=1,
            about="Events that cannot succeed as they stand; a person decides.",
        ),
        Panel(
            title="Oldest due event",
            asks={"late by": gauge("outbox_oldest_due_seconds")},
            unit="s",
            kind="stat",
            bad=300,
            about="How late the oldest due event is.",
        ),
    ],
    "Is it keeping up?": [
        Panel(
            title="Events by outcome",
            asks={"{{outcome}}": rate("outbox_events_total", "outcome")},
            unit="ops",
        ),
        Panel(
            title="Due events",
            asks={
                "due": gauge("outbox_due_events"),
                "of ignored types": gauge("outbox_ignored_events"),
                "set aside": gauge("outbox_set_aside_events"),
            },
            about="Each is counted up to a bound.",
        ),
        Panel(
            title="From due to settled",
            asks={
                "99 %": quantile(0.99, "outbox_settle_latency_seconds"),
                "half": quantile(0.5, "outbox_settle_latency_seconds"),
            },
            unit="s",
        ),
        Panel(
            title="Since the last poll",
            asks={"{{instance}}": gauge("outbox_since_poll_seconds", "instance")},
            unit="s",
            bad=60,
            about="Idle workers poll, too: what grows here cannot reach its database.",
        ),
    ],
    "What fails?": [
        Panel(
            title="Success of the last hour",
            asks={"success": 'job:outbox_success:ratio1h{job="$job"}'},
            unit="percentunit",
            about="Created, recovered and already existing, of all events but refunds.",
        ),
        Panel(
            title="Recovered and rolled back, last hour",
            asks={
                "recovered, of events": 'job:outbox_recovery:ratio1h{job="$job"}',
                "rolled back, of transactions": 'job:outbox_rollback:ratio1h{job="$job"}',
            },
            unit="percentunit",
        ),
        Panel(
            title="Events that did not succeed",
            asks={
                "{{outcome}}": rate(
                    "outbox_events_total", "outcome", ', outcome=~"retried|dead|duplicate_payment|suppressed"'
                )
            },
            unit="ops",
        ),
        Panel(
            title="Dead letters by reason",
            asks={"{{reason}}": rate("outbox_dead_letters_total", "reason")},
            unit="ops",
        ),
    ],
    "What does the database do?": [
        Panel(
            title="Claim to COMMIT",
            asks={
                "99 %": quantile(0.99, "outbox_batch_duration_seconds"),
                "half": quantile(0.5, "outbox_batch_duration_seconds"),
            },
            unit="s",
        ),
        Panel(
            title="Errors and lost answers",
            asks={
                "{{class}}": rate("outbox_database_errors_total", "class"),
                "COMMIT {{result}}": rate("outbox_transactions_total", "result", ', result="unknown"'),
            },
            unit="ops",
        ),
        Panel(
            title="The guard is lock",
            asks={
                "in force": gauge("outbox_guard", labels=', mode="lock"'),
                "batches settled by it": rate("outbox_constraint_fallback_total", "job"),
            },
            bad=1,
            about="1: no sound unique index guards the purchases.",
        ),
        Panel(
            title="The vacuum horizon stands still",
            asks={"for": gauge("outbox_vacuum_horizon_seconds")},
            unit="s",
            bad=1800,
            about="Dead rows that claims walk over; one transaction, slot or prepared transaction keeps them.",
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """Return Grafana's JSON model of a dashboard. Source: grafana.com/docs, "Dashboard JSON model"."""
    return {
        "uid": "outbox-worker",
        "title": "Purchase outbox worker",
        "tags": ["outbox-worker"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "utc",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_datasource(), _job()]},
        "panels": [*_panels()],
    }


def _datasource() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus"}


def _job() -> dict[str, Any]:
    """Return the variable that selects a job. One job is one database."""
    asks = "label_values(outbox_build_info, job)"
    query = {"query": asks, "refId": "job"}
    return {"type": "query", "name": "job", "label": "Database", "datasource": SOURCE, "query": query, "refresh": 2}


def _panels() -> Iterator[dict[str, Any]]:
    ids, top = count(1), 0
    for title, panels in ROWS.items():
        yield {"id": next(ids), "type": "row", "title": title, "collapsed": False, "panels": []} | _at(
            top, 0, COLUMNS, 1
        )
        width, height = COLUMNS // len(panels), 4 if panels[0].kind == "stat" else 8
        for place, panel in enumerate(panels):
            yield _panel(panel, next(ids)) | _at(top + 1, place * width, width, height)
        top += 1 + height


def _at(top: int, left: int, width: int, height: int) -> dict[str, Any]:
    return {"gridPos": {"x": left, "y": top, "w": width, "h": height}}


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.bad is not None:
        steps.append({"color": "red", "value": panel.bad})
    custom = {"thresholdsStyle": {"mode": "line" if panel.bad else "off"}} if panel.kind == "timeseries" else {}
    defaults = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}, "custom": custom}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}} if panel.kind == "stat" else {},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for place, (legend, expr) in enumerate(panel.asks.items())
        ],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=2) + "\n")
