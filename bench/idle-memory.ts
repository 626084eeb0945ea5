import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { Cell } from "../src/api/resources.ts";
import { writeBusyboxImage } from "../test/support/busybox-image.ts";
import { Runtime } from "../test/support/runtime.ts";

/**
 * What an idle cell costs the agent: its resident memory with one cell against many, after both have settled. VMMs and
 * proxies are processes of their own and not counted.
 *
 *   node bench/idle-memory.ts [CELLS]
 */
const many = Number(process.argv[2] ?? 12);

const runtime = await Runtime.start();
try {
  await writeBusyboxImage(join(runtime.folder, "web"));
  await runtime.ok("image", "sign", join(runtime.folder, "web"));
  const one = await residentMib(1);
  const all = await residentMib(many);
  console.log(
    `agent with 1 cell: ${one.toFixed(1)} MiB; with ${many}: ${all.toFixed(1)} MiB; per idle cell: ${((all - one) / (many - 1)).toFixed(2)} MiB`,
  );
} finally {
  await runtime.destroy();
}

/** Least of a minute's samples: what stays after garbage collection had its chances. */
async function residentMib(replicas: number): Promise<number> {
  const service = { image: "./web", replicas, memory: "64MiB", command: ["sleep", "100000"], stopTimeout: "1s" };
  await runtime.ok("deploy", "--timeout", "170s", await runtime.manifest({ idle: service }));
  const running = (await runtime.json<{ items: Cell[] }>("ps")).items.filter(({ state }) => state === "running");
  if (running.length !== replicas) throw new Error(`${running.length} of ${replicas} cells run`);
  let least = Number.POSITIVE_INFINITY;
  for (let n = 0; n < 30; n++) {
    await delay(1000);
    const status = await readFile(`/proc/${await runtime.pid("agent")}/status`, "utf8");
    least = Math.min(least, Number(/^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1]) / 1024);
  }
  return least;
}
