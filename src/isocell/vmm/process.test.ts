import { randomBytes } from "node:crypto";
import { mkdtemp, readFile, rm, stat, writeFile } from "node:fs/promises";
import { readlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { type Cgroup, CgroupTree } from "../../base/cgroup.ts";
import { createNetns, removeNetns } from "../../base/linux.ts";
import { findVmm, parseStat, readDiagnostics, spawnVmm } from "./process.ts";
import type { Launch } from "./vmm.ts";

const tree = new CgroupTree();
let cellDir: string;
let cgroup: Cgroup;

beforeEach(async () => {
  cellDir = await mkdtemp(join(tmpdir(), "forge-process-"));
  cgroup = tree.create(`test-${randomBytes(6).toString("hex")}`, { memoryBytes: 256 * 1024 * 1024, processes: 32, cpus: null });
});
afterEach(async () => {
  await cgroup.remove();
  await rm(cellDir, { recursive: true });
});

const launchOf = (script: string, ...args: string[]): Launch => ({
  program: "/bin/sh",
  args: ["-c", script, "sh", ...args],
  inheritedFds: [],
  files: [],
  maxFileBytes: 4096,
});
const spawnIt = (launch: Launch, netnsPath: string | null = null) => spawnVmm(launch, { cellDir, netnsPath, cgroup });

describe.skipIf(process.getuid?.() !== 0 || tree.missing.length > 0)("a process of a cell", () => {
  test("is in its own session and in every group, and can be found by another", async () => {
    const vmm = await spawnIt(launchOf("sleep 1000"));
    await expect.poll(() => findVmm(cellDir)).toMatchObject({ pid: vmm.pid });
    const fields = (await readFile(`/proc/${vmm.pid}/stat`, "latin1")).replace(/.*\) /s, "").split(" ");
    expect(fields[3]).toBe(`${vmm.pid}`); // session
    for (const file of cgroup.procsFiles) expect(await readFile(file, "utf8")).toContain(`${vmm.pid}\n`);
    expect(await vmm.isAlive()).toBe(true);
    await cgroup.killAll();
    await vmm.exited;
    expect(await vmm.isAlive()).toBe(false);
    expect(await findVmm(cellDir)).toBeUndefined();
  });

  test("runs in the namespace it is given, and we stay in ours", async () => {
    const netns = join(cellDir, "netns");
    const ours = readlinkSync("/proc/self/ns/net");
    createNetns(netns, () => undefined);
    try {
      const vmm = await spawnIt(launchOf("sleep 1000"), netns);
      expect(readlinkSync("/proc/self/ns/net")).toBe(ours);
      expect(readlinkSync(`/proc/${vmm.pid}/ns/net`)).not.toBe(ours);
      await cgroup.killAll();
    } finally {
      removeNetns(netns);
    }
  });

  test("inherits none of our environment", async () => {
    process.env["FORGE_TEST_SECRET"] = "hunter2";
    try {
      const vmm = await spawnIt(launchOf("env >&2"));
      await vmm.exited;
      expect(await readDiagnostics(cellDir)).not.toContain("hunter2");
    } finally {
      delete process.env["FORGE_TEST_SECRET"];
    }
  });

  test("cannot let a file grow beyond its bound, and lives on", async () => {
    const path = join(cellDir, "console");
    const vmm = await spawnIt(launchOf('head -c 1000000 /dev/zero > "$1" 2>/dev/null; echo survived >&2', path));
    await vmm.exited;
    expect((await stat(path)).size).toBe(4096);
    expect(await readDiagnostics(cellDir)).toBe("survived");
  });

  test("a number that another process has now is not taken for it", async () => {
    const vmm = await spawnIt(launchOf("sleep 1000"));
    await expect.poll(() => findVmm(cellDir)).toBeDefined();
    const name = await readFile(join(cellDir, "pid"), "latin1");
    const fields = name.trim().split(" ");
    fields[22] = `${Number(fields[22]) - 1}`; // the boot id, then stat's fields from 1
    await writeFile(join(cellDir, "pid"), fields.join(" "));
    expect(await findVmm(cellDir)).toBeUndefined();
    await writeFile(join(cellDir, "pid"), `another-boot ${name.slice(name.indexOf(" ") + 1)}`);
    expect(await findVmm(cellDir)).toBeUndefined();
    await writeFile(join(cellDir, "pid"), name);
    expect(await findVmm(cellDir)).toMatchObject({ pid: vmm.pid });
  });

  test("a program that is not there ends at once and says so", async () => {
    const vmm = await spawnIt({ ...launchOf(""), program: "/nonexistent/vmm" });
    await vmm.exited;
    expect(await readDiagnostics(cellDir)).toContain("/nonexistent/vmm");
  });

  test("arguments arrive as they are, whatever they hold", async () => {
    const hostile = '"; touch /tmp/forge-injected; $(id) `id` \n * \\';
    const vmm = await spawnIt(launchOf('printf %s "$1" >&2', hostile));
    await vmm.exited;
    expect(await readDiagnostics(cellDir)).toBe(hostile.trim());
  });
});

describe("a line of /proc/PID/stat", () => {
  const rest = Array.from({ length: 48 }, (_, index) => `${index + 4}`).join(" ");

  test("is read by position, whatever the process calls itself", () => {
    fc.assert(
      fc.property(fc.string({ maxLength: 15 }), (command) => {
        expect(parseStat(`42 (${command}) S ${rest}\n`)).toEqual({ pid: 42, state: "S", startTime: "22" });
      }),
    );
  });

  test("anything else is nothing", () => {
    for (const line of ["", "42", "42 (sh) S 1 2", "x (sh) S " + rest]) expect(parseStat(line)).toBeUndefined();
  });
});
