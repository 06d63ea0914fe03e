-- The statements that claim and settle events, as the worker sends them under default table names, with the payload
-- column of type jsonb. Written by `make statements`; do not edit. Parameters are written as :name.
--
-- A fast transaction sends 1, or under the guard `lock` 2 and 3. All other statements belong to careful transactions.
-- The parameters of each transaction (docs/explanation/performance.md) make PostgreSQL plan each statement once.

-- 1. claim and settle (guard index)
-- what: settles the clean events of a claim (none of rules 1 to 8 applies); returns counts,
-- and the ids of all other events
-- lock: FOR UPDATE SKIP LOCKED on the claimed rows; under the guard ``lock``, the pairs are locked already
-- index: (due_at, id); primary keys of payments, marks, letters and outbox; purchases.payment_id and the pair's index
-- guard: ``index``: ON CONFLICT DO NOTHING; ``lock``: one event per pair, none if the pair has an active purchase
WITH claimed AS MATERIALIZED
(SELECT public.outbox.id AS id, public.outbox.event_id AS event_id, public.outbox.due_at AS due_at,
    public.outbox.payload AS payload, public.outbox.event_type AS event_type, coalesce(public.outbox.crashes,
    0::INTEGER) AS crashes, left(public.outbox.payload ->> 'payment_id'::VARCHAR, 100::INTEGER) AS candidate
FROM public.outbox
WHERE public.outbox.due_at <= coalesce(:until::TIMESTAMP WITH TIME ZONE, statement_timestamp())
AND (public.outbox.due_at, public.outbox.id) > (CAST(:start_due_at::VARCHAR AS TIMESTAMP WITH TIME ZONE),
    :start_id::BIGINT)
AND public.outbox.event_id IS NOT NULL
AND public.outbox.event_type IS NOT NULL
AND public.outbox.id != all(:set_aside::bigint[])
ORDER BY public.outbox.due_at, public.outbox.id
LIMIT :limit::BIGINT FOR UPDATE SKIP LOCKED),
clean AS MATERIALIZED
(SELECT usable.id AS id, usable.event_id AS event_id, usable.due_at AS due_at, payment.id AS payment_id,
    payment.student_id AS student_id, payment.course_id AS course_id, payment.amount AS amount, payment.currency AS
    currency
FROM (SELECT claimed.id AS id, claimed.event_id AS event_id, claimed.due_at AS due_at, claimed.payload AS payload,
    claimed.event_type AS event_type, claimed.crashes AS crashes, claimed.candidate AS candidate, CASE WHEN
    (octet_length(claimed.candidate) = 36::INTEGER) THEN CAST(claimed.candidate AS UUID) END AS payment_id
FROM claimed) AS usable JOIN LATERAL (SELECT public.payments.id AS id, public.payments.student_id AS student_id,
    public.payments.course_id AS course_id, public.payments.amount AS amount, public.payments.currency AS currency,
    public.payments.status AS status
FROM public.payments
WHERE public.payments.id = usable.payment_id
LIMIT ALL OFFSET 0) AS payment ON true
WHERE CASE WHEN (CAST(payment.id AS TEXT) = usable.candidate) THEN true ELSE CAST(payment.id AS TEXT) =
    lower(usable.candidate) END
AND usable.event_type = 'PURCHASE_CONFIRMED'::VARCHAR
AND usable.crashes = 0
AND usable.id != all(:odd::bigint[])
AND CAST(payment.status AS TEXT) = 'succeeded'::VARCHAR
AND payment.student_id IS NOT NULL
AND payment.course_id IS NOT NULL
AND NOT CASE WHEN (CAST(payment.student_id AS TEXT) = (usable.payload ->> 'student_id'::VARCHAR)) THEN false ELSE
    (usable.payload ->> 'student_id'::VARCHAR) IS NOT NULL
AND (CASE WHEN ((usable.payload ->> 'student_id'::VARCHAR) LIKE '________-____-____-____-____________'::VARCHAR) THEN
    lower(usable.payload ->> 'student_id'::VARCHAR) END = CAST(payment.student_id AS TEXT)) IS NOT true END
AND NOT CASE WHEN (CAST(payment.course_id AS TEXT) = (usable.payload ->> 'course_id'::VARCHAR)) THEN false ELSE
    (usable.payload ->> 'course_id'::VARCHAR) IS NOT NULL
AND (CASE WHEN ((usable.payload ->> 'course_id'::VARCHAR) LIKE '________-____-____-____-____________'::VARCHAR) THEN
    lower(usable.payload ->> 'course_id'::VARCHAR) END = CAST(payment.course_id AS TEXT)) IS NOT true END
AND NOT CASE WHEN (CAST(payment.amount AS TEXT) = (usable.payload ->> 'amount'::VARCHAR)) THEN false ELSE
    (usable.payload ->> 'amount'::VARCHAR) IS NOT NULL
AND CASE WHEN (left(usable.payload ->> 'amount'::VARCHAR, 100::INTEGER) ~
    '^[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$'::VARCHAR) THEN CAST(left(usable.payload ->>
    'amount'::VARCHAR, 100::INTEGER) AS NUMERIC) = CAST(payment.amount AS NUMERIC) ELSE false END IS NOT true END
AND NOT CASE WHEN (CAST(payment.currency AS TEXT) = (usable.payload ->> 'currency'::VARCHAR)) THEN false ELSE
    (usable.payload ->> 'currency'::VARCHAR) IS NOT NULL
AND CASE WHEN (octet_length(usable.payload ->> 'currency'::VARCHAR) <= 1000::INTEGER) THEN
    upper(btrim(CAST(usable.payload ->> 'currency'::VARCHAR AS TEXT) COLLATE "C")) =
    upper(btrim(CAST(payment.currency AS TEXT) COLLATE "C")) END IS NOT true END
AND (SELECT 1
FROM public.purchases
WHERE public.purchases.payment_id = payment.id
LIMIT 1) IS NULL
AND (SELECT 1
FROM public.processed_events
WHERE public.processed_events.event_id = usable.event_id
LIMIT 1) IS NULL
AND ((SELECT 1
FROM public.dead_letters
WHERE public.dead_letters.state = 'open'::VARCHAR
LIMIT 1) IS NULL OR (SELECT public.dead_letters.state
FROM public.dead_letters
WHERE public.dead_letters.event_id = usable.event_id
LIMIT 1) IS DISTINCT
FROM 'open'::VARCHAR)
ORDER BY payment.student_id, payment.course_id, usable.due_at, usable.id),
made AS
(INSERT INTO public.purchases (student_id, course_id, payment_id, amount, currency, is_active, created_at) SELECT
    clean.student_id AS student_id, clean.course_id AS course_id, clean.payment_id AS payment_id, clean.amount AS
    amount, clean.currency AS currency, true AS anon_1, clock_timestamp() AS clock_timestamp_1
FROM clean
ORDER BY clean.student_id, clean.course_id, clean.due_at, clean.id
ON CONFLICT (student_id, course_id)
WHERE is_active DO NOTHING
RETURNING public.purchases.payment_id, public.purchases.is_active),
won AS MATERIALIZED
(SELECT DISTINCT ON (clean.payment_id) clean.id AS id, clean.event_id AS event_id, clean.payment_id AS payment_id
FROM clean
WHERE (clean.payment_id IN (SELECT made.payment_id
FROM made
WHERE made.is_active)) IS true
ORDER BY clean.payment_id, clean.due_at, clean.id),
marked AS
(INSERT INTO public.processed_events (event_id, event_type, outcome, payment_id, processed_at) SELECT won.event_id AS
    event_id, 'PURCHASE_CONFIRMED'::VARCHAR AS anon_2, 'created'::VARCHAR AS anon_3, won.payment_id AS payment_id,
    clock_timestamp() AS clock_timestamp_2
FROM won
RETURNING 1),
removed AS
(DELETE
FROM public.outbox
WHERE public.outbox.id = any(array((SELECT won.id
FROM won)))
AND public.outbox.due_at BETWEEN CAST(:start_due_at::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND (SELECT max(claimed.due_at) AS max_1
FROM claimed)
RETURNING public.outbox.due_at),
late AS
(SELECT width_bucket(-each.latency, CAST(ARRAY[-3600.0, -300.0, -60.0, -30.0, -10.0, -5.0, -2.5, -1.0, -0.5, -0.25,
    -0.1, -0.05, -0.025, -0.01, -0.005] AS FLOAT[])) AS bucket, count(*) AS events, sum(each.latency) AS seconds
FROM (SELECT CAST(CASE WHEN (removed.due_at IS NOT NULL) THEN greatest(least(date_part('epoch'::VARCHAR,
    clock_timestamp()) - date_part('epoch'::VARCHAR, removed.due_at), 1000000000::INTEGER), -1000000000::INTEGER) END
    AS FLOAT) + :commit_seconds AS latency
FROM removed
LIMIT ALL OFFSET 0) AS each GROUP BY 1)
SELECT count(*) AS claimed, (SELECT count(*) AS count_1
FROM made) AS made, (SELECT count(*) AS count_2
FROM won) AS won, (SELECT count(*) AS count_3
FROM marked) AS marked, (SELECT count(*) AS count_4
FROM removed) AS removed, array_agg(claimed.id) FILTER (WHERE (claimed.id IN (SELECT won.id
FROM won)) IS NOT true) AS fell_out, CAST(min(claimed.due_at) AS TEXT) AS first_due_at, CAST(max(claimed.due_at) AS
    TEXT) AS end_due_at, (SELECT claimed.id
FROM claimed
ORDER BY claimed.due_at DESC, claimed.id DESC
LIMIT 1) AS end_id, CAST(pg_current_xact_id_if_assigned() AS TEXT) AS transaction_id, (SELECT
    array_agg(ARRAY[late.bucket, late.events]) AS array_agg_1
FROM late) AS buckets, (SELECT sum(late.seconds) AS sum_1
FROM late) AS latency_sum, false AS is_unsure
FROM claimed;

-- 2. claim, and lock the pairs (guard lock)
-- what: claims due events, and locks the pairs of their payments in ascending key order, without waiting
-- lock: FOR UPDATE SKIP LOCKED, then pg_try_advisory_xact_lock · index: (due_at, id); primary key of payments
WITH claimed AS MATERIALIZED
(SELECT public.outbox.id AS id, public.outbox.event_id AS event_id, public.outbox.due_at AS due_at,
    public.outbox.payload AS payload, public.outbox.event_type AS event_type, coalesce(public.outbox.crashes,
    0::INTEGER) AS crashes, left(public.outbox.payload ->> 'payment_id'::VARCHAR, 100::INTEGER) AS candidate
FROM public.outbox
WHERE public.outbox.due_at <= coalesce(:until::TIMESTAMP WITH TIME ZONE, statement_timestamp())
AND (public.outbox.due_at, public.outbox.id) > (CAST(:start_due_at::VARCHAR AS TIMESTAMP WITH TIME ZONE),
    :start_id::BIGINT)
AND public.outbox.event_id IS NOT NULL
AND public.outbox.event_type IS NOT NULL
AND public.outbox.id != all(:set_aside::bigint[])
ORDER BY public.outbox.due_at, public.outbox.id
LIMIT :limit::BIGINT FOR UPDATE SKIP LOCKED),
tried AS MATERIALIZED
(SELECT ordered.id AS id, ordered.payment_id AS payment_id, pg_try_advisory_xact_lock(ordered.key) AS is_locked
FROM (SELECT usable.id AS id, payment.id AS payment_id, hashtextextended(CAST(payment.student_id AS TEXT) || ':' ||
    CAST(payment.course_id AS TEXT), 0::INTEGER) AS key
FROM (SELECT claimed.id AS id, claimed.event_id AS event_id, claimed.due_at AS due_at, claimed.payload AS payload,
    claimed.event_type AS event_type, claimed.crashes AS crashes, claimed.candidate AS candidate, CASE WHEN
    (octet_length(claimed.candidate) = 36::INTEGER) THEN CAST(claimed.candidate AS UUID) END AS payment_id
FROM claimed) AS usable JOIN LATERAL (SELECT public.payments.id AS id, public.payments.student_id AS student_id,
    public.payments.course_id AS course_id, public.payments.amount AS amount, public.payments.currency AS currency,
    public.payments.status AS status
FROM public.payments
WHERE public.payments.id = usable.payment_id
LIMIT ALL OFFSET 0) AS payment ON true
WHERE CASE WHEN (CAST(payment.id AS TEXT) = usable.candidate) THEN true ELSE CAST(payment.id AS TEXT) =
    lower(usable.candidate) END
AND hashtextextended(CAST(payment.student_id AS TEXT) || ':' || CAST(payment.course_id AS TEXT), 0::INTEGER) IS NOT
    NULL
ORDER BY key
LIMIT ALL OFFSET 0) AS ordered)
SELECT count(*) AS claimed, (SELECT CAST(array_agg(tried.id) AS TEXT) AS array_agg_1
FROM tried
WHERE tried.is_locked) AS ids, (SELECT CAST(array_agg(tried.payment_id) AS TEXT) AS array_agg_2
FROM tried
WHERE tried.is_locked) AS payment_ids, array_agg(claimed.id) FILTER (WHERE (claimed.id IN (SELECT tried.id
FROM tried
WHERE tried.is_locked)) IS NOT true) AS fell_out, CAST(min(claimed.due_at) AS TEXT) AS first_due_at,
    CAST(max(claimed.due_at) AS TEXT) AS end_due_at, (SELECT claimed.id
FROM claimed
ORDER BY claimed.due_at DESC, claimed.id DESC
LIMIT 1) AS end_id, CAST(pg_current_xact_id_if_assigned() AS TEXT) AS transaction_id
FROM claimed;

-- 3. settle what is locked (guard lock)
-- what: settles the clean events of a claim (none of rules 1 to 8 applies); returns counts,
-- and the ids of all other events
-- lock: FOR UPDATE SKIP LOCKED on the claimed rows; under the guard ``lock``, the pairs are locked already
-- index: (due_at, id); primary keys of payments, marks, letters and outbox; purchases.payment_id and the pair's index
-- guard: ``index``: ON CONFLICT DO NOTHING; ``lock``: one event per pair, none if the pair has an active purchase
WITH claimed AS MATERIALIZED
(SELECT event.id AS id, event.event_id AS event_id, event.due_at AS due_at, event.event_type AS event_type,
    claimed.payment_id AS payment_id, event.payload AS payload, coalesce(event.crashes, 0::INTEGER) AS crashes
FROM unnest(:ids::bigint[], :payment_ids::uuid[]) AS claimed(id, payment_id) JOIN LATERAL (SELECT public.outbox.id AS
    id, public.outbox.event_id AS event_id, public.outbox.event_type AS event_type, public.outbox.payload AS payload,
    public.outbox.headers AS headers, public.outbox.created_at AS created_at, public.outbox.due_at AS due_at,
    public.outbox.attempts AS attempts, public.outbox.crashes AS crashes, public.outbox.last_error AS last_error
FROM public.outbox
WHERE public.outbox.id = claimed.id
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND coalesce(public.outbox.crashes, 0::INTEGER) >= 0
LIMIT ALL OFFSET 0) AS event ON true),
clean AS MATERIALIZED
(SELECT DISTINCT ON (payment.student_id, payment.course_id) claimed.id AS id, claimed.event_id AS event_id,
    claimed.due_at AS due_at, payment.id AS payment_id, payment.student_id AS student_id, payment.course_id AS
    course_id, payment.amount AS amount, payment.currency AS currency
FROM claimed JOIN LATERAL (SELECT public.payments.id AS id, public.payments.student_id AS student_id,
    public.payments.course_id AS course_id, public.payments.amount AS amount, public.payments.currency AS currency,
    public.payments.status AS status
FROM public.payments
WHERE public.payments.id = claimed.payment_id
LIMIT ALL OFFSET 0) AS payment ON true
WHERE claimed.event_type = 'PURCHASE_CONFIRMED'::VARCHAR
AND claimed.crashes = 0
AND claimed.id != all(:odd::bigint[])
AND CAST(payment.status AS TEXT) = 'succeeded'::VARCHAR
AND payment.student_id IS NOT NULL
AND payment.course_id IS NOT NULL
AND NOT CASE WHEN (CAST(payment.student_id AS TEXT) = (claimed.payload ->> 'student_id'::VARCHAR)) THEN false ELSE
    (claimed.payload ->> 'student_id'::VARCHAR) IS NOT NULL
AND (CASE WHEN ((claimed.payload ->> 'student_id'::VARCHAR) LIKE '________-____-____-____-____________'::VARCHAR)
    THEN lower(claimed.payload ->> 'student_id'::VARCHAR) END = CAST(payment.student_id AS TEXT)) IS NOT true END
AND NOT CASE WHEN (CAST(payment.course_id AS TEXT) = (claimed.payload ->> 'course_id'::VARCHAR)) THEN false ELSE
    (claimed.payload ->> 'course_id'::VARCHAR) IS NOT NULL
AND (CASE WHEN ((claimed.payload ->> 'course_id'::VARCHAR) LIKE '________-____-____-____-____________'::VARCHAR) THEN
    lower(claimed.payload ->> 'course_id'::VARCHAR) END = CAST(payment.course_id AS TEXT)) IS NOT true END
AND NOT CASE WHEN (CAST(payment.amount AS TEXT) = (claimed.payload ->> 'amount'::VARCHAR)) THEN false ELSE
    (claimed.payload ->> 'amount'::VARCHAR) IS NOT NULL
AND CASE WHEN (left(claimed.payload ->> 'amount'::VARCHAR, 100::INTEGER) ~
    '^[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$'::VARCHAR) THEN CAST(left(claimed.payload ->>
    'amount'::VARCHAR, 100::INTEGER) AS NUMERIC) = CAST(payment.amount AS NUMERIC) ELSE false END IS NOT true END
AND NOT CASE WHEN (CAST(payment.currency AS TEXT) = (claimed.payload ->> 'currency'::VARCHAR)) THEN false ELSE
    (claimed.payload ->> 'currency'::VARCHAR) IS NOT NULL
AND CASE WHEN (octet_length(claimed.payload ->> 'currency'::VARCHAR) <= 1000::INTEGER) THEN
    upper(btrim(CAST(claimed.payload ->> 'currency'::VARCHAR AS TEXT) COLLATE "C")) =
    upper(btrim(CAST(payment.currency AS TEXT) COLLATE "C")) END IS NOT true END
AND (SELECT 1
FROM public.purchases
WHERE public.purchases.payment_id = payment.id
LIMIT 1) IS NULL
AND (SELECT 1
FROM public.processed_events
WHERE public.processed_events.event_id = claimed.event_id
LIMIT 1) IS NULL
AND ((SELECT 1
FROM public.dead_letters
WHERE public.dead_letters.state = 'open'::VARCHAR
LIMIT 1) IS NULL OR (SELECT public.dead_letters.state
FROM public.dead_letters
WHERE public.dead_letters.event_id = claimed.event_id
LIMIT 1) IS DISTINCT
FROM 'open'::VARCHAR)
AND (SELECT 1
FROM public.purchases
WHERE public.purchases.student_id = payment.student_id
AND public.purchases.course_id = payment.course_id
AND public.purchases.is_active
AND public.purchases.payment_id IS DISTINCT
FROM payment.id
LIMIT 1) IS NULL
ORDER BY payment.student_id, payment.course_id, claimed.due_at, claimed.id),
made AS
(INSERT INTO public.purchases (student_id, course_id, payment_id, amount, currency, is_active, created_at) SELECT
    clean.student_id AS student_id, clean.course_id AS course_id, clean.payment_id AS payment_id, clean.amount AS
    amount, clean.currency AS currency, true AS anon_1, clock_timestamp() AS clock_timestamp_1
FROM clean
ORDER BY clean.student_id, clean.course_id, clean.due_at, clean.id
RETURNING public.purchases.payment_id, public.purchases.is_active),
won AS MATERIALIZED
(SELECT DISTINCT ON (clean.payment_id) clean.id AS id, clean.event_id AS event_id, clean.payment_id AS payment_id
FROM clean
WHERE (clean.payment_id IN (SELECT made.payment_id
FROM made
WHERE made.is_active)) IS true
ORDER BY clean.payment_id, clean.due_at, clean.id),
marked AS
(INSERT INTO public.processed_events (event_id, event_type, outcome, payment_id, processed_at) SELECT won.event_id AS
    event_id, 'PURCHASE_CONFIRMED'::VARCHAR AS anon_2, 'created'::VARCHAR AS anon_3, won.payment_id AS payment_id,
    clock_timestamp() AS clock_timestamp_2
FROM won
RETURNING 1),
removed AS
(DELETE
FROM public.outbox
WHERE public.outbox.id = any(array((SELECT won.id
FROM won)))
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND (SELECT max(claimed.due_at) AS max_1
FROM claimed)
RETURNING public.outbox.due_at),
late AS
(SELECT width_bucket(-each.latency, CAST(ARRAY[-3600.0, -300.0, -60.0, -30.0, -10.0, -5.0, -2.5, -1.0, -0.5, -0.25,
    -0.1, -0.05, -0.025, -0.01, -0.005] AS FLOAT[])) AS bucket, count(*) AS events, sum(each.latency) AS seconds
FROM (SELECT CAST(CASE WHEN (removed.due_at IS NOT NULL) THEN greatest(least(date_part('epoch'::VARCHAR,
    clock_timestamp()) - date_part('epoch'::VARCHAR, removed.due_at), 1000000000::INTEGER), -1000000000::INTEGER) END
    AS FLOAT) + :commit_seconds AS latency
FROM removed
LIMIT ALL OFFSET 0) AS each GROUP BY 1)
SELECT count(*) AS claimed, (SELECT count(*) AS count_1
FROM made) AS made, (SELECT count(*) AS count_2
FROM won) AS won, (SELECT count(*) AS count_3
FROM marked) AS marked, (SELECT count(*) AS count_4
FROM removed) AS removed, array_agg(claimed.id) FILTER (WHERE (claimed.id IN (SELECT won.id
FROM won)) IS NOT true) AS fell_out, CAST(min(claimed.due_at) AS TEXT) AS first_due_at, CAST(max(claimed.due_at) AS
    TEXT) AS end_due_at, (SELECT claimed.id
FROM claimed
ORDER BY claimed.due_at DESC, claimed.id DESC
LIMIT 1) AS end_id, CAST(pg_current_xact_id_if_assigned() AS TEXT) AS transaction_id, (SELECT
    array_agg(ARRAY[late.bucket, late.events]) AS array_agg_1
FROM late) AS buckets, (SELECT sum(late.seconds) AS sum_1
FROM late) AS latency_sum, EXISTS (SELECT 1
FROM pg_catalog.pg_index
WHERE pg_catalog.pg_index.indrelid = to_regclass('public.purchases'::VARCHAR)
AND pg_catalog.pg_index.indisunique
AND pg_catalog.pg_index.indislive
AND NOT pg_catalog.pg_index.indisvalid) AS is_unsure
FROM claimed;

-- 4. claim what fell out
-- what: claims due events by their ids · lock: FOR UPDATE SKIP LOCKED · index: primary key or (due_at, id)
WITH claimed AS MATERIALIZED
(SELECT public.outbox.id AS id, public.outbox.event_id AS event_id, left(public.outbox.event_type, 200::INTEGER) AS
    event_type, CASE WHEN ((public.outbox.payload ->> 'payment_id'::VARCHAR) LIKE
    '________-____-____-____-____________'::VARCHAR) THEN public.outbox.payload ->> 'payment_id'::VARCHAR END AS
    candidate, coalesce(public.outbox.attempts, 0::INTEGER) AS attempts, coalesce(public.outbox.crashes, 0::INTEGER)
    AS crashes, CAST(CASE WHEN (public.outbox.due_at IS NOT NULL) THEN greatest(least(date_part('epoch'::VARCHAR,
    clock_timestamp()) - date_part('epoch'::VARCHAR, public.outbox.due_at), 1000000000::INTEGER),
    -1000000000::INTEGER) END AS FLOAT) AS lateness, public.outbox.due_at AS due_at
FROM public.outbox
WHERE public.outbox.id = any(:ids::bigint[])
AND public.outbox.due_at BETWEEN (SELECT min(window_firsts.due_at) AS min_1
FROM unnest(CAST(:window_firsts::TEXT[] AS TIMESTAMP WITH TIME ZONE[])) AS window_firsts(due_at))
AND (SELECT max(window_lasts.due_at) AS max_1
FROM unnest(CAST(:window_lasts::TEXT[] AS TIMESTAMP WITH TIME ZONE[])) AS window_lasts(due_at))
AND public.outbox.due_at <= coalesce(:until::TIMESTAMP WITH TIME ZONE, statement_timestamp())
AND public.outbox.event_id IS NOT NULL
AND public.outbox.event_type IS NOT NULL
ORDER BY public.outbox.due_at, public.outbox.id FOR UPDATE SKIP LOCKED)
SELECT array_agg(claimed.id) AS ids, CAST(array_agg(claimed.event_id) AS TEXT) AS event_ids, CASE WHEN
    (min(claimed.event_type) = max(claimed.event_type)) THEN ARRAY[min(claimed.event_type)] ELSE
    array_agg(claimed.event_type) END AS event_types, CAST(array_agg(claimed.candidate) AS TEXT) AS candidates,
    CAST(array_agg(claimed.attempts) AS TEXT) AS attempts, array_agg(claimed.lateness) AS lateness,
    array_agg(claimed.id) FILTER (WHERE claimed.crashes > 0::INTEGER) AS crash_suspects, CAST(min(claimed.due_at) AS
    TEXT) AS first_due_at, CAST(max(claimed.due_at) AS TEXT) AS end_due_at, CAST(pg_current_xact_id_if_assigned() AS
    TEXT) AS transaction_id
FROM claimed;

-- 5. claim after a failure
-- what: claims due events after a position, oldest first; returns one row of arrays with all values to settle them
-- lock: FOR UPDATE SKIP LOCKED (settling deletes the row) · index: (due_at, id)
WITH claimed AS MATERIALIZED
(SELECT public.outbox.id AS id, public.outbox.event_id AS event_id, left(public.outbox.event_type, 200::INTEGER) AS
    event_type, CASE WHEN ((public.outbox.payload ->> 'payment_id'::VARCHAR) LIKE
    '________-____-____-____-____________'::VARCHAR) THEN public.outbox.payload ->> 'payment_id'::VARCHAR END AS
    candidate, coalesce(public.outbox.attempts, 0::INTEGER) AS attempts, coalesce(public.outbox.crashes, 0::INTEGER)
    AS crashes, CAST(CASE WHEN (public.outbox.due_at IS NOT NULL) THEN greatest(least(date_part('epoch'::VARCHAR,
    clock_timestamp()) - date_part('epoch'::VARCHAR, public.outbox.due_at), 1000000000::INTEGER),
    -1000000000::INTEGER) END AS FLOAT) AS lateness, public.outbox.due_at AS due_at
FROM public.outbox
WHERE public.outbox.due_at <= coalesce(:until::TIMESTAMP WITH TIME ZONE, statement_timestamp())
AND (public.outbox.due_at, public.outbox.id) > (CAST(:start_due_at::VARCHAR AS TIMESTAMP WITH TIME ZONE),
    :start_id::BIGINT)
AND public.outbox.event_id IS NOT NULL
AND public.outbox.event_type IS NOT NULL
ORDER BY public.outbox.due_at, public.outbox.id
LIMIT :limit::BIGINT FOR UPDATE SKIP LOCKED)
SELECT array_agg(claimed.id) AS ids, CAST(array_agg(claimed.event_id) AS TEXT) AS event_ids, CASE WHEN
    (min(claimed.event_type) = max(claimed.event_type)) THEN ARRAY[min(claimed.event_type)] ELSE
    array_agg(claimed.event_type) END AS event_types, CAST(array_agg(claimed.candidate) AS TEXT) AS candidates,
    CAST(array_agg(claimed.attempts) AS TEXT) AS attempts, array_agg(claimed.lateness) AS lateness,
    array_agg(claimed.id) FILTER (WHERE claimed.crashes > 0::INTEGER) AS crash_suspects, CAST(min(claimed.due_at) AS
    TEXT) AS first_due_at, CAST(max(claimed.due_at) AS TEXT) AS end_due_at, CAST(pg_current_xact_id_if_assigned() AS
    TEXT) AS transaction_id
FROM claimed;

-- 6. choose an event to process alone
-- what: chooses the first due event · lock: FOR UPDATE SKIP LOCKED, until the choice is committed
-- index: (due_at, id), or the primary key if a condition in ``ours`` gives the event's id
SELECT public.outbox.id, coalesce(public.outbox.crashes, 0::INTEGER) AS crashes
FROM public.outbox
WHERE public.outbox.due_at <= coalesce(:until::TIMESTAMP WITH TIME ZONE, statement_timestamp())
AND public.outbox.event_id IS NOT NULL
AND public.outbox.event_type IS NOT NULL
AND public.outbox.id != all(:set_aside::bigint[])
ORDER BY public.outbox.due_at, public.outbox.id
LIMIT 1::INTEGER FOR UPDATE SKIP LOCKED;

-- 7. claim that event
-- what: claims one due event by its id · lock: FOR UPDATE SKIP LOCKED · index: primary key
WITH claimed AS MATERIALIZED
(SELECT public.outbox.id AS id, public.outbox.event_id AS event_id, left(public.outbox.event_type, 200::INTEGER) AS
    event_type, CASE WHEN ((public.outbox.payload ->> 'payment_id'::VARCHAR) LIKE
    '________-____-____-____-____________'::VARCHAR) THEN public.outbox.payload ->> 'payment_id'::VARCHAR END AS
    candidate, coalesce(public.outbox.attempts, 0::INTEGER) AS attempts, coalesce(public.outbox.crashes, 0::INTEGER)
    AS crashes, CAST(CASE WHEN (public.outbox.due_at IS NOT NULL) THEN greatest(least(date_part('epoch'::VARCHAR,
    clock_timestamp()) - date_part('epoch'::VARCHAR, public.outbox.due_at), 1000000000::INTEGER),
    -1000000000::INTEGER) END AS FLOAT) AS lateness, public.outbox.due_at AS due_at
FROM public.outbox
WHERE public.outbox.id = :id::BIGINT
AND public.outbox.due_at <= coalesce(:until::TIMESTAMP WITH TIME ZONE, statement_timestamp()) FOR UPDATE SKIP LOCKED)
SELECT array_agg(claimed.id) AS ids, CAST(array_agg(claimed.event_id) AS TEXT) AS event_ids, CASE WHEN
    (min(claimed.event_type) = max(claimed.event_type)) THEN ARRAY[min(claimed.event_type)] ELSE
    array_agg(claimed.event_type) END AS event_types, CAST(array_agg(claimed.candidate) AS TEXT) AS candidates,
    CAST(array_agg(claimed.attempts) AS TEXT) AS attempts, array_agg(claimed.lateness) AS lateness,
    array_agg(claimed.id) FILTER (WHERE claimed.crashes > 0::INTEGER) AS crash_suspects, CAST(min(claimed.due_at) AS
    TEXT) AS first_due_at, CAST(max(claimed.due_at) AS TEXT) AS end_due_at, CAST(pg_current_xact_id_if_assigned() AS
    TEXT) AS transaction_id
FROM claimed;

-- 8. lock the pairs
-- what: locks the pairs of claimed events in ascending key order, without waiting
-- lock: pg_try_advisory_xact_lock · index: primary key of payments, purchases.payment_id
WITH pairs AS
(SELECT claimed.id AS id, hashtextextended(coalesce(CAST(public.payments.student_id AS TEXT),
    CAST(public.purchases.student_id AS TEXT)) || ':' || coalesce(CAST(public.payments.course_id AS TEXT),
    CAST(public.purchases.course_id AS TEXT)), 0::INTEGER) AS key, row_number() OVER (ORDER BY
    public.payments.student_id, public.payments.course_id, event.due_at, event.id) AS position
FROM unnest(:ids::bigint[], :payment_ids::uuid[]) AS claimed(id, payment_id) JOIN LATERAL (SELECT public.outbox.id AS
    id, public.outbox.event_id AS event_id, public.outbox.event_type AS event_type, public.outbox.payload AS payload,
    public.outbox.headers AS headers, public.outbox.created_at AS created_at, public.outbox.due_at AS due_at,
    public.outbox.attempts AS attempts, public.outbox.crashes AS crashes, public.outbox.last_error AS last_error
FROM public.outbox
WHERE public.outbox.id = claimed.id
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND coalesce(public.outbox.crashes, 0::INTEGER) >= 0
LIMIT ALL OFFSET 0) AS event ON true LEFT OUTER JOIN public.payments ON public.payments.id = claimed.payment_id LEFT
    OUTER JOIN public.purchases ON public.purchases.payment_id = claimed.payment_id),
ranked AS MATERIALIZED
(SELECT pairs.id AS id, pairs.key AS key, pairs.position AS position, dense_rank() OVER (ORDER BY pairs.key) AS rank
FROM pairs
ORDER BY pairs.key)
SELECT ranked.id, ranked.key, ranked.position, coalesce(CASE WHEN (ranked.rank <= :capacity::BIGINT) THEN
    pg_try_advisory_xact_lock(ranked.key) ELSE false END, false) AS held
FROM ranked;

-- 9. look
-- what: reads the facts about claimed events in one snapshot
-- lock: none (the pairs are already locked) · index: primary keys, purchases.payment_id, the pair's index
SELECT claimed.id, claimed.payment_id AS payment_id, public.processed_events.event_id IS NOT NULL AS is_marked,
    public.processed_events.outcome AS marked_outcome, public.processed_events.payment_id AS marked_payment_id,
    (SELECT bool_or(own.is_active IS true) AS bool_or_1
FROM public.purchases AS own
WHERE own.payment_id = claimed.payment_id) AS purchase_active, CASE WHEN (public.payments.id IS NOT NULL) THEN
    coalesce(CAST(public.payments.status AS TEXT), ''::VARCHAR) END AS payment_status, public.payments.student_id IS
    NOT NULL
AND public.payments.course_id IS NOT NULL AS has_pair, array_remove(ARRAY[CASE WHEN CASE WHEN
    (CAST(public.payments.student_id AS TEXT) = (event.payload ->> 'student_id'::VARCHAR)) THEN false ELSE
    (event.payload ->> 'student_id'::VARCHAR) IS NOT NULL
AND (CASE WHEN ((event.payload ->> 'student_id'::VARCHAR) LIKE '________-____-____-____-____________'::VARCHAR) THEN
    lower(event.payload ->> 'student_id'::VARCHAR) END = CAST(public.payments.student_id AS TEXT)) IS NOT true END
    THEN 'student_id'::VARCHAR END, CASE WHEN CASE WHEN (CAST(public.payments.course_id AS TEXT) = (event.payload ->>
    'course_id'::VARCHAR)) THEN false ELSE (event.payload ->> 'course_id'::VARCHAR) IS NOT NULL
AND (CASE WHEN ((event.payload ->> 'course_id'::VARCHAR) LIKE '________-____-____-____-____________'::VARCHAR) THEN
    lower(event.payload ->> 'course_id'::VARCHAR) END = CAST(public.payments.course_id AS TEXT)) IS NOT true END THEN
    'course_id'::VARCHAR END, CASE WHEN CASE WHEN (CAST(public.payments.amount AS TEXT) = (event.payload ->>
    'amount'::VARCHAR)) THEN false ELSE (event.payload ->> 'amount'::VARCHAR) IS NOT NULL
AND CASE WHEN (left(event.payload ->> 'amount'::VARCHAR, 100::INTEGER) ~
    '^[+-]?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,2})?$'::VARCHAR) THEN CAST(left(event.payload ->>
    'amount'::VARCHAR, 100::INTEGER) AS NUMERIC) = CAST(public.payments.amount AS NUMERIC) ELSE false END IS NOT true
    END THEN 'amount'::VARCHAR END, CASE WHEN CASE WHEN (CAST(public.payments.currency AS TEXT) = (event.payload ->>
    'currency'::VARCHAR)) THEN false ELSE (event.payload ->> 'currency'::VARCHAR) IS NOT NULL
AND CASE WHEN (octet_length(event.payload ->> 'currency'::VARCHAR) <= 1000::INTEGER) THEN
    upper(btrim(CAST(event.payload ->> 'currency'::VARCHAR AS TEXT) COLLATE "C")) =
    upper(btrim(CAST(public.payments.currency AS TEXT) COLLATE "C")) END IS NOT true END THEN 'currency'::VARCHAR
    END], NULL) AS mismatches, EXISTS (SELECT *
FROM public.purchases AS held
WHERE held.student_id = public.payments.student_id
AND held.course_id = public.payments.course_id
AND held.is_active
AND held.payment_id IS DISTINCT
FROM public.payments.id) AS pair_held, hashtextextended(coalesce(CAST(public.payments.student_id AS TEXT),
    CAST(purchase.student_id AS TEXT)) || ':' || coalesce(CAST(public.payments.course_id AS TEXT),
    CAST(purchase.course_id AS TEXT)), 0::INTEGER) AS key
FROM unnest(:ids::bigint[], :payment_ids::uuid[]) AS claimed(id, payment_id) JOIN LATERAL (SELECT public.outbox.id AS
    id, public.outbox.event_id AS event_id, public.outbox.event_type AS event_type, public.outbox.payload AS payload,
    public.outbox.headers AS headers, public.outbox.created_at AS created_at, public.outbox.due_at AS due_at,
    public.outbox.attempts AS attempts, public.outbox.crashes AS crashes, public.outbox.last_error AS last_error
FROM public.outbox
WHERE public.outbox.id = claimed.id
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND coalesce(public.outbox.crashes, 0::INTEGER) >= 0
LIMIT ALL OFFSET 0) AS event ON true LEFT OUTER JOIN public.payments ON public.payments.id = claimed.payment_id LEFT
    OUTER JOIN LATERAL (SELECT public.purchases.student_id AS student_id, public.purchases.course_id AS course_id,
    public.purchases.amount AS amount, public.purchases.currency AS currency
FROM public.purchases
WHERE public.purchases.payment_id = claimed.payment_id
LIMIT 1) AS purchase ON true LEFT OUTER JOIN public.processed_events ON public.processed_events.event_id =
    event.event_id;

-- 10. create purchases (guard index)
-- what: inserts the purchases of claimed events, copied from payment rows, in the order in which all workers write
-- lock: the claimed rows (already locked) · index: primary keys of outbox and payments, purchases.payment_id
-- guard: ``index``: the caller adds ON CONFLICT; ``lock``: one event per pair, none if the pair has an active purchase
WITH made AS
(INSERT INTO public.purchases (student_id, course_id, payment_id, amount, currency, is_active, created_at) SELECT
    payment.student_id AS student_id, payment.course_id AS course_id, payment.id AS id, payment.amount AS amount,
    payment.currency AS currency, true AS anon_1, clock_timestamp() AS clock_timestamp_1
FROM unnest(:ids::bigint[], :payment_ids::uuid[]) AS claimed(id, payment_id) JOIN LATERAL (SELECT public.outbox.id AS
    id, public.outbox.event_id AS event_id, public.outbox.event_type AS event_type, public.outbox.payload AS payload,
    public.outbox.headers AS headers, public.outbox.created_at AS created_at, public.outbox.due_at AS due_at,
    public.outbox.attempts AS attempts, public.outbox.crashes AS crashes, public.outbox.last_error AS last_error
FROM public.outbox
WHERE public.outbox.id = claimed.id
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND coalesce(public.outbox.crashes, 0::INTEGER) >= 0
LIMIT ALL OFFSET 0) AS event ON true JOIN LATERAL (SELECT public.payments.id AS id, public.payments.student_id AS
    student_id, public.payments.course_id AS course_id, public.payments.amount AS amount, public.payments.currency AS
    currency, public.payments.status AS status
FROM public.payments
WHERE public.payments.id = claimed.payment_id
LIMIT ALL OFFSET 0) AS payment ON true
WHERE NOT (EXISTS (SELECT *
FROM public.purchases
WHERE public.purchases.payment_id = payment.id))
AND payment.student_id IS NOT NULL
AND payment.course_id IS NOT NULL
ORDER BY payment.student_id, payment.course_id, event.due_at, event.id
ON CONFLICT (student_id, course_id)
WHERE is_active DO NOTHING
RETURNING CAST(public.purchases.payment_id AS TEXT) AS payment_id)
SELECT CASE WHEN (count(*) < :offered::BIGINT) THEN coalesce(array_agg(made.payment_id), CAST(ARRAY[] AS TEXT[])) END
    AS payments, false AS is_unsure
FROM made;

-- 11. create purchases (guard lock)
-- what: inserts the purchases of claimed events, copied from payment rows, in the order in which all workers write
-- lock: the claimed rows (already locked) · index: primary keys of outbox and payments, purchases.payment_id
-- guard: ``index``: the caller adds ON CONFLICT; ``lock``: one event per pair, none if the pair has an active purchase
WITH made AS
(INSERT INTO public.purchases (student_id, course_id, payment_id, amount, currency, is_active, created_at) SELECT
    DISTINCT ON (payment.student_id, payment.course_id) payment.student_id AS student_id, payment.course_id AS
    course_id, payment.id AS id, payment.amount AS amount, payment.currency AS currency, true AS anon_1,
    clock_timestamp() AS clock_timestamp_1
FROM unnest(:ids::bigint[], :payment_ids::uuid[]) AS claimed(id, payment_id) JOIN LATERAL (SELECT public.outbox.id AS
    id, public.outbox.event_id AS event_id, public.outbox.event_type AS event_type, public.outbox.payload AS payload,
    public.outbox.headers AS headers, public.outbox.created_at AS created_at, public.outbox.due_at AS due_at,
    public.outbox.attempts AS attempts, public.outbox.crashes AS crashes, public.outbox.last_error AS last_error
FROM public.outbox
WHERE public.outbox.id = claimed.id
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND coalesce(public.outbox.crashes, 0::INTEGER) >= 0
LIMIT ALL OFFSET 0) AS event ON true JOIN LATERAL (SELECT public.payments.id AS id, public.payments.student_id AS
    student_id, public.payments.course_id AS course_id, public.payments.amount AS amount, public.payments.currency AS
    currency, public.payments.status AS status
FROM public.payments
WHERE public.payments.id = claimed.payment_id
LIMIT ALL OFFSET 0) AS payment ON true
WHERE NOT (EXISTS (SELECT *
FROM public.purchases
WHERE public.purchases.payment_id = payment.id))
AND payment.student_id IS NOT NULL
AND payment.course_id IS NOT NULL
AND NOT (EXISTS (SELECT *
FROM public.purchases
WHERE public.purchases.student_id = payment.student_id
AND public.purchases.course_id = payment.course_id
AND public.purchases.is_active
AND public.purchases.payment_id IS DISTINCT
FROM payment.id))
ORDER BY payment.student_id, payment.course_id, event.due_at, event.id
RETURNING CAST(public.purchases.payment_id AS TEXT) AS payment_id)
SELECT CASE WHEN (count(*) < :offered::BIGINT) THEN coalesce(array_agg(made.payment_id), CAST(ARRAY[] AS TEXT[])) END
    AS payments, EXISTS (SELECT 1
FROM pg_catalog.pg_index
WHERE pg_catalog.pg_index.indrelid = to_regclass('public.purchases'::VARCHAR)
AND pg_catalog.pg_index.indisunique
AND pg_catalog.pg_index.indislive
AND NOT pg_catalog.pg_index.indisvalid) AS is_unsure
FROM made;

-- 12. refund
-- what: makes purchases of refunded payments inactive, or inserts inactive ones, in the order that all workers use
-- lock: pairs (already locked), then the purchases' rows · index: primary keys, purchases.payment_id (ON CONFLICT)
WITH made AS
(INSERT INTO public.purchases (student_id, course_id, payment_id, amount, currency, is_active, created_at,
    deactivated_at) SELECT coalesce(payment.student_id, purchase.student_id) AS coalesce_1,
    coalesce(payment.course_id, purchase.course_id) AS coalesce_2, payment.id AS id, coalesce(payment.amount,
    purchase.amount) AS coalesce_3, coalesce(payment.currency, purchase.currency) AS coalesce_4, false AS anon_1,
    clock_timestamp() AS clock_timestamp_1, clock_timestamp() AS clock_timestamp__1
FROM unnest(:ids::bigint[], :payment_ids::uuid[]) AS claimed(id, payment_id) JOIN LATERAL (SELECT public.outbox.id AS
    id, public.outbox.event_id AS event_id, public.outbox.event_type AS event_type, public.outbox.payload AS payload,
    public.outbox.headers AS headers, public.outbox.created_at AS created_at, public.outbox.due_at AS due_at,
    public.outbox.attempts AS attempts, public.outbox.crashes AS crashes, public.outbox.last_error AS last_error
FROM public.outbox
WHERE public.outbox.id = claimed.id
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND coalesce(public.outbox.crashes, 0::INTEGER) >= 0
LIMIT ALL OFFSET 0) AS event ON true JOIN LATERAL (SELECT public.payments.id AS id, public.payments.student_id AS
    student_id, public.payments.course_id AS course_id, public.payments.amount AS amount, public.payments.currency AS
    currency, public.payments.status AS status
FROM public.payments
WHERE public.payments.id = claimed.payment_id
LIMIT ALL OFFSET 0) AS payment ON true LEFT OUTER JOIN LATERAL (SELECT public.purchases.student_id AS student_id,
    public.purchases.course_id AS course_id, public.purchases.amount AS amount, public.purchases.currency AS currency
FROM public.purchases
WHERE public.purchases.payment_id = claimed.payment_id
LIMIT 1) AS purchase ON true
ORDER BY coalesce(payment.student_id, purchase.student_id), coalesce(payment.course_id, purchase.course_id),
    event.due_at, event.id
ON CONFLICT (payment_id)
WHERE payment_id IS NOT NULL DO UPDATE SET is_active = false, deactivated_at = CASE WHEN public.purchases.is_active
    THEN clock_timestamp() ELSE public.purchases.deactivated_at END
RETURNING CAST(public.purchases.payment_id AS TEXT) AS payment_id)
SELECT CASE WHEN (count(*) < :offered::BIGINT) THEN coalesce(array_agg(made.payment_id), CAST(ARRAY[] AS TEXT[])) END
    AS payments, false AS is_unsure
FROM made;

-- 13. find the next payment of a pair
-- what: reads the succeeded payments of the events' pairs, oldest first, each with its class
-- lock: none (the pairs are already locked) · index: the pair's index of payments; without it,
-- payments is scanned once; the outbox is scanned once if purchases do not determine each class
WITH pairs AS MATERIALIZED
(SELECT claimed.id AS id, coalesce(payment.student_id, purchase.student_id) AS student_id,
    coalesce(payment.course_id, purchase.course_id) AS course_id
FROM unnest(:ids::bigint[], :payment_ids::uuid[]) AS claimed(id, payment_id) LEFT OUTER JOIN LATERAL (SELECT
    public.payments.id AS id, public.payments.student_id AS student_id, public.payments.course_id AS course_id,
    public.payments.amount AS amount, public.payments.currency AS currency, public.payments.status AS status
FROM public.payments
WHERE public.payments.id = claimed.payment_id
LIMIT ALL OFFSET 0) AS payment ON true LEFT OUTER JOIN LATERAL (SELECT public.purchases.student_id AS student_id,
    public.purchases.course_id AS course_id, public.purchases.amount AS amount, public.purchases.currency AS currency
FROM public.purchases
WHERE public.purchases.payment_id = claimed.payment_id
LIMIT 1) AS purchase ON true),
standing AS MATERIALIZED
(SELECT pairs.id AS event, public.payments.id AS id, public.payments.student_id AS student_id,
    public.payments.course_id AS course_id, public.payments.amount AS amount, public.payments.currency AS currency,
    public.payments.created_at AS created_at
FROM pairs JOIN public.payments ON public.payments.student_id = pairs.student_id
AND public.payments.course_id = pairs.course_id
WHERE CAST(public.payments.status AS TEXT) = 'succeeded'::VARCHAR)
SELECT standing.event AS id, CAST(standing.id AS TEXT) AS payment_id, CASE WHEN (standing.amount < 0::INTEGER OR
    standing.amount >= CAST('Infinity' AS numeric)) THEN 'cannot_be_judged'::VARCHAR WHEN (EXISTS (SELECT
    public.purchases.payment_id
FROM public.purchases
WHERE public.purchases.payment_id = standing.id
AND public.purchases.is_active)) THEN 'active'::VARCHAR WHEN (EXISTS (SELECT public.purchases.payment_id
FROM public.purchases
WHERE public.purchases.payment_id = standing.id)) THEN 'revoked'::VARCHAR WHEN (EXISTS (SELECT held.payment_id
FROM public.purchases AS held
WHERE held.student_id = standing.student_id
AND held.course_id = standing.course_id
AND held.is_active)) THEN 'duplicate'::VARCHAR WHEN (CAST(standing.id AS TEXT) IN (SELECT
    lower(left(public.outbox.payload ->> 'payment_id'::VARCHAR, 100::INTEGER)) AS lower_1
FROM public.outbox
WHERE public.outbox.event_type = 'PURCHASE_CONFIRMED'::VARCHAR
AND CASE WHEN (public.outbox.due_at < CAST('9999-01-01' AS timestamptz)
AND public.outbox.event_id IS NOT NULL
AND public.outbox.event_type IS NOT NULL) THEN true ELSE false END
AND public.outbox.id != all(array((SELECT CAST(aside.key AS BIGINT) AS key
FROM public.workers JOIN jsonb_each_text(public.workers.set_aside) AS aside(key, value) ON true
WHERE public.workers.stopped_at IS NULL
AND CAST(CASE WHEN (public.workers.seen_at IS NOT NULL) THEN greatest(least(date_part('epoch'::VARCHAR,
    clock_timestamp()) - date_part('epoch'::VARCHAR, public.workers.seen_at), 1000000000::INTEGER),
    -1000000000::INTEGER) END AS FLOAT) <= 30.0 OR NOT (EXISTS (SELECT later.id
FROM public.workers AS later
WHERE later.started_at > coalesce(public.workers.stopped_at, public.workers.seen_at))))))
AND CASE WHEN (lower(left(public.outbox.payload ->> 'payment_id'::VARCHAR, 100::INTEGER)) IN (SELECT CAST(standing.id
    AS TEXT) AS id
FROM standing)) THEN true END)) THEN 'in_flight'::VARCHAR WHEN (EXISTS (SELECT public.dead_letters.payment_id
FROM public.dead_letters
WHERE public.dead_letters.payment_id = standing.id
AND public.dead_letters.state = 'open'::VARCHAR
AND (public.dead_letters.reason = 'event_id_reused'::VARCHAR OR public.dead_letters.reason =
    'payment_mismatch'::VARCHAR))) THEN 'dead'::VARCHAR WHEN (EXISTS (SELECT public.dead_letters.payment_id
FROM public.dead_letters
WHERE public.dead_letters.payment_id = standing.id
AND public.dead_letters.state = 'discarded'::VARCHAR
AND public.dead_letters.note IS NOT NULL
AND public.dead_letters.event_type = 'PURCHASE_CONFIRMED'::VARCHAR
AND (public.dead_letters.reason = 'crashed_worker'::VARCHAR OR public.dead_letters.reason =
    'event_id_reused'::VARCHAR OR public.dead_letters.reason = 'payment_mismatch'::VARCHAR OR
    public.dead_letters.reason = 'rejected_by_database'::VARCHAR))) THEN 'waived'::VARCHAR WHEN (CASE WHEN
    (standing.id IS NULL) THEN 'it has no id'::VARCHAR WHEN (standing.amount < 0::INTEGER) THEN 'its amount is
    negative'::VARCHAR WHEN (standing.amount < 0::INTEGER OR standing.amount >= CAST('Infinity' AS numeric)) THEN
    'its amount is not a finite number'::VARCHAR WHEN (standing.student_id IS NULL) THEN 'it names no
    student'::VARCHAR WHEN (standing.course_id IS NULL) THEN 'it names no course'::VARCHAR WHEN (standing.amount IS
    NULL) THEN 'it has no amount'::VARCHAR WHEN (coalesce(btrim(CAST(standing.currency AS TEXT)), ''::VARCHAR) =
    ''::VARCHAR) THEN 'it has no currency'::VARCHAR WHEN (length(CAST(standing.currency AS TEXT)) > 100::INTEGER)
    THEN 'its currency is too long'::VARCHAR WHEN (standing.created_at IS NULL) THEN 'it has no created_at'::VARCHAR
    WHEN (standing.created_at NOT BETWEEN CAST('0001-01-02' AS timestamptz)
AND CAST('9999-12-30' AS timestamptz)) THEN 'its created_at is infinite, before the year 1 or after the year
    9999'::VARCHAR END IS NOT NULL) THEN 'cannot_be_judged'::VARCHAR ELSE 'unexplained'::VARCHAR END AS kind
FROM standing
ORDER BY standing.created_at, standing.id;

-- 14. mark
-- what: marks settled events; an existing mark gets the new outcome only if the event created a
-- purchase
-- lock: the claimed rows (already locked) · index: primary key of processed_events
INSERT INTO public.processed_events (event_id, event_type, outcome, payment_id, processed_at, recovered_at) SELECT
    settled.event_id, :event_type::VARCHAR AS anon_1, :outcome::VARCHAR AS anon_2, settled.payment_id,
    clock_timestamp() AS clock_timestamp_1, CASE WHEN (:outcome::VARCHAR = 'recovered'::VARCHAR) THEN
    clock_timestamp() END AS anon_3
FROM unnest(:event_ids::uuid[], :payment_ids::uuid[]) AS settled(event_id, payment_id)
ON CONFLICT (event_id) DO UPDATE SET outcome = CASE WHEN (excluded.outcome = 'created'::VARCHAR OR excluded.outcome =
    'recovered'::VARCHAR) THEN excluded.outcome ELSE public.processed_events.outcome END, payment_id =
    coalesce(public.processed_events.payment_id, excluded.payment_id), recovered_at = coalesce(excluded.recovered_at,
    public.processed_events.recovered_at);

-- 15. remove
-- what: deletes settled and dead events · lock: held since the claim · index: primary key or (due_at, id)
DELETE
FROM public.outbox
WHERE public.outbox.id = any(:ids::bigint[])
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE);

-- 16. postpone
-- what: makes events due later, counts charged tries · lock: held since the claim · index: primary key
UPDATE public.outbox SET due_at=(clock_timestamp() + given.delay), attempts=(coalesce(public.outbox.attempts,
    0::INTEGER) + given.charge), last_error=coalesce(given.error, public.outbox.last_error)
FROM unnest(:ids::bigint[], :delays::INTERVAL[], :charges::BIGINT[], :errors::TEXT[]) AS given(id, delay, charge,
    error)
WHERE public.outbox.id = given.id
AND public.outbox.id = any(:ids::bigint[])
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE);

-- 17. write dead letters
-- what: writes dead letters of claimed events; an existing letter is overwritten and reopened, but keeps its note
-- lock: held since the claim · index: primary keys
INSERT INTO public.dead_letters (event_id, event_type, headers, created_at, payload, payment_id, attempts, reason,
    detail, dead_at, state) SELECT event.event_id, event.event_type, event.headers, coalesce(event.created_at,
    clock_timestamp()) AS coalesce_1, coalesce(event.payload, CAST('null' AS jsonb)) AS coalesce_2, given.payment_id,
    coalesce(event.attempts, 0::INTEGER) + 1::INTEGER AS anon_1, given.reason, given.detail, clock_timestamp() AS
    clock_timestamp_1, 'open'::VARCHAR AS anon_2
FROM unnest(:ids::bigint[], :payment_ids::UUID[], :reasons::TEXT[], :details::TEXT[]) AS given(id, payment_id,
    reason, detail) JOIN LATERAL (SELECT public.outbox.id AS id, public.outbox.event_id AS event_id,
    public.outbox.event_type AS event_type, public.outbox.payload AS payload, public.outbox.headers AS headers,
    public.outbox.created_at AS created_at, public.outbox.due_at AS due_at, public.outbox.attempts AS attempts,
    public.outbox.crashes AS crashes, public.outbox.last_error AS last_error
FROM public.outbox
WHERE public.outbox.id = given.id
AND public.outbox.due_at BETWEEN CAST(:window_first::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND CAST(:window_last::VARCHAR AS TIMESTAMP WITH TIME ZONE)
AND coalesce(public.outbox.crashes, 0::INTEGER) >= 0
LIMIT ALL OFFSET 0) AS event ON true
ON CONFLICT (event_id) DO UPDATE SET event_type = excluded.event_type, payload = excluded.payload, headers =
    excluded.headers, created_at = excluded.created_at, payment_id = excluded.payment_id, attempts =
    excluded.attempts, reason = excluded.reason, detail = excluded.detail, dead_at = excluded.dead_at, state =
    excluded.state, resolved_at = :param_2::TIMESTAMP WITH TIME ZONE;

-- 18. close dead letters
-- what: closes open dead letters of settled events · lock: FOR UPDATE, ordered by event id · index: primary key
WITH found AS MATERIALIZED
(SELECT public.dead_letters.event_id AS event_id, public.dead_letters.state AS state
FROM public.dead_letters
WHERE public.dead_letters.event_id = any(:event_ids::uuid[])
ORDER BY public.dead_letters.event_id FOR UPDATE)
UPDATE public.dead_letters SET state='settled'::VARCHAR, resolved_at=clock_timestamp()
FROM found
WHERE public.dead_letters.event_id = found.event_id
AND found.state = 'open'::VARCHAR;
