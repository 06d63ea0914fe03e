// pg-boss: a transactional worker; a batch of jobs, their work and their completion are one transaction.
// Usage: node pgboss.mjs CONNECTION fill|drain EVENTS
import { PgBoss } from "pg-boss";
import pg from "pg";
import { ALL } from "./work.mjs";

const [connectionString, step, events] = process.argv.slice(2);
const boss = new PgBoss({ connectionString, supervise: false, schedule: false });
boss.on("error", console.error);
await boss.start();

if (step === "fill") {
  await boss.createQueue("buy");
  const client = new pg.Client({ connectionString });
  await client.connect();
  const { rows } = await client.query("SELECT event FROM peer_events");
  for (let at = 0; at < rows.length; at += 1000) {
    await boss.insert("buy", rows.slice(at, at + 1000).map((row) => ({ data: row.event })));
  }
  await client.end();
} else {
  let left = Number(events);
  let finish;
  const finished = new Promise((resolve) => (finish = resolve));
  const begin = performance.now();
  const options = { batchSize: 1000, transactional: true, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true };
  await boss.work("buy", options, async (jobs, tx) => {
    await tx.executeSql(ALL, [JSON.stringify(jobs.map((job) => job.data))]);
    left -= jobs.length;
    if (left === 0) finish();
  });
  await finished;
  await boss.stop({ graceful: true });
  console.log(JSON.stringify({ seconds: (performance.now() - begin) / 1000 }));
}
await boss.stop({ graceful: true });
