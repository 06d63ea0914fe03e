"""Write the pages of docs/reference that the code already holds: commands, settings, metrics, tables.

``make reference`` runs it; a test fails if a committed page differs from what it would write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from sqlalchemy import CheckConstraint, Column, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex
from typer.core import TyperGroup

# everything that comes from the product
from outbox_worker import errors
from outbox_worker.cli.app import app
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import RELOADABLE, Settings
from outbox_worker.telemetry.metrics import Metrics

HERE = Path(__file__).parent
_NOTE = "<!-- Written by `make reference`; do not edit. -->"

PROGRAM = "outbox-worker"
CODES: Mapping[str, Mapping[int, str]] = {
    "run": {
        0: "a signal stopped it, or `--drain` settled everything that was due",
        1: "`--drain` gave up on rows that other transactions kept locked",
        69: "only with `--drain`: no connection; the daemon waits instead",
    },
    "healthcheck": {
        0: "the daemon is well",
        1: "the daemon answers that it is not, and says why",
        69: "nobody answers within five seconds",
        78: "there is no address to ask: `OUTBOX_HTTP_LISTEN` is `off` or has port 0",
    },
    "migrate": {
        0: "everything is in place",
        1: "pairs with two active purchases stand in the way of the unique index; nothing was changed",
        78: "a table does not fit, or the role may not change the schema",
    },
    "status": {0: "shown"},
    "audit": {0: "nothing is owed", 1: "a payment is unexplained, or a refunded one still has its course"},
    "doctor": {0: "no problem; there may be warnings", 1: "at least one problem"},
    "backfill": {
        0: "nothing is owed any more",
        1: "more is owed than `--max-repairs` (nothing was made), or a purchase could not be made",
    },
    "why": {0: "found", 1: "no event, payment, purchase or student has this id"},
    "demo": {0: "proved, or interrupted", 1: "a payment stayed unexplained, or a purchase was made twice"},
    "bench": {0: "measured", 1: "the benchmark's database holds tables of somebody else"},
    "psql": {0: "psql ended well; otherwise the exit code is psql's own"},
    "duplicates list": {0: "listed, also when the list is empty"},
    "dead-letters list": {0: "listed, also when the list is empty"},
    "dead-letters show": {0: "found", 1: "no dead letter has this id"},
    "dead-letters requeue": {
        0: "done",
        1: "no such dead letter, one that is decided already, or a change since the preview; nothing was done",
    },
    "dead-letters discard": {
        0: "done",
        1: "no such dead letter, one that is decided already, or a change since the preview; nothing was done",
    },
}
"""What the exit codes of each command mean beyond those that all share."""

COMMON_CODES: Mapping[int, str] = {
    0: "fine",
    1: "the command found something, or refused to act; also an error of ours, with the request to report it",
    2: "wrong usage",
    69: "no connection: host, port, password, or a server that admits nobody",
    78: "a setting, URL, table, column or privilege is wrong; the message names it and the remedy",
    130: "interrupted (`run` and `demo` end with 0 instead)",
}

NOTES: Mapping[str, str] = {
    "outbox_events_total": "An event type without a handler counts as `other`.",
    "outbox_dead_letters_total": "Counts burials; `outbox_open_dead_letters` is what is left to decide.",
    "outbox_transactions_total": "`unknown`: the answer to COMMIT was lost.",
    "outbox_unexplained_payments": "What the last look of a backfill left; NaN until somebody looked.",
    "outbox_value_at_risk": "In units of the currency.",
    "outbox_guard": "0 for the other guard.",
    "outbox_since_poll_seconds": "Computed at each scrape.",
    "outbox_vacuum_horizon_seconds": "As this worker saw it: the same transaction has held it for so long.",
}
"""What a reader needs to know beside the help text that is exported."""

TABLES: Mapping[str, str] = {
    "payments": "The payments service writes it; the worker only reads it.",
    "outbox": "What is still owed. Producers insert; the worker claims, postpones and deletes.",
    "purchases": "The truth: an active row means that the student may use the course.",
    "processed_events": "The marks: this event reached a final outcome.",
    "dead_letters": "Events that wait for a person, and what that person decided.",
    "workers": "One row per process of the last day, for `status` and for the successor of a worker that died.",
    "backfill_runs": "What backfills looked at and made: all runs by hand, periodic ones of the last week.",
}
MEANINGS: Mapping[str, str] = {
    "payments.updated_at": "not read",
    "outbox.event_id": "the producer's id of the event",
    "outbox.event_type": "`PURCHASE_CONFIRMED` or `PURCHASE_REFUNDED`; other types: see `OUTBOX_UNKNOWN_TYPES`",
    "outbox.payload": "`payment_id` is required; `student_id`, `course_id`, `amount`, `currency` are checked if given",
    "outbox.headers": "only `traceparent` is read, for log records",
    "outbox.due_at": "not claimed before; the order of claims is `(due_at, id)`",
    "outbox.attempts": "failed tries that were the event's own fault",
    "outbox.crashes": "processes that died while they had this event alone",
    "outbox.last_error": "reason of the last failed try",
    "purchases.payment_id": "NULL: a gift",
    "purchases.is_active": "false: taken back; never set to true again",
    "processed_events.outcome": "see the state machine",
    "processed_events.recovered_at": "when a missing purchase was made although this mark claimed it",
    "dead_letters.created_at": "when the event was written",
    "dead_letters.reason": "see the runbook",
    "dead_letters.detail": "for people; no payload text",
    "dead_letters.state": "`open` waits for a decision",
    "dead_letters.actor": "who decided",
    "dead_letters.note": "what was decided so far, and why",
    "workers.seen_at": "the last heartbeat",
    "workers.stopped_at": "NULL and an old `seen_at`: it died",
    "workers.metrics": "its counters",
    "workers.succeeded_at": "when another worker took the place of this dead one",
    "backfill_runs.cutoff": "younger payments were not looked at",
    "backfill_runs.is_full": "all payments, not a range",
    "backfill_runs.cursor": "the last purchase made; who continues begins behind it",
    "backfill_runs.actor": "all who ran it",
    "backfill_runs.outcome": "NULL: running, or killed",
}


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {"commands.md": commands(), "settings.md": settings(), "metrics.md": metrics(), "tables.md": tables()}


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", _NOTE, *parts]) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- commands


def commands() -> str:
    return _page(
        "Commands",
        "For operators and for people who write scripts: every command, its options and its exit codes.\n"
        "`outbox-worker COMMAND --help` shows the same on the terminal.",
        "## Exit codes\n\n"
        + _table(["code", "meaning"], [[str(code), meaning] for code, meaning in COMMON_CODES.items()])
        + "\n\nErrors of the program by class:\n\n"
        + _table(["error", "exit code", "meaning"], [list(row) for row in _errors()])
        + "\n\nWith `--json` a command prints one object on stdout, also if it fails: "
        '`{"ok": false, "error": "…"}`. Logs go to stderr.',
        *(_command(name, command) for name, command in leaves()),
    )


def leaves() -> Iterator[tuple[str, Any]]:
    """Every command by its full name, in the order of ``--help``."""
    yield from _below("", typer.main.get_command(app))


def _below(prefix: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(command, TyperGroup):
        yield prefix.strip(), command
        return
    for name, each in command.commands.items():
        yield from _below(f"{prefix} {name}", each)


def _errors() -> Iterator[tuple[str, str, str]]:
    kinds = [errors.OutboxWorkerError]
    while kinds:
        kind = kinds.pop(0)
        kinds += kind.__subclasses__()
        if kind is not errors.OutboxWorkerError and "exit_code" in vars(kind):
            yield f"`{kind.__name__}`", str(kind.exit_code), _first_line(kind.__doc__)


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _command(name: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    usage = " ".join([PROGRAM, name, "[OPTIONS]", *(_argument(each) for each in arguments)])
    parts = [f"## {PROGRAM} {name}", f"`{usage}`", _paragraphs(command.help)]
    if rows := [[f"`{_argument(each)}`", "", each.help or ""] for each in arguments] + [_option(e) for e in options]:
        parts.append(_table(["option", "default", "meaning"], rows))
    parts.append("Exit codes: " + " · ".join(f"{code} {meaning}" for code, meaning in CODES[name].items()) + ".")
    return "\n\n".join(parts)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(each.split()) for each in text.split("\n\n"))


def _argument(argument: Any) -> str:
    name = f"{argument.metavar or argument.name.upper()}{'...' if argument.nargs == -1 else ''}"
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> list[str]:
    names = ", ".join(f"`{each}`" for each in [*option.opts, *option.secondary_opts])
    metavar = "" if option.is_flag else f" {_placeholder(option)}"
    default = option.opts[0] if option.default is True else option.default
    shown = "" if default in (None, False) else f"`{getattr(default, 'value', default)}`"
    return [names + metavar, shown, _with_choices(option)]


def _placeholder(option: Any) -> str:
    """As in ``--help``: what is given after the option."""
    kind = option.type_descriptor.annotation
    names = {int: "INTEGER", float: "FLOAT", Path: "PATH"}
    return str(option.metavar or names.get(kind, "NAME" if _values(kind) else "TEXT"))


def _with_choices(option: Any) -> str:
    choices = _values(option.type_descriptor.annotation)
    told = option.help or ""
    return told if all(each in told for each in choices) else f"{told} One of: {', '.join(choices)}."


def _values(kind: Any) -> list[str]:
    """Of an enumeration, or of a list of its values."""
    kind = next(iter(get_args(kind)), kind)
    return [str(value) for value in kind] if isinstance(kind, type) and issubclass(kind, StrEnum) else []


# --- settings


def settings() -> str:
    rows = [
        [f"`{_variable(name)}`", _default(field.default), _range(field), _reload(name), str(field.description)]
        for name, field in Settings.model_fields.items()
    ]
    return _page(
        "Settings",
        "For operators: every setting, its default and its limits.",
        "The first of these that names a setting wins:\n\n"
        "1. the command line;\n"
        "2. the environment, under the name in the table;\n"
        "3. a credential: a file in `$CREDENTIALS_DIRECTORY` with the lower-case name, such as `outbox_database_url`\n"
        "   (systemd's `LoadCredential=`);\n"
        "4. the TOML file that `--config` or `OUTBOX_CONFIG` names; keys are in lower case, without `OUTBOX_`\n"
        "   (sample: [deploy/outbox-worker.toml](../../deploy/outbox-worker.toml));\n"
        "5. the default.",
        "All wrong settings are reported together, by name, without their values. An unknown key in the file is an\n"
        "error (exit code 78); an unknown `OUTBOX_*` variable is a warning with the nearest name.",
        "URLs may begin with `postgres://`, `postgresql://` or `postgresql+psycopg://`; all mean psycopg 3.\n"
        "They may name several hosts (`postgresql://USER:PASSWORD@A:5432,B:5432/DATABASE`): the worker uses the one\n"
        "that takes writes, and moves to another if that one is promoted. In passwords percent-encode `@`, `/`, `#`.\n"
        "A directory of sockets is written `%2Frun%2Fpostgresql`, or as the parameter `host=/run/postgresql`.",
        _table(["variable", "default", "limits", "reload", "meaning"], rows),
        "*reload*: SIGHUP takes the new value from the file "
        "([how](../how-to/tune.md#change-limits-without-a-restart)). All others need a restart.",
    )


def _variable(name: str) -> str:
    return str(Settings.model_fields[name].validation_alias or f"OUTBOX_{name.upper()}")


def _default(value: object) -> str:
    return "" if value in (None, {}, ()) else f"`{value}`"


def _reload(name: str) -> str:
    return "yes" if name in RELOADABLE else ""


def _range(field: Any) -> str:
    if choices := _choices(field.annotation):
        return ", ".join(f"`{each}`" for each in choices)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
    found = {key: getattr(each, key) for each in field.metadata for key in signs if hasattr(each, key)}
    return ", ".join(f"{signs[key]} {value:,}" for key, value in found.items())


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(each) for each in get_args(annotation)]
    return [choice for each in get_args(annotation) for choice in _choices(each)]


# --- metrics


def metrics() -> str:
    made = Metrics()
    labels = {each._name: each._labelnames for each in vars(made).values() if hasattr(each, "_labelnames")}
    rows = []
    for family in made.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        values = [_label(key, family) for key in labels.get(family.name, ())]
        meaning = " ".join(filter(None, [f"{family.documentation.rstrip('.')}.", NOTES.get(name)]))
        rows.append([f"`{name}`", family.type, "<br>".join(values), meaning])
    return _page(
        "Metrics",
        "For people who build dashboards and alerts: every series at `/metrics`\n"
        "([where it is served](http.md), [how to scrape it](../how-to/monitor.md)).",
        "Counters and histograms are those of the process: add them up. Gauges of the database are the same in every\n"
        "worker: take `max`, not `sum`. They are computed every five seconds, not by the scrape. All series of the\n"
        "counters begin at 0. Labels never carry payload data.",
        _table(["metric", "type", "labels", "meaning"], rows),
    )


def _label(key: str, family: Any) -> str:
    values = dict.fromkeys(sample.labels[key] for sample in family.samples if key in sample.labels)
    listed = ", ".join(f"`{each}`" for each in values) if values and key != "version" else ""
    return f"`{key}`: {listed}" if listed else f"`{key}`"


# --- tables


def tables() -> str:
    built = build_tables(Settings.model_construct())
    return _page(
        "Tables",
        "For DBAs and for people who write SQL against these tables: every table, column and index under its default\n"
        "name ([other names](../how-to/adopt-a-database.md), [grants](../how-to/roles.md)).",
        "`outbox-worker migrate` creates the tables that are absent. Tables that exist are adopted: never altered,\n"
        "never dropped. Tables of ours carry a comment that says so. `outbox_worker_alembic_version` remembers the\n"
        "migrations.",
        *(_described(role, table) for role, table in built.by_role().items()),
        "## Indexes and triggers of the optional migrations\n\n"
        "| made by | name | what |\n| --- | --- | --- |\n"
        "| `core` | `purchases_active_student_course_idx` | `(student_id, course_id) WHERE is_active`, not unique; "
        "dropped when the unique one is built |\n"
        "| `migrate --with unique_index` | `purchases_active_student_course_key` | the same, unique: the guard "
        "`index` |\n"
        "| `migrate --with notify` | `outbox_worker_notify` | a statement-level trigger and its function: producers' "
        "COMMIT wakes a worker |",
    )


def _described(role: str, table: Table) -> str:
    rows = [[f"`{column.name}`", *_shape(column), MEANINGS.get(f"{role}.{column.key}", "")] for column in table.columns]
    indexes = [f"- `{_indexed(each)}`" for each in sorted(table.indexes, key=lambda index: str(index.name))]
    parts = [f"## {role}", TABLES[role], _table(["column", "type", "null", "default", "key", "meaning"], rows)]
    if indexes:
        parts.append("\n".join(["Indexes besides the keys:", "", *indexes]))
    return "\n\n".join(parts)


def _shape(column: Column[Any]) -> list[str]:
    kind = column.type.compile(dialect=postgresql.dialect())  # type: ignore[no-untyped-call]
    default = "identity" if column.identity else getattr(getattr(column.server_default, "arg", None), "text", "")
    key = "primary" if column.primary_key else "unique" if column.unique else ""
    return [
        f"`{kind.lower()}`{_allowed(column)}",
        "yes" if column.nullable else "",
        f"`{default}`" if default else "",
        key,
    ]


def _allowed(column: Column[Any]) -> str:
    """The values that a CHECK names."""
    assert column.table is not None  # noqa: S101 - a column of a table
    for each in column.table.constraints:
        if isinstance(each, CheckConstraint) and str(each.name).endswith(f"_{column.name}_check"):
            return ": " + ", ".join(f"`{value}`" for value in re.findall(r"'(\w+)'", str(each.sqltext)))
    return ""


def _indexed(index: Any) -> str:
    statement = str(CreateIndex(index).compile(dialect=postgresql.dialect()))  # type: ignore[no-untyped-call]
    return statement.removeprefix("CREATE INDEX ").replace("public.", "")


if __name__ == "__main__":
    for name, page in pages().items():
        (HERE / name).write_text(page, encoding="utf-8")
