"""Checks the privileges of the session's role, and whether row security hides rows from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, Table, text

from outbox_worker.diagnose.doctor.finding import Finding, Subject, ok, problem, unseen, warning
from outbox_worker.schema.catalogue import is_list_closed
from outbox_worker.schema.privileges import OPERATING, PRIVILEGES, READING, STRUCTURE, Privileges, RoleKind
from outbox_worker.schema.requirements import find_problems
from outbox_worker.schema.tables import ownership_list, relation_name

_GRANTS = (
    "create the worker's role with grants.sql, which grants exactly the privileges that a worker needs "
    "(`outbox-worker files grants.sql` prints the file)"
)
_NEEDED: Mapping[RoleKind, Privileges] = {
    RoleKind.WORKER: PRIVILEGES,
    RoleKind.OPERATOR: OPERATING,
    RoleKind.READER: READING,
}

# what: the role's attributes, and its privileges on the database and on schemas · lock: none
# index: the catalogue's indexes
_ROLE = text(
    """
    SELECT rolsuper AS is_superuser,
           array_remove(ARRAY[
               CASE WHEN rolcreaterole THEN 'CREATEROLE' END, CASE WHEN rolcreatedb THEN 'CREATEDB' END,
               CASE WHEN rolreplication THEN 'REPLICATION' END, CASE WHEN rolbypassrls THEN 'BYPASSRLS' END,
               CASE WHEN has_database_privilege(current_database(), 'CREATE') THEN 'CREATE on the database' END,
               CASE WHEN has_database_privilege(current_database(), 'TEMPORARY')
                    THEN 'TEMPORARY on the database' END], NULL)
           || ARRAY(SELECT 'CREATE on the schema ' || quote_ident(nspname) FROM pg_namespace
                    WHERE nspname = ANY(CAST(:schemas AS text[])) AND has_schema_privilege(oid, 'CREATE')
                    ORDER BY nspname) AS may
    FROM pg_roles WHERE rolname = current_user
    """
)

# what: whether the role owns a table, and which privileges it has on the whole table · lock: none
# index: the catalogue's
_TABLE = text(
    """
    SELECT pg_has_role(relowner, 'USAGE') AS is_owner,
           ARRAY(SELECT privilege FROM unnest(CAST(:privileges AS text[])) WITH ORDINALITY AS p (privilege, position)
                 WHERE has_table_privilege(pg_class.oid, privilege) ORDER BY position) AS may
    FROM pg_class WHERE oid = to_regclass(:relation)
    """
)

# what: the policies of a table that apply to the role · lock: none · index: the catalogue's indexes
_POLICIES = text(
    """
    SELECT CAST(polname AS text) AS name, CAST(polcmd AS text) AS command, polpermissive AS is_permissive,
           coalesce(pg_get_expr(polqual, polrelid), 'true') = 'true'
           AND coalesce(pg_get_expr(polwithcheck, polrelid), 'true') = 'true' AS is_for_all_rows
    FROM pg_policy
    WHERE polrelid = to_regclass(:relation)
      AND EXISTS (SELECT FROM unnest(polroles) AS r (oid)
                  WHERE CASE WHEN r.oid = 0 THEN true ELSE pg_has_role(r.oid, 'USAGE') END)
    ORDER BY polname
    """
)

_ANY_PRIVILEGE = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")
_COMMANDS: Mapping[str, str] = {"SELECT": "r", "INSERT": "a", "UPDATE": "w", "DELETE": "d"}
"""Maps each command to its letter in ``pg_policy``. There, ``*`` stands for all commands."""


def grants(subject: Subject) -> Iterator[Finding]:
    """Report the privileges that the role needs but does not have.

    If the role is a worker's, also report privileges that it does not need. The role of an operator
    or a reader needs only the privileges for the commands of this role.
    """
    session, tables, kind = subject.session, subject.tables, subject.kind_of_role()
    elsewhere = find_problems(session, tables, STRUCTURE)
    lacking = [each for each in find_problems(session, tables, _NEEDED[kind]) if each not in elsewhere]
    yield from (problem(each.finding, each.remedy) for each in lacking)
    if is_list_closed(session, tables.outbox):
        name = relation_name(ownership_list(tables.outbox))
        yield warning(
            f"{subject.role} may not read {name}, so only the comments of tables show which tables migrate created",
            "run deploy/grants.sql again, as after every migrate; or as its owner: "
            f"GRANT SELECT ON {name} TO {subject.role};",
        )
    role = subject.role
    if kind is not RoleKind.WORKER:
        yield unseen(
            f"the role {role} is not a worker's but {_ARTICLES[kind]}'s, so this command did not check the privileges "
            "of the worker's role",
            "run doctor as the worker's role, with that role's URL in OUTBOX_DATABASE_URL",
        )
    elif subject.settings.embedded_directory is not None:
        yield ok("the private PostgreSQL has only one role, which has all privileges")
    elif excess := list(_excess(subject)):
        yield warning(f"the role {role} has privileges that it does not need: {'; '.join(excess)}", _GRANTS)
    elif not lacking:
        yield ok(f"the role {role} has exactly the privileges that it needs")


_ARTICLES = {RoleKind.OPERATOR: "an operator", RoleKind.READER: "a reader"}


def _excess(subject: Subject) -> Iterator[str]:
    tables = subject.tables.by_role()
    schemas = sorted({str(table.schema) for table in tables.values()})
    role = subject.session.execute(_ROLE, {"schemas": schemas}).one()
    if role.is_superuser:
        yield "it is a superuser"
        return
    yield from role.may
    found = {key: row for key, table in tables.items() if (row := _rights(subject, table)) is not None}
    if owned := [relation_name(tables[key]) for key, row in found.items() if row.is_owner]:
        yield f"it owns {', '.join(owned)}"
    for key, row in found.items():
        spare = [each for each in row.may if PRIVILEGES[key].get(each, ("",)) != ()]
        if spare and not row.is_owner:
            yield f"{', '.join(spare)} on all of {relation_name(tables[key])}"


def _rights(subject: Subject, table: Table) -> Row[Any] | None:
    asked = {"relation": relation_name(table), "privileges": list(_ANY_PRIVILEGE)}
    return subject.session.execute(_TABLE, asked).one_or_none()


def row_security(subject: Subject) -> Iterator[Finding]:
    """Check whether row level security hides rows from the role.

    A worker never claims a hidden event, and the database raises no error.
    """
    needed = _NEEDED[subject.kind_of_role()]
    active = [
        (key, table)
        for key, table in subject.present().items()
        if subject.session.scalar(text("SELECT row_security_active(:name)"), {"name": relation_name(table)})
    ]
    if not active:
        yield ok("no row security applies to this role")
    for key, table in active:
        yield _through_policies(subject, table, needed[key])


def _through_policies(subject: Subject, table: Table, commands: Collection[str]) -> Finding:
    name, role = relation_name(table), subject.role
    policies = subject.session.execute(_POLICIES, {"relation": name}).all()
    permissive = [each for each in policies if each.is_permissive]
    barred = _not_among(permissive, commands)
    remedy = f"as its owner: {_policy_for(name, role, commands)}"
    if barred:
        return problem(
            f"row security on {name} has no policy for {', '.join(barred)} by {role}: the database hides rows "
            "without an error, or refuses to write them",
            remedy,
        )
    restrictive = [each.name for each in policies if not (each.is_permissive or each.is_for_all_rows)]
    if restrictive or _not_among([each for each in permissive if each.is_for_all_rows], commands):
        return warning(
            f"row security on {name} shows {role} only rows that these policies allow: "
            f"{', '.join(each.name for each in policies)}; the worker never settles events that it cannot see",
            f"check that these policies allow all rows of the shop, or {remedy}",
        )
    return ok(f"row security on {name} allows all rows")


def _policy_for(name: str, role: str, commands: Collection[str]) -> str:
    """Return the statement that creates a policy for all rows. If the role only reads, the policy allows only reads."""
    if set(commands) == {"SELECT"}:
        return f"CREATE POLICY outbox_reader ON {name} FOR SELECT TO {role} USING (true);"
    return f"CREATE POLICY outbox_worker ON {name} TO {role} USING (true) WITH CHECK (true);"


def _not_among(policies: Sequence[Row[Any]], needed: Collection[str]) -> list[str]:
    """Return the needed commands that no policy allows."""
    commands = {each.command for each in policies}
    return [each for each in needed if not commands & {_COMMANDS[each], "*"}]
