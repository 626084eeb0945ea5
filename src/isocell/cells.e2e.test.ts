import { spawn } from "node:child_process";
import { once } from "node:events";
import { open, readdir, readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { CgroupTree } from "../base/cgroup.ts";
import { newId } from "../base/ids.ts";
import type { CellHandlers } from "./cell.ts";
import { type Bench, buildDir, openBench } from "./cell.fixture.ts";
import type { IsoCells } from "./cells.ts";
import type { ExecSession } from "./channel.ts";
import { loadGuest } from "./guest/build.ts";
import { findVmm } from "./vmm/process.ts";
import { tryBoot } from "./vmm/probe.ts";
import { qemuDriver, qemuVersion } from "./vmm/qemu.ts";
import type { CellBoot, Vmm } from "./vmm/vmm.ts";

/** Every driver that works on this machine keeps the same contract. KVM joins where probe.ts finds it to work. */
const drivers: [string, Vmm][] = [["QEMU, emulating", qemuDriver("tcg", await qemuVersion())]];

let bench: Bench;
beforeAll(async () => {
  bench = await openBench();
});
afterAll(async () => {
  await bench[Symbol.asyncDispose]();
});
const started = new Set<string>();

describe.each(drivers)("a cell on %s", (_, vmm) => {
  let cells: IsoCells;
  beforeAll(async () => {
    cells = await bench.open({ vmm });
  });

  test("boots, tells, runs programs, stops when asked, and leaves nothing", async () => {
    const spec = bench.spec("trap 'echo asked to stop; exit 3' TERM; echo hello; while :; do sleep 1; done", { vcpus: 2, cpus: [0] });
    const seen = record();
    started.add(spec.cellId);
    const cell = await cells.start(spec, seen.handlers);
    await seen.started;
    expect(cell.state).toBe("running");
    expect(cell.phases).toEqual({ spawnMs: expect.any(Number), kernelMs: expect.any(Number), initMs: expect.any(Number) });
    expect(cell.measurement).toMatch(/^sha256:[0-9a-f]{64}$/);
    await expect(cells.start(spec)).rejects.toMatchObject({ code: "CONFLICT" });

    expect(await outputOf(await cell.exec({ argv: ["uname", "-r"], tty: false }))).toBe(`${cells.kernelRelease}\n`);
    expect(await outputOf(await cell.exec({ argv: ["nproc"], tty: false }))).toBe("2\n");

    const status = await readFile(`/proc/${cell.pid}/status`, "utf8");
    expect(fieldOf(status, "Uid")).toBe(Array(4).fill(0x70000000).join("\t"));
    expect(fieldOf(status, "CapEff")).toBe("0000000000000000");
    expect(fieldOf(status, "NoNewPrivs")).toBe("1");
    expect(fieldOf(status, "Seccomp")).toBe("2");
    expect(fieldOf(status, "Cpus_allowed_list")).toBe("0");
    expect(await readFile(`/proc/${cell.pid}/cmdline`, "utf8")).not.toContain("PATH=/bin");

    const end = await cell.stop(10_000);
    expect(end).toEqual({ status: { code: 3 }, failure: null, reason: "the entrypoint exited with status 3" });
    expect(seen.text()).toBe("hello\nasked to stop\n");
    expect(seen.kinds()).toEqual(["booted", "started", "log", "ended"]);
    await expect(cell.exec({ argv: ["uname"], tty: false })).rejects.toMatchObject({ code: "CELL_FAILED" });

    await cells.remove(spec.cellId);
    await cells.remove(spec.cellId);
    expect(await readdir(join(bench.folder, "cells"))).toEqual([]);
    expect(new CgroupTree().find(spec.cellId)).toBeUndefined();
    await expect(stat(`/proc/${cell.pid}`)).rejects.toMatchObject({ code: "ENOENT" });
  });

  test("the end of an entrypoint that is over at once arrives with all it said", async () => {
    const seen = record();
    const cell = await start(cells, "echo out; echo err >&2; exit 7", seen.handlers);
    expect(await cell.ended).toMatchObject({ status: { code: 7 }, failure: null });
    expect(seen.text()).toContain("out\n");
    expect(seen.text()).toContain("err\n");
    await cells.remove(cell.cellId);
  });

  test("a VMM that dies is noticed at once", async () => {
    const seen = record();
    const cell = await start(cells, "sleep 1000", seen.handlers);
    await seen.started;
    const exec = await cell.exec({ argv: ["sleep", "1000"], tty: false });
    const killedAt = performance.now();
    process.kill(cell.pid, "SIGKILL");
    expect(await cell.ended).toMatchObject({ status: null, failure: { code: "CELL_FAILED" } });
    expect(performance.now() - killedAt).toBeLessThan(2_000);
    await expect(exec.exited).rejects.toMatchObject({ code: "CELL_FAILED" });
    expect(await cells.reattach(cell.cellId)).toBeUndefined();
    await cells.remove(cell.cellId);
  });

  test("outlives the process that started it, and is found again by the next", async () => {
    const { cells: dir, spec } = { cells: join(bench.folder, "cells"), spec: bench.spec("echo one; sleep 1000") };
    bench.closeTap(spec);
    started.add(spec.cellId);
    const starter = spawn(process.execPath, ["src/isocell/start-cell.fixture.ts"], { stdio: ["pipe", "pipe", "inherit"] });
    starter.stdin.end(JSON.stringify({ dir, spec }));
    await once(starter.stdout, "data");
    starter.kill("SIGKILL");
    await once(starter, "exit");

    const next = await bench.open({ vmm });
    expect(await next.list()).toContain(spec.cellId);
    const seen = record();
    const cell = await next.reattach(spec.cellId, seen.handlers);
    expect(cell?.pid).toBe((await findVmm(join(dir, spec.cellId)))?.pid);
    await seen.started;
    await expect.poll(seen.text, { timeout: 20_000 }).toBe("one\n");

    await next.close();
    const again = await bench.open({ vmm });
    const late = record();
    const same = await again.reattach(spec.cellId, late.handlers, seen.lastSequence());
    await late.started;
    expect(await outputOf((await same?.exec({ argv: ["echo", "still", "here"], tty: false }))!)).toBe("still here\n");
    expect(late.text()).toBe(""); // nothing is told twice
    expect(same?.measurement).toBe(cell?.measurement);
    await again.remove(spec.cellId);
    expect(late.kinds().at(-1)).toBe("ended");
    expect(await again.list()).not.toContain(spec.cellId);
  });

  test("whose start is under way when all are let go runs on, and is the next one's alone", async () => {
    const first = await bench.open({ vmm });
    const reached = Promise.withResolvers<void>();
    const held = Promise.withResolvers<void>();
    const told: string[] = [];
    const starting = start(first, "sleep 1000", {
      measured: () => (reached.resolve(), held.promise),
      booted: () => void told.push("booted"),
      ended: () => void told.push("ended"),
    });
    await reached.promise;
    await first.close();
    held.resolve();
    const { cellId } = await starting;
    expect(first.get(cellId)).toBeUndefined();
    await expect(first.reattach(cellId)).rejects.toMatchObject({ code: "UNAVAILABLE" });
    await expect(first.start(bench.spec("true"))).rejects.toMatchObject({ code: "UNAVAILABLE" });

    // The VMM's process leaves its name a moment after `start` returned.
    await expect.poll(async () => await findVmm(join(bench.folder, "cells", cellId)), { timeout: 10_000 }).toBeDefined();
    const seen = record();
    const cell = await cells.reattach(cellId, seen.handlers);
    expect(cell).toBeDefined();
    await seen.started;
    expect(await outputOf((await cell?.exec({ argv: ["echo", "here"], tty: false }))!)).toBe("here\n");
    await cells.remove(cellId);
    expect(told).toEqual([]);
  });

  test("has its memory and not more, and a console of a bounded size; the VMM lives on when both are used up", async () => {
    const maxFileBytes = 4096;
    const loud = (boot: CellBoot): CellBoot => ({ ...boot, commandLine: boot.commandLine.replace("quiet", "loglevel=8") });
    const withConsole = await bench.open({ vmm: { ...vmm, buildLaunch: (boot) => ({ ...vmm.buildLaunch(loud(boot)), maxFileBytes }) } });
    const seen = record();
    const cell = await start(withConsole, "sleep 1000", seen.handlers);
    await seen.started;
    const eater = await cell.exec({ argv: ["sh", "-c", "tail /dev/zero"], tty: false });
    eater.stdin.end();
    expect(await eater.exited).not.toEqual({ code: 0 });
    expect(await outputOf(await cell.exec({ argv: ["echo", "alive"], tty: false }))).toBe("alive\n");
    const peakKib = Number.parseInt(fieldOf(await readFile(`/proc/${cell.pid}/status`, "utf8"), "VmHWM"), 10);
    expect(peakKib).toBeLessThan(cells.memoryMibOf({ vcpus: 1, memoryMib: 256 }) * 1024);
    const words = await withConsole.readConsole(cell.cellId);
    expect(words.length).toBe(maxFileBytes);
    expect(words.toString("latin1")).toContain("Linux version");
    await withConsole.remove(cell.cellId);
  });

  test("a root file system altered by one byte does not start", async () => {
    const file = await open(bench.artifact.path, "r+");
    const at = 4096 * Math.floor(bench.artifact.dataBlocks / 2);
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, at);
    await file.write(Buffer.from([(byte[0] ?? 0) ^ 1]), 0, 1, at);
    try {
      const seen = record();
      const cell = await start(cells, "cat /bin/busybox > /dev/null; echo read all of it; sleep 1000", seen.handlers);
      expect(await cell.ended).toMatchObject({ failure: { code: "CELL_FAILED" } });
      expect(seen.text()).not.toContain("read all of it");
      await cells.remove(cell.cellId);
    } finally {
      await file.write(byte, 0, 1, at);
      await file.close();
    }
  });

  test("an artifact that is not what was sealed is not booted, and nothing of the cell is left", async () => {
    const refusing = await bench.open({ vmm, rootfs: { verifySealed: () => Promise.reject(new Error("tampered")) } });
    const spec = bench.spec("true");
    await expect(refusing.start(spec)).rejects.toThrow("tampered");
    expect(await refusing.list()).not.toContain(spec.cellId);
    expect(await refusing.reattach(spec.cellId)).toBeUndefined();
  });
});

test("the boot probe proves what works, says what does not, and leaves nothing", async () => {
  const guest = await loadGuest(buildDir);
  expect(await tryBoot("tcg", bench.folder, guest)).toBeUndefined();
  expect(await tryBoot("tcg", bench.folder, { ...guest, kernelPath: "/nonexistent" })).toEqual(expect.any(String));
  expect((await readdir(bench.folder)).filter((name) => name.startsWith("probe-"))).toEqual([]);
});

test("a folder whose sockets would have too long a path is refused", async () => {
  await expect(bench.open({ dir: `/${newId("cell").repeat(4)}` })).rejects.toMatchObject({ code: "INVALID_INPUT" });
});

test("of all these cells nothing is left", async () => {
  await bench[Symbol.asyncDispose]();
  expect(new CgroupTree().list().filter((name) => started.has(name) || name.startsWith("probe-"))).toEqual([]);
  expect(await readFile("/proc/self/mountinfo", "utf8")).not.toContain(bench.folder);
  await expect(stat(bench.folder)).rejects.toMatchObject({ code: "ENOENT" });
});

async function start(cells: IsoCells, script: string, handlers: CellHandlers) {
  const spec = bench.spec(script);
  started.add(spec.cellId);
  return await cells.start(spec, handlers);
}

function record() {
  const told: string[] = [];
  const chunks: Buffer[] = [];
  let last = 0;
  const { promise, resolve } = Promise.withResolvers<void>();
  const handlers: CellHandlers = {
    booted: () => void told.push("booted"),
    started: () => {
      told.push("started");
      resolve();
    },
    log: (log) => {
      told.push("log");
      last = log.sequence;
      chunks.push(Buffer.from(log.bytes));
    },
    ended: () => void told.push("ended"),
  };
  const kinds = (): string[] => told.filter((kind, index) => kind !== told[index - 1]);
  return { handlers, started: promise, kinds, lastSequence: () => last, text: () => Buffer.concat(chunks).toString() };
}

async function outputOf(session: ExecSession): Promise<string> {
  session.stdin.end();
  const [output] = await Promise.all([text(session.stdout), text(session.stderr), session.exited]);
  return output;
}

function fieldOf(status: string, name: string): string {
  return new RegExp(`^${name}:\\s*(.*)$`, "m").exec(status)?.[1] ?? "";
}
