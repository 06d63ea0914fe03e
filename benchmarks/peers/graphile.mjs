// graphile-worker: fetches jobs in batches (localQueue) and runs many at once. Each job commits its own work; the job
// is deleted by a later statement, for many jobs at once. Usage: node graphile.mjs CONNECTION fill|drain EVENTS
import { Logger, makeWorkerUtils, run } from "graphile-worker";
import { EACH, fill, measure, valuesOf } from "./work.mjs";

const [connectionString, step, events] = process.argv.slice(2);
const CONCURRENCY = 24;

async function start(settled) {
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
  runner.events.on("job:complete", () => settled(1));
  return () => runner.stop();
}

if (step === "fill") {
  const utils = await makeWorkerUtils({ connectionString });
  await utils.migrate();
  await fill(connectionString, (rows) => utils.addJobs(rows.map((payload) => ({ identifier: "buy", payload }))));
  await utils.release();
} else {
  await measure(connectionString, Number(events), "EXISTS (SELECT FROM graphile_worker.jobs)", start);
}
