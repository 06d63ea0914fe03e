"""Finds out why the database refuses writes of the worker, or ignores them without an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy import Table, text

from outbox_worker.diagnose.doctor.finding import Finding, Subject, ok, problem, warning
from outbox_worker.schema.interference import interference, last_and_largest, sequences, set_sequence
from outbox_worker.schema.shapes import rules_against_upserts
from outbox_worker.schema.tables import relation_name
from outbox_worker.store.workers import read_set_aside

_SHOWN = 5

_COMMANDS: Mapping[str, Sequence[str]] = {
    "outbox": ("DELETE", "UPDATE"),
    "purchases": ("INSERT", "UPDATE"),
    "processed_events": ("INSERT",),
    "dead_letters": ("INSERT", "UPDATE"),
}
"""Maps each table to the SQL commands with which the worker writes it."""

# what: whether a publication has the table, but no key identifies the rows of the table. If so,
# UPDATE or DELETE on the table fails
# lock: none · index: the catalogue's indexes
_UNIDENTIFIED = text(
    """
    SELECT EXISTS (SELECT FROM pg_publication p JOIN pg_publication_tables t ON t.pubname = p.pubname
                   WHERE to_regclass(format('%I.%I', t.schemaname, t.tablename)) = c.oid
                     AND (p.pubupdate OR p.pubdelete))
           AND (c.relreplident = 'n'
                OR c.relreplident = 'd' AND NOT EXISTS (SELECT FROM pg_index
                                                        WHERE indrelid = c.oid AND indisprimary AND indisvalid)
                OR c.relreplident = 'i' AND NOT EXISTS (SELECT FROM pg_index
                                                        WHERE indrelid = c.oid AND indisreplident AND indisvalid))
           AS is_unidentified,
           EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary AND indisvalid) AS has_key
    FROM pg_class c WHERE c.oid = to_regclass(:relation)
    """
)


def set_aside(subject: Subject) -> Iterator[Finding]:
    """Report events that workers have set aside (excluded from claims), with the database's
    errors."""
    by_refusal: dict[str, list[str]] = {}
    for key, refusal in read_set_aside(subject.session, subject.tables).items():
        by_refusal.setdefault(refusal, []).append(str(key))
    for refusal, ids in by_refusal.items():
        more = ", …" if len(ids) > _SHOWN else ""
        yield problem(
            f"{len(ids)} events are set aside (outbox.id {', '.join(ids[:_SHOWN])}{more}): {refusal}",
            "remove the cause; the worker tries these events again within ten minutes, and when it is restarted",
        )
    if not by_refusal:
        yield ok("no event is set aside")


def swallowed(subject: Subject) -> Iterator[Finding]:
    """Report triggers and rules that swallow writes of the worker.

    A swallowed write changes no row and raises no error. This check omits the rules that the check
    ``tables`` reports. Such a rule prevents every INSERT … ON CONFLICT of the worker.
    """
    clean = True
    for role, table in subject.present().items():
        told = rules_against_upserts(subject.session, role, table)
        for command in _COMMANDS.get(role, ()):
            for each in interference(subject.session, table, command):
                if each.swallows and not (each.is_rule and each.name in told):
                    clean = False
                    yield _swallower(table, command, str(each), lets_none_through=each.lets_none_through)
    if clean:
        yield ok("no trigger or rule suppresses the worker's writes")


def _swallower(table: Table, command: str, named: str, *, lets_none_through: bool) -> Finding:
    name = relation_name(table)
    if lets_none_through:
        return problem(
            f"{named} on {name} swallows {command}: no row changes, so the worker settles no event",
            f"let {named} pass the rows on (RETURN OLD for DELETE, RETURN NEW otherwise), or remove it",
        )
    return warning(
        f"{named} on {name} may swallow {command} for some rows; the worker then stops claiming these events",
        f"check that {named} passes on every row that the worker writes",
    )


def replica_identity(subject: Subject) -> Iterator[Finding]:
    """Report published tables that have no replica identity.

    UPDATE and DELETE on such a table fail.
    """
    clean = True
    for table in subject.present().values():
        name = relation_name(table)
        row = subject.session.execute(_UNIDENTIFIED, {"relation": name}).one()
        if row.is_unidentified:
            clean = False
            identity = "DEFAULT" if row.has_key else "FULL"
            yield problem(
                f"{name} is published, but has no replica identity: UPDATE and DELETE on it fail",
                f"as its owner: ALTER TABLE {name} REPLICA IDENTITY {identity};",
            )
    if clean:
        yield ok("every published table has a replica identity")


def sequences_behind(subject: Subject) -> Iterator[Finding]:
    """Report sequences whose next value is a key that a row already has."""
    clean = True
    for role, table in subject.present().items():
        for column, sequence in sequences(subject.session, table).items() if role != "payments" else ():
            last, largest = last_and_largest(subject.session, table, column, sequence)
            if last is not None and largest is not None and largest > last:
                clean = False
                yield problem(
                    f"{sequence} is behind: its value is {last}, but {relation_name(table)} has {column} {largest}",
                    f"as its owner: {set_sequence(table, column, sequence)}",
                )
    if clean:
        yield ok("no sequence is behind its column, as far as the role can see")
