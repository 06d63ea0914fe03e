// pg-boss: a transactional worker; a batch of jobs, their work and their completion are one transaction.
// Usage: node pgboss.mjs CONNECTION fill|drain EVENTS
import { PgBoss } from "pg-boss";
import { ALL, fill, measure } from "./work.mjs";

const [connectionString, step, events] = process.argv.slice(2);
const boss = new PgBoss({ connectionString, supervise: false, schedule: false });
boss.on("error", console.error);
await boss.start();

async function start(settled) {
  const options = { batchSize: 1000, transactional: true, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true };
  await boss.work("buy", options, async (jobs, tx) => {
    await tx.executeSql(ALL, [JSON.stringify(jobs.map((job) => job.data))]);
    settled(jobs.length);
  });
  return () => boss.offWork("buy");
}

if (step === "fill") {
  await boss.createQueue("buy");
  await fill(connectionString, (rows) => boss.insert("buy", rows.map((data) => ({ data }))));
} else {
  const hasUnfinished = "EXISTS (SELECT FROM pgboss.job WHERE name = 'buy' AND state < 'completed')";
  await measure(connectionString, Number(events), hasUnfinished, start);
}
await boss.stop({ graceful: true });
