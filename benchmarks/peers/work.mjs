// The work of one event, the same for each peer in JavaScript: a purchase and a mark, written by one statement.
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
