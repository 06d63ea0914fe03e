// What the peers in JavaScript share: the work of an event, the step "fill", and the measurement of the step "drain".
import pg from "pg";

// The work of one event: a purchase and a mark, written by one statement.
export const EACH = `
  WITH bought AS (
    INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
  )
  INSERT INTO processed_events (event_id, event_type, outcome, payment_id)
  VALUES ($6, 'PURCHASE_CONFIRMED', 'created', $3) ON CONFLICT DO NOTHING`;

export const valuesOf = (event) => [
  event.student_id, event.course_id, event.payment_id, event.amount, event.currency, event.event_id,
];

// The same for a batch of events, as arrays.
export const ALL = `
  WITH event AS MATERIALIZED (
    SELECT * FROM jsonb_to_recordset($1::jsonb)
      AS given (student_id uuid, course_id uuid, payment_id uuid, amount numeric, currency text, event_id uuid)
  ), bought AS (
    INSERT INTO purchases (student_id, course_id, payment_id, amount, currency)
    SELECT student_id, course_id, payment_id, amount, currency FROM event ON CONFLICT DO NOTHING
  )
  INSERT INTO processed_events (event_id, event_type, outcome, payment_id)
  SELECT event_id, 'PURCHASE_CONFIRMED', 'created', payment_id FROM event ON CONFLICT DO NOTHING`;

// Call `insert` with the events of the table peer_events, in portions.
export async function fill(connectionString, insert) {
  const client = new pg.Client({ connectionString });
  await client.connect();
  const { rows } = await client.query("SELECT event FROM peer_events");
  await client.end();
  for (let at = 0; at < rows.length; at += 1000) {
    await insert(rows.slice(at, at + 1000).map((row) => row.event));
  }
}

// Print the seconds from the start of the worker until every job is settled and committed. `start` starts the worker,
// which calls `settled(n)` after n jobs, and returns the function that stops it: the stop is not measured.
// `hasUnfinished` is the SQL condition that the queue still has a job.
export async function measure(connectionString, events, hasUnfinished, start) {
  const client = new pg.Client({ connectionString });
  await client.connect();
  let left = events;
  let finish;
  const finished = new Promise((resolve) => (finish = resolve));
  const begin = performance.now();
  const stop = await start((n) => (left -= n) || finish());
  await finished;
  while ((await client.query(`SELECT ${hasUnfinished} AS yes`)).rows[0].yes);
  console.log(JSON.stringify({ seconds: (performance.now() - begin) / 1000 }));
  await stop();
  await client.end();
}
