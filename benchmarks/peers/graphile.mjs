// graphile-worker: fetches jobs in batches (localQueue) and runs many at once. Each job commits its own work; the job
// is deleted by a later statement, for many jobs at once. Usage: node graphile.mjs CONNECTION fill|drain EVENTS
import { Logger, run, runMigrations } from "graphile-worker";
import pg from "pg";
import { EACH, valuesOf } from "./work.mjs";

const [connectionString, step, events] = process.argv.slice(2);
const CONCURRENCY = 24;

if (step === "fill") {
  await runMigrations({ connectionString });
  const client = new pg.Client({ connectionString });
  await client.connect();
  await client.query("SELECT graphile_worker.add_job('buy', event::json) FROM peer_events");
  await client.end();
} else {
  let left = Number(events);
  let finish;
  const finished = new Promise((resolve) => (finish = resolve));
  const begin = performance.now();
  const runner = await run({
    connectionString,
    maxPoolSize: CONCURRENCY + 1,
    noHandleSignals: true,
    parsedCronItems: [],
    logger: new Logger(() => (level, message) => level === "error" && console.error(message)),
    preset: {
      worker: { concurrentJobs: CONCURRENCY, localQueue: { size: 500 }, completeJobBatchDelay: 5, pollInterval: 100 },
    },
    taskList: {
      buy: (event, { withPgClient }) => withPgClient((client) => client.query({ name: "buy", text: EACH, values: valuesOf(event) })),
    },
  });
  runner.events.on("job:complete", () => --left || finish());
  await finished;
  await runner.stop();
  console.log(JSON.stringify({ seconds: (performance.now() - begin) / 1000 }));
}
