import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { afterEach, expect, test, vi } from "vitest";
import { CgroupTree } from "../base/cgroup.ts";
import { newId } from "../base/ids.ts";
import { Cell } from "./cell.ts";
import { type FakeGuest, startFakeGuest } from "./channel.fixture.ts";
import { spawnVmm } from "./vmm/process.ts";

/** A real process in a real control group stands for the VMM; only the guest behind the channel is not one. */
let cleanUp = new AsyncDisposableStack();
afterEach(async () => {
  await cleanUp.disposeAsync();
  cleanUp = new AsyncDisposableStack();
});

test("a cell is ending from the guest's last word on, and its end is the first exit that was told", async () => {
  const { cell, guest } = await open();
  expect(cell.isEnding).toBe(false);
  for (const code of [7, 8, 9]) guest.send("exited", 0, Buffer.from([...Buffer.alloc(8), 0, code, 0, 0, 0]));
  await vi.waitFor(() => expect(cell.isEnding).toBe(true));
  const probe = cell.probe({ port: 80, timeoutMs: 1000 });
  guest.hangUp();
  await expect(probe).rejects.toMatchObject({ code: "CELL_FAILED" });
  expect(cell.isEnding).toBe(true);
  await cell.kill();
  expect(await cell.ended).toMatchObject({ status: { code: 7 }, failure: null });
  expect(cell.isEnding).toBe(true);
});

test("a cell is ending when the guest says that it cannot go on", async () => {
  const { cell, guest } = await open();
  guest.send("fatal", 0, Buffer.from("NO_ROOT\0the disk\x1bis not what was sealed\0"));
  await vi.waitFor(() => expect(cell.isEnding).toBe(true));
  guest.hangUp();
  expect(await cell.ended).toMatchObject({
    failure: { code: "CELL_FAILED", reason: "the guest gave up: the disk is not what was sealed" },
  });
});

test("a probe that fails because the channel closed finds the cell ending", async () => {
  const { cell, guest } = await open();
  const probe = cell.probe({ port: 80, timeoutMs: 1000 }).catch(() => cell.isEnding);
  await vi.waitFor(() => expect(guest.heard).toContain("probe"));
  guest.hangUp();
  expect(await probe).toBe(true);
  await cell.kill();
});

test("a cell that was let go is not ending", async () => {
  const { cell } = await open();
  await cell.detach();
  expect(cell.isEnding).toBe(false);
});

async function open(): Promise<{ cell: Cell; guest: FakeGuest & { readonly heard: string[] } }> {
  const cellId = newId("cell");
  const heard: string[] = [];
  const guest = cleanUp.use(await startFakeGuest(({ type }) => void heard.push(type)));
  const cellDir = await mkdtemp(join(tmpdir(), "forge-cell-"));
  cleanUp.defer(() => rm(cellDir, { recursive: true, force: true }));
  const cgroup = new CgroupTree().create(cellId, { memoryBytes: 64 * 1024 * 1024, processes: 8, cpus: null });
  cleanUp.defer(() => cgroup.remove());
  const launch = { program: "/bin/sleep", args: ["60"], inheritedFds: [], files: [], maxFileBytes: 4096 };
  const vmm = await spawnVmm(launch, { cellDir, netnsPath: null, cgroup });
  const measured = { measurement: `sha256:${"0".repeat(64)}`, spawnedAtMs: Date.now(), spawnMs: 0, bootTimeoutMs: 10_000 };
  const parts = { cellId, cellDir, channelPath: guest.socketPath, ...measured, vmm, cgroup, log: pino({ level: "silent" }) };
  const booted = Promise.withResolvers<void>();
  const cell = new Cell(parts, { booted: booted.resolve }, 0);
  await booted.promise;
  return { cell, guest: Object.assign(guest, { heard }) };
}
