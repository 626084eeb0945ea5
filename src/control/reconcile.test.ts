import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from "vitest";
import { setTimeout as delay } from "node:timers/promises";
import { cellReport, FakeNode } from "../../test/support/fake-node.ts";
import { TestControl } from "../../test/support/control.ts";
import { startPostgres, type TestPostgres } from "../../test/support/postgres.ts";
import { ForgeError } from "../base/errors.ts";
import { transact } from "./db/database.ts";
import { deploySteps, type Step } from "./deploy.ts";
import { Reconciler } from "./reconcile.ts";
import { applyService } from "./services.ts";
import { serviceSpecSchema } from "../api/manifest.ts";

let postgres: TestPostgres;
let url: string;
let plane: TestControl;
let node: FakeNode;
let image: string;
const runners: Reconciler[] = [];

beforeAll(async () => {
  postgres = await startPostgres();
}, 60_000);
afterAll(async () => {
  await postgres?.stop();
}, 60_000);

beforeEach(async () => {
  url = await postgres.createDatabase();
  plane = await TestControl.start(url);
  node = await FakeNode.join(plane);
  image = await plane.admitImage();
  await plane.running.stopReconciler(); // this test brings its own
}, 60_000);

afterEach(async () => {
  node?.close();
  for (const runner of runners.splice(0)) await runner.stop();
  await plane?.stop();
}, 60_000);

function run(steps: readonly Step[], leaseMs = 15_000): Reconciler {
  const runner = new Reconciler(plane.control, { steps, leaseMs });
  runners.push(runner);
  runner.start();
  return runner;
}

async function deploy(): Promise<void> {
  const tenant = await plane.control.db.selectFrom("tenants").select("id").where("name", "=", "default").executeTakeFirstOrThrow();
  const spec = serviceSpecSchema.parse({ memory: "96MiB" });
  const request = { name: "web", jurisdiction: "de", imageDigest: image, imageReference: "test:1", spec, dryRun: false };
  await transact(plane.control.db, (trx) => applyService(trx, plane.control, tenant.id, request));
}

/** The flow with a runner that falls silent, as a killed process does, when it comes to this step. */
function silentAt(name: string): Step[] {
  return deploySteps.map((step) => (step.name === name ? { ...step, do: (context) => hang().then(() => step.do(context)) } : step));
}

/** Longer than the lease, and then the transaction is lost with its process. */
async function hang(): Promise<void> {
  await delay(800);
  throw new ForgeError("DATABASE_UNAVAILABLE", "the process was killed");
}

test.each(deploySteps.map((step) => step.name))("killed before the step %s, the next process goes on from there", async (name) => {
  await deploy();
  const killed = run(silentAt(name), 300);
  await delay(300);
  void killed.stop();
  run(deploySteps);
  const state = await node.desiredWhen(({ cells }) => cells.length === 1, 20_000);
  await node.link.report([cellReport(state.cells[0]?.id ?? "", "running")], true);
  const jobs = async (): Promise<number> => (await plane.control.db.selectFrom("jobs").select("id").execute()).length;
  for (let attempt = 0; attempt < 200 && (await jobs()) > 0; attempt++) await delay(50);
  expect(await jobs()).toBe(0);
  const cells = await plane.control.db.selectFrom("cells").selectAll().execute();
  expect(cells).toHaveLength(1);
  expect(cells[0]).toMatchObject({ desired: "running", state: "running", holds_room: true });
  const kinds = (await plane.control.db.selectFrom("log_entries").select("event").execute()).map(
    ({ event }) => (JSON.parse(event) as { kind: string }).kind,
  );
  for (const once of ["cell.placed", "cell.assigned"]) expect(kinds.filter((kind) => kind === once)).toHaveLength(1);
});

test.each(["address", "assign", "ready", "retire"])("a step %s that fails is undone back to the start", async (name) => {
  const undone: string[] = [];
  const steps = deploySteps.map((step): Step => ({
    ...step,
    do:
      step.name === name
        ? () => Promise.reject(new ForgeError("CELL_FAILED", "it did not work"))
        : step.name === "ready"
          ? async () => "done"
          : step.do,
    undo: async (context) => {
      undone.push(step.name);
      await step.undo?.(context);
    },
  }));
  await deploy();
  run(steps);
  const read = () => plane.control.db.selectFrom("cells").selectAll().executeTakeFirstOrThrow();
  for (let attempt = 0; attempt < 200 && (await read()).state !== "failed"; attempt++) await delay(50);
  const before = deploySteps.slice(
    0,
    deploySteps.findIndex((step) => step.name === name),
  );
  while (before.at(-1)?.internal === true) before.pop(); // gone with the transaction of the step that failed
  expect(undone).toEqual(before.map((step) => step.name).toReversed());
  expect(await read()).toMatchObject({ state: "failed", reason: "it did not work", holds_room: name === "ready" || name === "retire" });
  expect(await plane.control.db.selectFrom("jobs").select("id").execute()).toEqual([]);
});
