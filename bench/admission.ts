import { setTimeout as delay } from "node:timers/promises";
import { TestControl } from "../test/support/control.ts";
import { FakeNode } from "../test/support/fake-node.ts";
import { startPostgres } from "../test/support/postgres.ts";
import { quantiles, table } from "./statistics.ts";

/**
 * From a deploy's API call to the desired state at the node, over real TLS, with a database that waits for its disk and
 * no VMM. Each round is one more service; plans before it warm what idled.
 *
 *   node bench/admission.ts [ROUNDS]
 */
const rounds = Number(process.argv[2] ?? 40);
const warmUpRounds = 10;

const postgres = await startPostgres({ fsync: true });
const plane = await TestControl.start(await postgres.createDatabase());
const node = await FakeNode.join(plane, { memoryMib: 1024 * 1024 });
try {
  const client = await plane.client();
  const image = await plane.admitImage();
  const answered: number[] = [];
  const told: number[] = [];
  for (let round = -warmUpRounds; round < rounds; round++) {
    await node.desired(0);
    const waiting = node.link.desired(node.generation, 10_000, AbortSignal.timeout(15_000));
    const body = plane.apply(`web-${round + warmUpRounds}`, image);
    for (let n = 0; n < 5; n++) await client.call("applyService", { body: { ...body, dryRun: true } });
    await delay(20);
    const begunMs = performance.now();
    const call = client.call("applyService", { body }).then(() => performance.now() - begunMs);
    await waiting;
    const toldMs = performance.now() - begunMs;
    const answeredMs = await call;
    if (round < 0) continue;
    answered.push(answeredMs);
    told.push(toldMs);
  }
  const row = (name: string, values: readonly number[]): string[] => [name, ...quantiles(values).map((value) => value.toFixed(1))];
  console.log(table(["ms", "min", "median", "max"], [row("the call is answered", answered), row("the node is told", told)]));
} finally {
  node.close();
  await plane.stop();
  await postgres.stop();
}
