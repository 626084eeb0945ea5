import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { setTimeout as delay } from "node:timers/promises";
import { cellReport, FakeNode } from "../../test/support/fake-node.ts";
import { failureOf, TestControl } from "../../test/support/control.ts";
import { startPostgres, type TestPostgres } from "../../test/support/postgres.ts";
import type { ForgeClient } from "../api/client.ts";
import type { Service } from "../api/resources.ts";

let postgres: TestPostgres;
let plane: TestControl;
let client: ForgeClient;
let node: FakeNode;
let image: string;

beforeAll(async () => {
  postgres = await startPostgres();
}, 60_000);

afterAll(async () => {
  await postgres?.stop();
}, 60_000);

beforeEach(async () => {
  plane = await TestControl.start(await postgres.createDatabase());
  client = await plane.client();
  node = await FakeNode.join(plane);
  image = await plane.admitImage();
}, 60_000);

afterEach(async () => {
  node?.close();
  await plane?.stop();
}, 60_000);

const get = (name: string): Promise<Service> => client.call("getService", { params: { name } });

async function eventually<T>(look: () => Promise<T>, condition: (value: T) => boolean): Promise<T> {
  for (let attempt = 0; ; attempt++) {
    const value = await look();
    if (condition(value)) return value;
    if (attempt > 400) throw new Error(`never came: ${JSON.stringify(value)}`);
    await delay(50);
  }
}

async function kinds(): Promise<string[]> {
  const all: string[] = [];
  for await (const event of client.lines("listEvents", { query: { limit: 1000 } })) all.push(event.kind);
  return all;
}

describe("apply", () => {
  test("gives a node what it needs to run the cell, and ends with the service ready", async () => {
    const { plan } = await client.call("applyService", {
      body: plane.apply("web", image, { env: { A: "1" }, ports: [{ name: "http", port: 80, publish: 8080 }] }),
    });
    expect(plan).toMatchObject({ action: "create", service: "web", revision: 1 });
    const state = await node.desiredWhen(({ cells }) => cells.length === 1);
    const [cell] = state.cells;
    expect(cell).toMatchObject({ service: "web", revision: 1, desired: "running", image: { digest: image } });
    expect(cell?.spec.env).toEqual({ A: "1" });
    expect(cell?.image.signatures).toHaveLength(1);
    expect(cell?.image.trustedKeysPem).toHaveLength(1);
    expect(cell?.address).toMatch(/^fd/);
    await node.link.report(
      [
        cellReport(cell?.id ?? "", "running", 1, {
          phases: { prepareMs: 5 },
          published: [{ name: "http", address: "127.0.0.1", port: 8080 }],
        }),
      ],
      true,
    );
    const service = await eventually(
      () => get("web"),
      ({ readyCells }) => readyCells === 1,
    );
    expect(service.cells[0]).toMatchObject({ state: "running", nodeName: "node-1", phases: { prepareMs: 5 }, published: [{ port: 8080 }] });
    await eventually(
      () => plane.control.db.selectFrom("jobs").selectAll().execute(),
      (jobs) => jobs.length === 0,
    );
    expect(await kinds()).toEqual(expect.arrayContaining(["service.applied", "cell.placed", "cell.assigned"]));
    expect(await client.call("verifyAudit", {})).toMatchObject({ ok: true, firstBad: null });
  });

  test("dry run changes nothing and says what would change", async () => {
    await client.call("applyService", { body: plane.apply("web", image, { env: { SECRET: "hush" } }) });
    const { plan } = await client.call("applyService", {
      body: plane.apply("web", image, { memory: "128MiB", env: { SECRET: "new" } }, { dryRun: true }),
    });
    expect(plan).toMatchObject({ action: "update", revision: 2 });
    expect(plan.changes).toEqual(expect.arrayContaining(["memory: 96MiB -> 128MiB", "env: SECRET changed"]));
    expect(JSON.stringify(plan)).not.toContain("hush");
    expect((await get("web")).revision).toBe(1);
    expect((await client.call("applyService", { body: plane.apply("web", image, { env: { SECRET: "hush" } }) })).plan.action).toBe(
      "unchanged",
    );
  });

  test("a new revision starts its cells first and then retires the old", async () => {
    const stop = new AbortController();
    const obeying = node.obey(stop.signal);
    await client.call("applyService", { body: plane.apply("web", image, { replicas: 2 }) });
    const first = await eventually(
      () => get("web"),
      ({ readyCells }) => readyCells === 2,
    );
    await client.call("applyService", { body: plane.apply("web", image, { replicas: 2, memory: "128MiB" }) });
    const second = await eventually(
      () => get("web"),
      ({ readyCells, cells }) => readyCells === 2 && cells.every((cell) => cell.revision === 2),
    );
    expect(second.cells).toHaveLength(2);
    expect(new Set([...first.cells, ...second.cells].map((cell) => cell.address)).size).toBe(4);
    expect((await client.call("listNodes", {})).items[0]).toMatchObject({ memoryFreeMib: 1024 - 256, cells: 2 });
    stop.abort();
    await obeying;
  });

  test("scales up and down without a new revision", async () => {
    const stop = new AbortController();
    const obeying = node.obey(stop.signal);
    await client.call("applyService", { body: plane.apply("web", image) });
    const [survivor] = (
      await eventually(
        () => get("web"),
        ({ readyCells }) => readyCells === 1,
      )
    ).cells;
    expect((await client.call("applyService", { body: plane.apply("web", image, { replicas: 3 }) })).plan).toMatchObject({
      revision: 1,
      changes: ["replicas: 1 -> 3"],
    });
    await eventually(
      () => get("web"),
      ({ readyCells }) => readyCells === 3,
    );
    await client.call("applyService", { body: plane.apply("web", image, { replicas: 1 }) });
    const service = await eventually(
      () => get("web"),
      ({ cells }) => cells.length === 1,
    );
    expect(service.cells[0]?.id).toBe(survivor?.id);
    stop.abort();
    await obeying;
  });

  test("stop, start and remove", async () => {
    const stop = new AbortController();
    const obeying = node.obey(stop.signal);
    await client.call("applyService", { body: plane.apply("web", image) });
    await eventually(
      () => get("web"),
      ({ readyCells }) => readyCells === 1,
    );
    await client.call("stopService", { params: { name: "web" } });
    expect(
      (
        await eventually(
          () => get("web"),
          ({ cells }) => cells[0]?.state === "stopped",
        )
      ).desired,
    ).toBe("stopped");
    expect((await client.call("listNodes", {})).items[0]).toMatchObject({ memoryFreeMib: 1024 });
    await client.call("startService", { params: { name: "web" } });
    await eventually(
      () => get("web"),
      ({ readyCells, cells }) => readyCells === 1 && cells.length === 1,
    );
    await client.call("removeService", { params: { name: "web" } });
    expect(await failureOf(get("web"))).toBe("NOT_FOUND");
    await eventually(
      () => client.call("listCells", {}),
      ({ items }) => items.length === 0,
    );
    expect(await plane.control.db.selectFrom("cells").selectAll().execute()).toHaveLength(0);
    stop.abort();
    await obeying;
  });
});

describe("refusals", () => {
  test("no room, in words, at once", async () => {
    const call = client.call("applyService", { body: plane.apply("big", image, { memory: "2GiB" }) });
    await expect(call).rejects.toMatchObject({
      status: 507,
      body: { code: "NO_ROOM", message: expect.stringContaining("2048 MiB") as string },
    });
    await expect(client.call("applyService", { body: plane.apply("far", image, {}, { jurisdiction: "fr" }) })).rejects.toMatchObject({
      body: { code: "NO_ROOM" },
    });
    expect(await failureOf(get("big"))).toBe("NOT_FOUND");
    expect(await kinds()).toContain("service.refused");
  });

  test("a start-first update that does not fit says so and leaves the old revision alone", async () => {
    await client.call("applyService", { body: plane.apply("web", image, { memory: "512MiB" }) });
    await node.desiredWhen(({ cells }) => cells.length === 1);
    expect(await failureOf(client.call("applyService", { body: plane.apply("web", image, { memory: "768MiB" }) }))).toBe("NO_ROOM");
    expect((await get("web")).revision).toBe(1);
  });

  test("a port that another service publishes", async () => {
    const ports = [{ name: "http", port: 80, publish: 8080 }];
    await client.call("applyService", { body: plane.apply("one", image, { ports }) });
    await node.desiredWhen(({ cells }) => cells.length === 1);
    expect(await failureOf(client.call("applyService", { body: plane.apply("two", image, { ports }) }))).toBe("PORT_TAKEN");
    expect(await failureOf(client.call("applyService", { body: plane.apply("one", image, { ports, replicas: 2 }) }))).toBe("no failure");
  });

  test("an image whose key is no longer trusted, or that was never admitted", async () => {
    const { items } = await client.call("listTrustedKeys", {});
    await client.call("removeTrustedKey", { params: { name: items[0]?.name ?? "" } });
    expect(await failureOf(client.call("applyService", { body: plane.apply("web", image) }))).toBe("IMAGE_SIGNATURE_UNTRUSTED");
    expect(await failureOf(client.call("applyService", { body: plane.apply("web", `sha256:${"0".repeat(64)}`) }))).toBe("IMAGE_NOT_FOUND");
  });
});

describe("a cell that fails", () => {
  test("is undone: the cell is stopped, says why, and a new apply starts another", async () => {
    await client.call("applyService", { body: plane.apply("web", image) });
    const [cell] = (await node.desiredWhen(({ cells }) => cells.length === 1)).cells;
    await node.link.report([cellReport(cell?.id ?? "", "failed", 1, { reason: "exit status 1", exitStatus: 1 })], true);
    await node.desiredWhen(({ cells }) => cells[0]?.desired === "stopped");
    const service = await eventually(
      () => get("web"),
      ({ cells }) => cells[0]?.state === "failed",
    );
    expect(service.cells[0]?.reason).toBe("exit status 1");
    await eventually(kinds, (all) => all.includes("cell.failed"));
    expect((await client.call("listNodes", {})).items[0]).toMatchObject({ memoryFreeMib: 1024 });
    const { plan } = await client.call("applyService", { body: plane.apply("web", image) });
    expect(plan).toMatchObject({ action: "update", revision: 1 });
    await node.desiredWhen(({ cells }) => cells.length === 1 && cells[0]?.desired === "running" && cells[0].id !== cell?.id);
  });
});

describe("reports", () => {
  test("what cannot be read of one cell keeps no other's report away, and what only informs is mended", async () => {
    await client.call("applyService", { body: plane.apply("web", image, { replicas: 3 }) });
    const { cells } = await node.desiredWhen((state) => state.cells.length === 3);
    const [bad = "", mended = "", good = ""] = cells.map((cell) => cell.id);
    const said = { reason: `it\0ended\u001b[2J${"x".repeat(5000)}\ud800`, exitStatus: 2 ** 40, startedAt: "0000-01-01T00:00:00Z" };
    await node.link.report(
      [
        { ...cellReport(bad, "running"), state: "dancing" as "running" },
        cellReport(mended, "running", 1, { ...said, restarts: 2 ** 40, published: [{ name: "http", address: "a\0b\ud800", port: 1 }] }),
        cellReport(good, "running"),
      ],
      true,
    );
    const { items } = await client.call("listCells", {});
    const byId = new Map(items.map((cell) => [cell.id, cell]));
    expect(byId.get(bad)?.state).toBe("assigned");
    expect(byId.get(good)?.state).toBe("running");
    expect(byId.get(mended)).toMatchObject({ state: "running", exitStatus: null, startedAt: null, published: [{ address: "a b\ufffd" }] });
    expect(byId.get(mended)?.reason).toMatch(/^it ended \[2Jx+$/);
    expect(byId.get(mended)?.reason?.length).toBeLessThanOrEqual(4000);
  });

  test("a removed cell of which a whole report speaks, however badly, is not forgotten", async () => {
    await client.call("applyService", { body: plane.apply("web", image) });
    const [cell] = (await node.desiredWhen(({ cells }) => cells.length === 1)).cells;
    await client.call("removeService", { params: { name: "web" } });
    await node.link.report([{ ...cellReport(cell?.id ?? "", "stopping"), state: "dancing" as "stopping" }], true);
    expect(await plane.control.db.selectFrom("cells").select("id").execute()).toHaveLength(1);
    await node.link.report([], true);
    expect(await plane.control.db.selectFrom("cells").select("id").execute()).toHaveLength(0);
  });

  test("a cell that runs again after its node's stop holds its room and its port again", async () => {
    const ports = [{ name: "http", port: 80, publish: 8080 }];
    const room = async () => (await client.call("listNodes", {})).items[0]?.memoryFreeMib;
    await client.call("applyService", { body: plane.apply("one", image, { ports }) });
    const [cell] = (await node.desiredWhen(({ cells }) => cells.length === 1)).cells;
    const report = (state: "running" | "stopped") => node.link.report([cellReport(cell?.id ?? "", state)], true);
    await report("running");
    await eventually(
      () => plane.control.db.selectFrom("jobs").selectAll().execute(),
      (jobs) => jobs.length === 0,
    );
    await report("stopped");
    expect(await room()).toBe(1024);
    await report("running");
    expect(await room()).toBe(1024 - 96);
    expect(await failureOf(client.call("applyService", { body: plane.apply("two", image, { ports }) }))).toBe("PORT_TAKEN");
  });
});
