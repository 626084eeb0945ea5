import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Cell } from "../../src/api/resources.ts";
import { writeBusyboxImage } from "../support/busybox-image.ts";
import { eventually, Runtime } from "../support/runtime.ts";
import { freePorts } from "../../tools/free-ports.ts";

/** Agent and control plane may die at any time: cells keep answering, and what is told of them is soon right again. */

let runtime: Runtime;
let port = 0;
const cells = async (): Promise<Cell[]> => (await runtime.json<{ items: Cell[] }>("ps")).items;
const running = async (): Promise<Cell[] | undefined> => {
  const found = (await cells()).filter(({ state }) => state === "running");
  return found.length === 3 ? found : undefined;
};

beforeAll(async () => {
  runtime = await Runtime.start();
  [port = 0] = await freePorts(1);
  await writeBusyboxImage(join(runtime.folder, "web"));
  await runtime.ok("image", "sign", join(runtime.folder, "web"));
  const ports = [{ name: "http", port: 80, publish: port }];
  const web = { image: "./web", replicas: 3, memory: "128MiB", ports, health: { http: "/", port: 80 }, stopTimeout: "2s" };
  await runtime.ok("deploy", await runtime.manifest({ web }));
}, 180_000);
afterAll(() => runtime?.destroy(), 120_000);

/** Twelve connections: with three replicas behind one port, each is met. */
async function allAnswer(): Promise<void> {
  for (let n = 0; n < 12; n++) {
    const response = await fetch(`http://127.0.0.1:${port}/`, { signal: AbortSignal.timeout(10_000), headers: { connection: "close" } });
    expect(await response.text()).toBe("hello from a cell\n");
  }
}

describe("kill -9", () => {
  test.each([{ killed: ["agent"] }, { killed: ["control"] }, { killed: ["agent", "control"] }] as const)(
    "of $killed: cells answer, and ps is right within 5 s of the restart",
    async ({ killed }) => {
      const before = await running();
      for (const name of killed) process.kill(await runtime.pid(name), "SIGKILL");
      await allAnswer();
      await runtime.up();
      const restarted = Date.now();
      const after = await eventually("ps is right again", 5000, running);
      expect(Date.now() - restarted).toBeLessThan(5000);
      expect(after.map(({ id, restarts, startedAt }) => ({ id, restarts, startedAt }))).toEqual(
        before?.map(({ id, restarts, startedAt }) => ({ id, restarts, startedAt })),
      );
      await allAnswer();
      expect((await runtime.ok("exec", "web", "--", "echo", "still here")).trim()).toBe("still here");
    },
    90_000,
  );

  test("nothing that was written while the agent was away is lost from the logs", async () => {
    const [cell] = await cells();
    await runtime.ok("exec", "web", "--", "true");
    process.kill(await runtime.pid("agent"), "SIGKILL");
    for (let n = 0; n < 9; n++)
      await fetch(`http://127.0.0.1:${port}/away-${n}`, { headers: { connection: "close" } }).then((answer) => answer.text());
    await runtime.up();
    const logs = await eventually("the lines came", 10_000, async () => {
      const text = await runtime.ok("logs", "web");
      return Array.from({ length: 9 }, (_, n) => `away-${n}`).every((word) => text.includes(word)) ? text : undefined;
    });
    for (let n = 0; n < 9; n++) expect(logs.split(`away-${n}`).length - 1).toBeGreaterThanOrEqual(1);
    expect(cell).toBeDefined();
  }, 60_000);

  test("the chain still verifies", async () => {
    await runtime.ok("audit", "verify");
  });
});
