-- Creates the roles of the purchase outbox worker. Grants each role exactly the privileges that it needs.
--
--     outbox-worker files grants.sql | psql -d DATABASE
--
-- Run this file before the first `outbox-worker migrate`, and again after every migrate. The first
-- run creates roles. Each later run grants privileges on the tables that migrate has created. You
-- can run this file at any time. Each run also revokes the privileges that an older version of this
-- file granted. The file is one transaction. Run it as a superuser, or as the database's owner. The
-- owner must have CREATEROLE, and must be allowed to grant privileges on tables that other roles
-- own.
--
-- Set the passwords yourself, for example with \password outbox_worker.
--
-- If your tables or columns have other names, give these names as variables:
--
--     outbox-worker files grants.sql | psql -d DATABASE -v schema=shop -v worker=shop_worker \
--         -v payments=billing.payment \
--         -v payments_read='id, user_id, product_id, amount, currency, status, created_at'
--
-- Write a table as in OUTBOX_TABLES (Shop.Payment), or as in SQL, with double quotes
-- ('"Shop"."Payment"'). Write columns as in SQL ('id, "userId"'). Write a role or schema with or
-- without double quotes. In both forms, upper and lower case are different.
--
-- With -v pg_read_all_stats=yes, the reader can also see the sessions of other roles. `doctor`
-- needs this for its check `horizon`. The reader then also sees the queries of all sessions. Only a
-- superuser can grant this privilege.
--
-- If the worker's tables exist already, name their owner with -v owner=ROLE. This file never
-- changes the owner of a table.

\set ON_ERROR_STOP on
\set QUIET on

-- owner: owns the tables, cannot log in · migrator: runs migrate as the owner · worker: run, doctor
-- reader: status, audit, duplicates · operator: dead-letters requeue and discard, backfill
\if :{?owner}    \else \set owner    outbox_owner    \endif
\if :{?migrator} \else \set migrator outbox_migrator \endif
\if :{?worker}   \else \set worker   outbox_worker   \endif
\if :{?reader}   \else \set reader   outbox_reader   \endif
\if :{?operator} \else \set operator outbox_operator \endif

\if :{?schema} \else \set schema public \endif

-- what: removes the double quotes from the names of roles and schema, because the statements below add them again
SELECT max(plain) FILTER (WHERE variable = 'owner') AS owner,
       max(plain) FILTER (WHERE variable = 'migrator') AS migrator,
       max(plain) FILTER (WHERE variable = 'worker') AS worker,
       max(plain) FILTER (WHERE variable = 'reader') AS reader,
       max(plain) FILTER (WHERE variable = 'operator') AS operator,
       max(plain) FILTER (WHERE variable = 'schema') AS schema
FROM (SELECT variable, CASE WHEN given LIKE '"%"' THEN (parse_ident(given))[1] ELSE given END AS plain
      FROM (VALUES ('owner', :'owner'), ('migrator', :'migrator'), ('worker', :'worker'), ('reader', :'reader'),
                   ('operator', :'operator'), ('schema', :'schema')) AS variables (variable, given)) AS names \gset

-- the tables
SELECT set_config('search_path', format('pg_catalog, %I, pg_temp', :'schema'), false) AS search_path \gset
\if :{?payments}         \else \set payments         payments         \endif
\if :{?outbox}           \else \set outbox           outbox           \endif
\if :{?purchases}        \else \set purchases        purchases        \endif
\if :{?processed_events} \else \set processed_events processed_events \endif
\if :{?dead_letters}     \else \set dead_letters     dead_letters     \endif
\if :{?workers}          \else \set workers          workers          \endif
\if :{?backfill_runs}    \else \set backfill_runs    backfill_runs    \endif
-- the list of the tables that migrate created
\set ownership_list outbox_worker_tables

-- what: writes the names of tables as SQL does; if a table exists only under the name in lower case, uses that name
SELECT max(written) FILTER (WHERE variable = 'payments') AS payments,
       max(written) FILTER (WHERE variable = 'outbox') AS outbox,
       max(written) FILTER (WHERE variable = 'purchases') AS purchases,
       max(written) FILTER (WHERE variable = 'processed_events') AS processed_events,
       max(written) FILTER (WHERE variable = 'dead_letters') AS dead_letters,
       max(written) FILTER (WHERE variable = 'workers') AS workers,
       max(written) FILTER (WHERE variable = 'backfill_runs') AS backfill_runs
FROM (SELECT variable,
             CASE WHEN given LIKE '%"%' THEN given
                  WHEN to_regclass(exact) IS NULL AND to_regclass(lower(exact)) IS NOT NULL THEN lower(exact)
                  ELSE exact END AS written
      FROM (VALUES ('payments', :'payments'), ('outbox', :'outbox'), ('purchases', :'purchases'),
                   ('processed_events', :'processed_events'), ('dead_letters', :'dead_letters'),
                   ('workers', :'workers'), ('backfill_runs', :'backfill_runs')) AS variables (variable, given),
           concat(quote_ident(substring(given FROM '^(.*)[.]')) || '.',
                  quote_ident(substring(given FROM '[^.]*$'))) AS exact) AS names \gset

-- the columns of payments that roles read, and the columns of other tables that roles update
\if :{?payments_read} \else
    \set payments_read 'id, student_id, course_id, amount, currency, status, created_at'
\endif
\if :{?outbox_updated} \else \set outbox_updated 'due_at, attempts, crashes, last_error' \endif
\if :{?purchases_updated} \else \set purchases_updated 'is_active, deactivated_at' \endif
\if :{?processed_events_updated} \else \set processed_events_updated 'outcome, payment_id, recovered_at' \endif
\if :{?dead_letters_buried} \else
    \set dead_letters_buried 'event_type, payload, headers, created_at, payment_id, attempts, reason, detail, dead_at'
\endif
\if :{?dead_letters_resolved} \else \set dead_letters_resolved 'state, resolved_at' \endif
\if :{?dead_letters_decided} \else \set dead_letters_decided 'actor, note' \endif
\if :{?workers_updated} \else
    \set workers_updated 'seen_at, stopped_at, guard, metrics, succeeded_at, set_aside'
    \set workers_updated :workers_updated ', isolated_event, isolated_at, isolated_timeline'
\endif
\if :{?backfill_runs_updated} \else
    \set backfill_runs_updated 'seen_at, finished_at, cursor, counts, host, pid, outcome'
\endif

BEGIN;
SET LOCAL client_min_messages = warning;

-- what: creates the roles that are missing
SELECT format('CREATE ROLE %I %s', name, kind)
FROM (VALUES (:'owner', 'NOLOGIN'), (:'migrator', 'LOGIN'), (:'worker', 'LOGIN'), (:'reader', 'LOGIN'),
             (:'operator', 'LOGIN')) AS wanted (name, kind)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

-- what: grants memberships; the owner needs the worker's role, because migrate also checks the worker's privileges
GRANT :"owner" TO :"migrator";
GRANT :"worker" TO :"owner";
SELECT format('GRANT %I TO CURRENT_USER', :'owner') WHERE NOT pg_has_role(:'owner', 'USAGE') \gexec

-- what: grants rights on database and schema; revokes from PUBLIC the right to create temporary tables
REVOKE TEMPORARY ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO :"migrator", :"worker", :"reader", :"operator";
CREATE SCHEMA IF NOT EXISTS :"schema";
REVOKE CREATE ON SCHEMA :"schema" FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA :"schema" TO :"owner";
GRANT USAGE ON SCHEMA :"schema" TO :"worker", :"reader", :"operator";

-- what: sets a search path of schemas in which nobody else can create objects
SELECT format('ALTER ROLE %I IN DATABASE %I SET search_path = pg_catalog, %I, pg_temp',
              name, current_database(), :'schema')
FROM unnest(ARRAY[:'migrator', :'worker', :'reader', :'operator']) AS name \gexec
SELECT format('ALTER ROLE %I IN DATABASE %I SET role = %I', :'migrator', current_database(), :'owner') \gexec

-- what: revokes all earlier privileges on the tables; only the privileges granted below remain
SELECT format('REVOKE ALL ON %s FROM %I, %I, %I', to_regclass(name), :'worker', :'reader', :'operator')
FROM unnest(ARRAY[:'payments', :'outbox', :'purchases', :'processed_events', :'dead_letters', :'workers',
                  :'backfill_runs', :'ownership_list']) AS name
WHERE to_regclass(name) IS NOT NULL \gexec

-- what: grants USAGE on the schemas of tables that are not in the worker's schema
SELECT DISTINCT format('GRANT USAGE ON SCHEMA %s TO %I, %I, %I', relnamespace::regnamespace, :'worker', :'reader',
                       :'operator')
FROM unnest(ARRAY[:'payments', :'outbox', :'purchases', :'processed_events', :'dead_letters', :'workers',
                  :'backfill_runs', :'ownership_list']) AS name
JOIN pg_class ON pg_class.oid = to_regclass(name)
WHERE relnamespace::regnamespace::text <> quote_ident(:'schema') \gexec

-- what: grants the privileges of each role, table by table
SELECT format('GRANT %s ON %s TO %I', privileges, to_regclass(name), grantee)
FROM (VALUES
    (:'worker', :'payments', 'SELECT (' || :'payments_read' || ')'),
    (:'worker', :'outbox', 'SELECT, UPDATE (' || :'outbox_updated' || '), DELETE'),
    (:'worker', :'purchases', 'SELECT, INSERT, UPDATE (' || :'purchases_updated' || ')'),
    (:'worker', :'processed_events', 'SELECT, INSERT, UPDATE (' || :'processed_events_updated' || ')'),
    (:'worker', :'dead_letters',
     'SELECT, INSERT, UPDATE (' || :'dead_letters_buried' || ', ' || :'dead_letters_resolved' || ')'),
    (:'worker', :'workers', 'SELECT, INSERT, UPDATE (' || :'workers_updated' || '), DELETE'),
    (:'worker', :'backfill_runs', 'SELECT, INSERT, UPDATE (' || :'backfill_runs_updated' || '), DELETE'),
    (:'worker', :'ownership_list', 'SELECT'),

    (:'reader', :'payments', 'SELECT (' || :'payments_read' || ')'),
    (:'reader', :'outbox', 'SELECT'),
    (:'reader', :'purchases', 'SELECT'),
    (:'reader', :'processed_events', 'SELECT'),
    (:'reader', :'dead_letters', 'SELECT'),
    (:'reader', :'workers', 'SELECT'),
    (:'reader', :'backfill_runs', 'SELECT'),
    (:'reader', :'ownership_list', 'SELECT'),

    (:'operator', :'payments', 'SELECT (' || :'payments_read' || ')'),
    (:'operator', :'outbox', 'SELECT, INSERT'),
    (:'operator', :'purchases', 'SELECT, INSERT'),
    (:'operator', :'processed_events', 'SELECT, INSERT, UPDATE (' || :'processed_events_updated' || ')'),
    (:'operator', :'dead_letters',
     'SELECT, UPDATE (' || :'dead_letters_resolved' || ', ' || :'dead_letters_decided' || ')'),
    (:'operator', :'workers', 'SELECT'),
    (:'operator', :'backfill_runs', 'SELECT, INSERT, UPDATE (' || :'backfill_runs_updated' || ')'),
    (:'operator', :'ownership_list', 'SELECT')
) AS wanted (grantee, name, privileges)
WHERE to_regclass(name) IS NOT NULL \gexec

-- what: grants USAGE on the sequences of serial columns of adopted tables; identity columns need no privilege
SELECT format('GRANT USAGE ON SEQUENCE %s TO %I', d.objid::regclass, grantee)
FROM (VALUES (:'worker', :'purchases'), (:'operator', :'purchases'), (:'operator', :'outbox')) AS wanted (grantee, name)
JOIN pg_depend d ON d.refobjid = to_regclass(name) AND d.refclassid = 'pg_class'::regclass
                AND d.classid = 'pg_class'::regclass AND d.deptype = 'a'
JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' \gexec

-- what: lets the reader see the sessions of other roles, if the variable pg_read_all_stats is given
\if :{?pg_read_all_stats}
    \if :pg_read_all_stats
        GRANT pg_read_all_stats TO :"reader";
    \endif
\endif

COMMIT;

SELECT name AS "table", coalesce(pg_get_userbyid(relowner), 'absent: migrate, then run this file again') AS "owner"
FROM unnest(ARRAY[:'payments', :'outbox', :'purchases', :'processed_events', :'dead_letters', :'workers',
                  :'backfill_runs', :'ownership_list']) WITH ORDINALITY AS given (name, position)
LEFT JOIN pg_class ON pg_class.oid = to_regclass(name) ORDER BY position;
