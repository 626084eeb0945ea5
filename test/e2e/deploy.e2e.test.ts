import { readFile } from "node:fs/promises";
import { release } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Cell, Event, Service } from "../../src/api/resources.ts";
import { writeBusyboxImage } from "../support/busybox-image.ts";
import { eventually, Runtime } from "../support/runtime.ts";
import { freePorts } from "../../tools/free-ports.ts";

/** The main job through the real command line: one runtime, real microVMs. */

let runtime: Runtime;
let port = 0;
const web = (more: Record<string, unknown> = {}): Record<string, unknown> => ({
  image: "./web",
  memory: "128MiB",
  ports: [{ name: "http", port: 80, publish: port }],
  health: { http: "/", port: 80 },
  stopTimeout: "2s",
  ...more,
});
const cells = async (): Promise<Cell[]> => (await runtime.json<{ items: Cell[] }>("ps")).items.filter(({ state }) => state === "running");
const get = async (): Promise<string> => (await fetch(`http://127.0.0.1:${port}/`, { signal: AbortSignal.timeout(10_000) })).text();

beforeAll(async () => {
  runtime = await Runtime.start();
  [port = 0] = await freePorts(1);
  await writeBusyboxImage(join(runtime.folder, "web"), { env: ["PATH=/bin", "COLOUR=blue"], workingDir: "/www" });
  await runtime.ok("image", "sign", join(runtime.folder, "web"));
}, 120_000);
afterAll(() => runtime?.destroy(), 120_000);

describe("a service, from its manifest to its end", () => {
  test("a dry run shows the plan and makes nothing", async () => {
    const plan = await runtime.ok("deploy", "--dry-run", await runtime.manifest({ web: web() }));
    expect(plan).toContain("web");
    expect(await cells()).toEqual([]);
  });

  test("is deployed, ready, and answers on its published port", async () => {
    await runtime.ok("deploy", await runtime.manifest({ web: web({ env: { SHADE: "dark" } }) }));
    const [cell] = await cells();
    expect(cell).toMatchObject({ service: "web", state: "running", restarts: 0, published: [{ name: "http", port }] });
    expect(cell?.measurement).toMatch(/^sha256:/);
    expect(cell?.phases).toMatchObject({
      prepareMs: expect.any(Number),
      attachMs: expect.any(Number),
      spawnMs: expect.any(Number),
      kernelMs: expect.any(Number),
    });
    expect(await get()).toBe("hello from a cell\n");
  }, 120_000);

  test("runs on a kernel of its own, as the image and the manifest say", async () => {
    const kernel = (await runtime.ok("exec", "web", "--", "uname", "-r")).trim();
    expect(kernel).not.toBe("");
    expect(kernel).not.toBe(release());
    const env = await runtime.ok("exec", "web", "--", "sh", "-c", "echo $COLOUR-$SHADE; hostname");
    expect(env).toMatch(/^blue-dark\nweb-/);
  });

  test("exec carries stdin, both outputs and the exit status", async () => {
    const echoed = await runtime.forgeWithInput("from outside\n", "exec", "web", "--", "cat");
    expect(echoed).toMatchObject({ code: 0, stdout: "from outside" });
    const failed = await runtime.forge("exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7");
    expect(failed).toMatchObject({ code: 7, stdout: "out", stderr: "err" });
    const absent = await runtime.forge("exec", "web", "--", "no-such-program");
    expect(absent.code).not.toBe(0);
    expect(absent.stderr).toContain("no-such-program");
    const bulk = await runtime.ok("exec", "web", "--", "sh", "-c", "yes 0123456789abcde | head -n 200000 | wc -c");
    expect(bulk.trim()).toBe("3200000");
    const output = await runtime.ok("exec", "web", "--", "sh", "-c", "yes 0123456789abcde | head -n 100000");
    expect(output.length).toBe(1_600_000 - 1);
  }, 60_000);

  test("logs hold what it wrote, each stream under its name", async () => {
    const logs = await eventually("the request is in the log", 10_000, async () => {
      const text = await runtime.ok("logs", "web");
      return text.includes("response:200") ? text : undefined;
    });
    expect(logs).toContain("response:200");
  });

  test("a change is a new revision: the new cell is ready before the old one goes", async () => {
    const [before] = await cells();
    let refused = 0;
    let over = false;
    const asking = (async () => {
      while (!over) {
        await get().catch(() => refused++);
        await new Promise((resolve) => setTimeout(resolve, 100));
      }
    })();
    const output = await runtime.ok("deploy", await runtime.manifest({ web: web({ env: { SHADE: "light" } }) }));
    over = true;
    await asking;
    expect(output).toContain("web");
    const [after] = await eventually("one new cell", 30_000, async () => ((await cells()).length === 1 ? cells() : undefined));
    expect(after?.id).not.toBe(before?.id);
    expect(after?.revision).toBe((before?.revision ?? 0) + 1);
    expect(refused).toBeLessThanOrEqual(1);
    expect(await runtime.ok("exec", "web", "--", "sh", "-c", "echo $SHADE")).toBe("light");
  }, 120_000);

  test("the same manifest again changes nothing", async () => {
    const [before] = await cells();
    await runtime.ok("deploy", await runtime.manifest({ web: web({ env: { SHADE: "light" } }) }));
    expect((await cells()).map(({ id }) => id)).toEqual([before?.id]);
  });

  test("a cell that dies is started again", async () => {
    const [cell] = await cells();
    await runtime.forge(
      "exec",
      "web",
      "--",
      "sh",
      "-c",
      "kill -9 $(ps | grep '[h]ttpd -f' | head -n 1 | sed 's/^ *//;s/ .*//' 2>/dev/null || true); kill -9 2",
    );
    await eventually("restarted", 60_000, async () => {
      const [again] = await cells();
      return again?.id === cell?.id && again?.restarts === 1 ? true : undefined;
    });
    expect(await get()).toBe("hello from a cell\n");
  }, 90_000);

  test("stop, start, remove", async () => {
    await runtime.ok("stop", "web");
    await eventually("stopped", 30_000, async () => ((await cells()).length === 0 ? true : undefined));
    await expect(get()).rejects.toThrow();
    await runtime.ok("start", "web");
    await eventually("running again", 60_000, async () => ((await cells()).length === 1 ? true : undefined));
    expect(await get()).toBe("hello from a cell\n");
    await runtime.ok("rm", "web");
    const list = await runtime.json<{ items: Service[] }>("ps", "--all");
    await eventually("gone", 30_000, async () => ((await cells()).length === 0 ? true : undefined));
    expect(JSON.stringify(list)).not.toContain('"desired":"running"');
  }, 120_000);

  test("all of it is in the log, and the log verifies", async () => {
    const text = await runtime.ok("--json", "events", "--limit", "1000");
    const events = text
      .split("\n")
      .filter(Boolean)
      .map((line) => JSON.parse(line) as Event);
    const kinds = new Set(events.map(({ kind }) => kind));
    for (const kind of [
      "trust.added",
      "image.admitted",
      "service.applied",
      "cell.prepared",
      "cell.attached",
      "cell.started",
      "cell.ready",
      "cell.stopped",
      "session.exec",
      "service.stopped",
      "service.removed",
    ]) {
      expect([...kinds]).toContain(kind);
    }
    const started = events.find(({ kind }) => kind === "cell.started");
    expect(started?.details["measurement"]).toMatch(/^sha256:/);
    await runtime.ok("audit", "verify");
  });

  test("no secret of the runtime is in its logs", async () => {
    const context = JSON.parse(await readFile(join(runtime.folder, "home", "context.json"), "utf8")) as { token: string };
    for (const name of ["control", "agent"]) {
      const log = await readFile(join(runtime.dataDir, "log", `${name}.log`), "utf8");
      expect(log).not.toContain(context.token);
    }
  });
});
