import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { WebSocket } from "ws";
import type { Cell } from "../src/api/resources.ts";
import { writeBusyboxImage } from "../test/support/busybox-image.ts";
import { eventually, Runtime } from "../test/support/runtime.ts";

/**
 * What an idle cell costs the agent: its memory with one cell against many, each after a forced garbage collection, which
 * Node's inspector (SIGUSR1) can ask for. VMMs and proxies are processes of their own and not counted.
 *
 *   node bench/idle-memory.ts [CELLS]
 */
const many = Number(process.argv[2] ?? 16);
const mebibyte = 1024 * 1024;

interface Memory {
  readonly rss: number;
  readonly heapUsed: number;
  readonly external: number;
}

const runtime = await Runtime.start();
try {
  await writeBusyboxImage(join(runtime.folder, "web"));
  await runtime.ok("image", "sign", join(runtime.folder, "web"));
  await scaleTo(many); // once, so that code and buffers are there in both figures
  await scaleTo(1);
  const one = await memoryOfAgent();
  await scaleTo(many);
  const all = await memoryOfAgent();
  const perCell = (name: keyof Memory): string => ((all[name] - one[name]) / (many - 1) / mebibyte).toFixed(3);
  console.log(
    `per idle cell (${many} against 1): heap ${perCell("heapUsed")} MiB, buffers ${perCell("external")} MiB, resident ${perCell("rss")} MiB`,
  );
  console.log(
    `agent with ${many} cells: resident ${(all.rss / mebibyte).toFixed(1)} MiB, heap ${(all.heapUsed / mebibyte).toFixed(1)} MiB`,
  );
} finally {
  await runtime.destroy();
}

async function scaleTo(replicas: number): Promise<void> {
  const service = { image: "./web", replicas, memory: "96MiB", command: ["sleep", "100000"], stopTimeout: "1s" };
  await runtime.ok("deploy", "--timeout", "170s", await runtime.manifest({ idle: service }));
  await eventually(`${replicas} cells`, 60_000, async () => {
    const { items } = await runtime.json<{ items: Cell[] }>("ps", "--all");
    return items.length === replicas && items.every(({ state }) => state === "running") ? true : undefined;
  });
}

async function memoryOfAgent(): Promise<Memory> {
  process.kill(await runtime.pid("agent"), "SIGUSR1");
  const url = await eventually("the inspector", 5000, async () => {
    const targets = (await (await fetch("http://127.0.0.1:9229/json")).json()) as { webSocketDebuggerUrl: string }[];
    return targets[0]?.webSocketDebuggerUrl;
  });
  const socket = new WebSocket(url);
  await new Promise((resolve) => socket.once("open", resolve));
  let id = 0;
  const ask = (method: string, params: object = {}): Promise<{ result: { result?: { value?: string } } }> => {
    id += 1;
    socket.send(JSON.stringify({ id, method, params }));
    return new Promise((resolve) => socket.once("message", (data: Buffer) => resolve(JSON.parse(data.toString()) as never)));
  };
  for (let n = 0; n < 3; n++) {
    await ask("HeapProfiler.collectGarbage");
    await delay(1000);
  }
  const answer = await ask("Runtime.evaluate", { expression: "JSON.stringify(process.memoryUsage())", returnByValue: true });
  socket.close();
  return JSON.parse(answer.result.result?.value ?? "{}") as Memory;
}
