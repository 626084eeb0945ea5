import { join } from "node:path";
import { expect, test } from "vitest";
import { newIn, takeInventory } from "../../tools/leaks.ts";
import type { Cell } from "../../src/api/resources.ts";
import { writeBusyboxImage } from "../support/busybox-image.ts";
import { eventually, Runtime } from "../support/runtime.ts";
import { freePorts } from "../../tools/free-ports.ts";

/**
 * Nothing is left behind: not by a deploy and its stop, not by a kill of the VMM, not by a kill of the agent at any
 * moment of a deploy, and in the end not by the runtime itself.
 */

const settle = (what: string, before: ReadonlySet<string>): Promise<true> =>
  eventually(what, 30_000, async () => {
    const left = newIn(before, await takeInventory());
    if (left.length > 0) throw new Error(left.join("\n"));
    return true as const;
  });

test("deploy, stop and kill in loops, also of the agent in mid-deploy, leave nothing", async () => {
  const untouched = await takeInventory();
  const runtime = await Runtime.start();
  const [port = 0] = await freePorts(1);
  try {
    await writeBusyboxImage(join(runtime.folder, "web"));
    await runtime.ok("image", "sign", join(runtime.folder, "web"));
    const ports = [{ name: "http", port: 80, publish: port }];
    const manifest = await runtime.manifest({
      web: { image: "./web", memory: "128MiB", ports, health: { http: "/", port: 80 }, stopTimeout: "1s" },
    });
    await runtime.ok("deploy", manifest);
    await runtime.ok("rm", "web");
    await runtime.up();
    const gone = async () => ((await runtime.json<{ items: Cell[] }>("ps", "--all")).items.length === 0 ? true : undefined);
    await eventually("removed", 30_000, gone);
    const idle = await takeInventory();

    for (let round = 0; round < 2; round++) {
      await runtime.ok("deploy", manifest);
      await runtime.ok("rm", "web");
      await eventually("removed", 30_000, gone);
      await settle(`round ${round}: stop`, idle);
    }

    await runtime.ok("deploy", manifest);
    const vmm = [...(await takeInventory())].find((line) => line.includes("qemu-system"));
    process.kill(Number(vmm?.split(" ")[1]), "SIGKILL");
    await eventually("restarted", 60_000, async () =>
      (await runtime.json<{ items: Cell[] }>("ps")).items.some(({ restarts, state }) => restarts === 1 && state === "running")
        ? true
        : undefined,
    );
    await runtime.ok("rm", "web");
    await eventually("removed", 30_000, gone);
    await settle("kill -9 of the VMM", idle);

    for (const delayMs of [20, 150, 400, 1200]) {
      const deploying = runtime.forge("deploy", "--no-wait", manifest);
      await new Promise((resolve) => setTimeout(resolve, 500 + delayMs));
      process.kill(await runtime.pid("agent"), "SIGKILL");
      await deploying;
      await runtime.up();
      await runtime.ok("rm", "web");
      await eventually("removed", 60_000, gone);
      await settle(`kill -9 of the agent ${delayMs} ms into a deploy`, new Set([...idle, ...(await agents())]));
    }
  } finally {
    await runtime.destroy();
  }
  await settle("forge down", untouched);
  expect(newIn(untouched, await takeInventory())).toEqual([]);
}, 420_000);

/** The agent that runs now: a restart gives it another number. */
async function agents(): Promise<string[]> {
  return [...(await takeInventory())].filter((line) => line.startsWith("process") && line.includes("main.ts"));
}
