"""Write the pages of docs/reference whose facts are in the code: commands, settings, metrics and tables.

``make reference`` runs this script. A test fails if a committed page differs from what the script would write.
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

# the facts on the pages come from these modules
from outbox_worker import errors
from outbox_worker.cli.app import app
from outbox_worker.schema.tables import build_tables
from outbox_worker.settings import RELOADABLE, Settings
from outbox_worker.telemetry.metrics import Metrics

HERE = Path(__file__).parent
_NOTE = "<!-- Written by `make reference`; do not edit. -->"

PROGRAM = "outbox-worker"
_NOT_DECIDED = (
    "nothing was changed, because a dead letter does not exist, was decided already, or has changed since the preview"
)
CODES: Mapping[str, Mapping[int, str]] = {
    "run": {
        0: "a signal stopped it, or `--drain` settled all due events",
        1: "`--drain` ended while other transactions still locked some due events, or while due events were set aside",
        69: "no connection, only with `--drain`; without `--drain` the worker waits for the database",
    },
    "healthcheck": {
        0: "the worker is healthy",
        1: "the worker answers that it is not healthy, with the reason",
        69: "the worker does not answer within five seconds",
        78: "the address of the worker is unknown, because `OUTBOX_HTTP_LISTEN` is `off` or has port 0",
    },
    "migrate": {
        0: "all tables and indexes exist",
        1: "the unique index cannot be built, because some pairs have two active purchases, or because purchases is "
        "partitioned; nothing was changed",
        78: "the worker cannot use an existing table, or the role may not change the schema",
    },
    "status": {0: "the status was shown"},
    "audit": {
        0: "no purchase is owed",
        1: "a payment is unexplained, cannot be judged, has an unknown status, or is refunded but its purchase is "
        "active; or a student has two active purchases of a course",
    },
    "doctor": {0: "it found no problem, but perhaps warnings", 1: "it found at least one problem"},
    "backfill": {
        0: "no purchase is owed any more",
        1: "more purchases are owed than `--max-repairs` and none was created, or a purchase could not be created, "
        "or a payment cannot be judged",
    },
    "why": {0: "it was found", 1: "no event, payment, purchase or student has this id"},
    "demo": {
        0: "the audit explained every payment, or Ctrl-C ended the demonstration",
        1: "a payment stayed unexplained, or a purchase was created twice",
    },
    "bench": {
        0: "the measurement is complete",
        1: "the database of the benchmark has tables that the benchmark did not create",
    },
    "files": {0: "the list or the file was printed", 2: "there is no file with this name"},
    "psql": {0: "psql succeeded; if psql failed, the exit code is that of psql"},
    "duplicates list": {0: "the list was printed, even if it is empty"},
    "dead-letters list": {0: "the list was printed, even if it is empty"},
    "dead-letters show": {0: "the dead letter was found", 1: "no dead letter has this id"},
    "dead-letters requeue": {0: "the events are due again", 1: f"{_NOT_DECIDED}; or some letters stay open"},
    "dead-letters discard": {0: "the dead letters are closed", 1: f"{_NOT_DECIDED}; or some letters stay open"},
}
"""The exit codes that have a special meaning for one command. ``COMMON_CODES`` contains those of all commands."""

COMMON_CODES: Mapping[int, str] = {
    0: "the command succeeded",
    1: "the command found a problem, or refused to act",
    2: "the command line is wrong",
    69: "there is no connection, because host, port or password is wrong or the server accepts no connections; or "
    "the command writes, but the server is a standby; or the database did not answer in time, because of a lock or a "
    "time limit",
    70: "an error in the program itself, which the command asks you to report",
    78: "a setting, URL, table, column or privilege is wrong; the message names it and the remedy",
    130: "Ctrl-C interrupted the command (`run` and `demo` end with 0 instead)",
}

NOTES: Mapping[str, str] = {
    "outbox_events_total": "All event types that the worker cannot handle count as `other`.",
    "outbox_dead_letters_total": "A dead letter stays counted after a person has decided it; "
    "`outbox_open_dead_letters` counts only open ones.",
    "outbox_transactions_total": "`unknown` means that the connection broke during COMMIT.",
    "outbox_unexplained_payments": "The last backfill found and left these payments; NaN before the first backfill.",
    "outbox_value_at_risk": "The value is in units of the currency, for example euros.",
    "outbox_ignored_events": "The worker counts them among the 100,000 oldest events, at its start and every five "
    "minutes.",
    "outbox_set_aside_events": "`status` and `doctor` name these events and the cause.",
    "outbox_guard": "The guard that is not in use has 0.",
    "outbox_since_poll_seconds": "The value is computed at each scrape.",
    "outbox_vacuum_horizon_seconds": "The time since this worker first saw the transaction that holds vacuum back.",
}
"""Sentences that the page adds to the exported help text of a metric."""

TABLES: Mapping[str, str] = {
    "payments": "The payments service writes this table; the worker only reads it.",
    "outbox": "Events that are not settled yet. Producers insert them; the worker claims, postpones and deletes them.",
    "purchases": "If a purchase is active, the student may use the course.",
    "processed_events": "One row, called a mark, for each event that has reached its final outcome.",
    "dead_letters": "Events that wait for a person's decision, and the decisions that were made.",
    "workers": "One row for each worker process of the last day. `status` reads these rows. A new worker also reads "
    "them, to find out whether an earlier worker died.",
    "backfill_runs": "The payments that each backfill checked and the purchases that it created: all backfills "
    "by hand, and the periodic ones of the last week.",
}
MEANINGS: Mapping[str, str] = {
    "payments.updated_at": "the worker does not read it",
    "outbox.event_id": "the producer's id of the event",
    "outbox.event_type": "`PURCHASE_CONFIRMED` or `PURCHASE_REFUNDED`; other types: see `OUTBOX_UNKNOWN_TYPES`",
    "outbox.payload": "`payment_id` is required; `student_id`, `course_id`, `amount`, `currency` are checked if given",
    "outbox.headers": "the worker reads only `traceparent`, for log records",
    "outbox.due_at": "the worker claims the event only after this time; claims are in the order `(due_at, id)`",
    "outbox.attempts": "number of failed attempts that the event itself caused",
    "outbox.crashes": "number of worker processes that provably died while they processed only this event",
    "outbox.last_error": "why the last attempt failed",
    "purchases.id": "grows with time (UUIDv7); before PostgreSQL 18, an expression with the same effect",
    "purchases.payment_id": "NULL means that the purchase is a gift",
    "purchases.is_active": "false means that the purchase was taken back; the worker never sets it to true again",
    "processed_events.outcome": "the [final outcome](../explanation/state-machine.md) of the event",
    "processed_events.recovered_at": "when the worker created the purchase that was missing in spite of this mark",
    "dead_letters.created_at": "when the event was written",
    "dead_letters.reason": "one of the [reasons](../how-to/dead-letters.md#2-remove-the-cause)",
    "dead_letters.detail": "an explanation for people, without text from the payload",
    "dead_letters.state": "`open` means that nobody has decided yet",
    "dead_letters.actor": "the person who decided",
    "dead_letters.note": "all decisions so far, with their reasons",
    "workers.seen_at": "the time of the last heartbeat",
    "workers.stopped_at": "if this is NULL and `seen_at` is old, the worker has died",
    "workers.metrics": "the counters of the process",
    "workers.succeeded_at": "when a new worker took over from this dead worker",
    "workers.isolated_event": "`outbox.id` of the event that the process settles alone, because it may kill a process",
    "workers.isolated_at": "since when the process settles that event alone",
    "workers.isolated_timeline": "the server's timeline at that time; each failover begins a new timeline",
    "workers.set_aside": "the events that this process excludes from claims, because the database refuses to record or "
    "remove them; each with its `outbox.id`",
    "backfill_runs.cutoff": "payments created after this time were not checked",
    "backfill_runs.is_full": "true if all payments were checked, false if only a range was",
    "backfill_runs.cursor": "the last purchase created; a backfill that continues this run begins after it",
    "backfill_runs.actor": "all persons who ran it",
    "backfill_runs.outcome": "NULL means that the backfill is running or was killed",
}


def pages() -> dict[str, str]:
    """Return the generated pages by file name."""
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
        + "\n\nThe classes of errors and their exit codes:\n\n"
        + _table(["error", "exit code", "meaning"], [list(row) for row in _errors()])
        + "\n\nWith `--json` a command prints one JSON object on stdout. If it fails, the object is "
        '`{"ok": false, "error": "…"}`. Log records are written to stderr.',
        *(_command(name, command) for name, command in leaves()),
    )


def leaves() -> Iterator[tuple[str, Any]]:
    """Yield every command with its full name, in the order of ``--help``."""
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
    """Return the placeholder for the option's value, as ``--help`` shows it."""
    kind = option.type_descriptor.annotation
    names = {int: "INTEGER", float: "FLOAT", Path: "PATH"}
    return str(option.metavar or names.get(kind, "NAME" if _values(kind) else "TEXT"))


def _with_choices(option: Any) -> str:
    choices = _values(option.type_descriptor.annotation)
    told = option.help or ""
    return told if all(each in told for each in choices) else f"{told} One of: {', '.join(choices)}."


def _values(kind: Any) -> list[str]:
    """Return the values of an enumeration, or of the enumeration in a list type; empty for any other type."""
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
        "If a setting is given in several places, the first of these has priority:\n\n"
        "1. the command line;\n"
        "2. the environment, under the name in the table;\n"
        "3. a credential, which is a file in `$CREDENTIALS_DIRECTORY` with the variable's name in lower case, such as\n"
        "   `outbox_database_url` (systemd's `LoadCredential=` creates it);\n"
        "4. the TOML file that `--config` or `OUTBOX_CONFIG` names; its keys are the variables' names in lower case,\n"
        "   without `OUTBOX_` (sample: [deploy/outbox-worker.toml](../../deploy/outbox-worker.toml));\n"
        "5. the default.",
        "If several settings are wrong, one message names all of them, without their values. An unknown key in the\n"
        "file is an error (exit code 78). For an unknown `OUTBOX_*` variable the command logs a warning with the most\n"
        "similar name.",
        "URLs may begin with `postgres://`, `postgresql://` or `postgresql+psycopg://`; the worker always uses\n"
        "psycopg 3. If a URL names several hosts (`postgresql://USER:PASSWORD@A:5432,B:5432/DATABASE`), the worker\n"
        "uses the host that accepts writes. If another host is promoted, the worker connects to that host.\n"
        "In passwords, percent-encode `@`, `/`, `#` and `%`. If the server listens on a Unix socket, write the\n"
        "directory of the socket as the host, `%2Frun%2Fpostgresql`, or as the parameter `host=/run/postgresql`.",
        _table(["variable", "default", "limits", "reload", "meaning"], rows),
        "Settings with *yes* under *reload* can be changed without a restart: write the new value into the file and\n"
        "send SIGHUP ([how](../how-to/tune.md#change-limits-without-a-restart)). After a change of any other setting,\n"
        "restart the worker.",
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
        "Each worker process has counters and histograms of its own, so use `sum` over all workers. Gauges that come\n"
        "from the database are the same in every worker, so use `max`. The worker updates these gauges every five\n"
        "seconds, not at each scrape. All counters exist from the start of the process, with the value 0. No label\n"
        "contains payload data.",
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
        "`outbox-worker migrate` creates the tables that are missing, each with a comment that names its origin. It\n"
        "adopts the tables that exist: it never alters or drops them. The table `outbox_worker_alembic_version`\n"
        "records which migrations have been applied. `outbox_worker_tables` lists the tables that these migrations\n"
        "created.",
        *(_described(role, table) for role, table in built.by_role().items()),
        "## Indexes and triggers of the optional migrations\n\n"
        "| made by | name | what |\n| --- | --- | --- |\n"
        "| `core` | `purchases_active_student_course_idx` | `(student_id, course_id) WHERE is_active`, not unique; "
        "dropped when the unique index is built |\n"
        "| `migrate --with unique_index` | `purchases_active_student_course_key` | the same columns and condition, but "
        "unique; with this index the guard is `index` |\n"
        "| `migrate --with notify` | `outbox_worker_notify` | a statement-level trigger and its function, which notify "
        "the workers when a producer commits |",
    )


def _described(role: str, table: Table) -> str:
    rows = [[f"`{column.name}`", *_shape(column), MEANINGS.get(f"{role}.{column.key}", "")] for column in table.columns]
    indexes = [f"- `{_indexed(each)}`" for each in sorted(table.indexes, key=lambda index: str(index.name))]
    parts = [f"## {role}", TABLES[role], _table(["column", "type", "null", "default", "key", "meaning"], rows)]
    if indexes:
        parts.append("\n".join(["Indexes other than those of the keys:", "", *indexes]))
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
    """Return the values that the column's CHECK constraint allows, after a colon; empty without such a constraint."""
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
