import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { writeFileSync } from "node:fs";
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterEach, describe, expect, test } from "vitest";
import { type Cgroup, CgroupTree, findHierarchies, parseCpuList } from "./cgroup.ts";

const mebibyte = 1024 * 1024;
const limits = { memoryBytes: 64 * mebibyte, processes: 8, cpus: null };

describe("lists of CPUs", () => {
  test("ranges and single numbers", () => {
    expect(parseCpuList("0-2,5\n")).toEqual([0, 1, 2, 5]);
    expect(parseCpuList("\n")).toEqual([]);
  });

  test("anything else is refused, whatever it is", () => {
    fc.assert(
      fc.property(fc.string(), (text) => {
        try {
          expect(parseCpuList(text).every((cpu) => Number.isInteger(cpu))).toBe(true);
        } catch (error) {
          expect(error).toMatchObject({ code: "INVALID_INPUT" });
        }
      }),
    );
  });
});

test("hierarchies are read from mountinfo, each once", () => {
  const info = [
    "31 24 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw",
    "32 31 0:28 / /nowhere/memory rw,relatime shared:9 - cgroup cgroup rw,memory",
    "33 31 0:29 / /nowhere/cpu\\040set rw,relatime - cgroup cgroup rw,cpuset",
    "34 31 0:30 / /nowhere/net rw - cgroup cgroup rw,net_cls",
    "35 31 0:28 / /elsewhere/memory rw - cgroup cgroup rw,memory",
    "",
  ].join("\n");
  expect(findHierarchies(info)).toEqual([
    { version: 1, mountPoint: "/nowhere/memory", controllers: ["memory"] },
    { version: 1, mountPoint: "/nowhere/cpu set", controllers: ["cpuset"] },
  ]);
  expect(new CgroupTree(info).missing).toEqual(["pids"]);
  expect(() => new CgroupTree(info).create("x", limits)).toThrow("pids");
});

test("of version 2 alone: controllers are passed down, limits set, swap forbidden", async () => {
  const root = await mkdtemp(join(tmpdir(), "forge-cgroup-"));
  try {
    await writeFile(join(root, "cgroup.controllers"), "cpuset cpu memory pids\n");
    await writeFile(join(root, "cgroup.subtree_control"), "cpu memory\n");
    await mkdir(join(root, "forge/x"), { recursive: true });
    await writeFile(join(root, "forge/cgroup.subtree_control"), "");
    await writeFile(join(root, "forge/x/memory.swap.max"), "max\n");
    await writeFile(join(root, "forge/x/cpuset.cpus.effective"), "0-1\n");
    const unified = new CgroupTree(`32 31 0:28 / ${root} rw shared:9 - cgroup2 cgroup2 rw\n`);
    expect(unified.missing).toEqual([]);
    unified.create("x", { ...limits, cpus: [0, 1] });
    const read = async (file: string): Promise<string> => await readFile(join(root, file), "utf8");
    expect(await read("cgroup.subtree_control")).toBe("+cpuset +pids");
    expect(await read("forge/cgroup.subtree_control")).toBe("+cpuset +memory +pids");
    expect(await read("forge/x/memory.max")).toBe(`${64 * mebibyte}`);
    expect(await read("forge/x/memory.swap.max")).toBe("0");
    expect(await read("forge/x/pids.max")).toBe("8");
    expect(await read("forge/x/cpuset.cpus")).toBe("0,1");
    expect(() => unified.create("x", { ...limits, cpus: [1, 2] })).toThrow("the kernel grants 0,1");
  } finally {
    await rm(root, { recursive: true });
  }
});

const tree = new CgroupTree();
describe.skipIf(process.getuid?.() !== 0 || tree.missing.length > 0)("real groups", () => {
  const made: Cgroup[] = [];
  const name = (): string => `test-${randomBytes(6).toString("hex")}`;
  afterEach(async () => {
    for (const group of made.splice(0)) await group.remove();
  });

  test("made, found, listed, removed", async () => {
    const id = name();
    const group = tree.create(id, limits);
    made.push(group);
    expect(tree.list()).toContain(id);
    expect(tree.find(id)?.procsFiles).toEqual(group.procsFiles);
    expect(tree.create(id, limits).exists()).toBe(true);
    await group.remove();
    await group.remove();
    expect(group.exists()).toBe(false);
    expect(tree.find(id)).toBeUndefined();
    expect(tree.list()).not.toContain(id);
  });

  test("kills all that is inside, children too", async () => {
    const group = tree.create(name(), limits);
    made.push(group);
    const child = spawn("sh", ["-c", "read -r go; sleep 1000 & sleep 1000 & wait"], { stdio: ["pipe", "ignore", "ignore"] });
    const exited = once(child, "exit");
    for (const file of group.procsFiles) writeFileSync(file, `${child.pid}`);
    child.stdin.write("go\n");
    await expect.poll(() => group.processIds().length, { timeout: 5000 }).toBe(3);
    await group.killAll();
    expect(group.processIds()).toEqual([]);
    expect((await exited)[1]).toBe("SIGKILL");
  });

  test("the memory limit holds", async () => {
    const group = tree.create(name(), { ...limits, memoryBytes: 32 * mebibyte });
    made.push(group);
    const child = spawn("sh", ["-c", "read -r go; exec tail /dev/zero"], { stdio: ["pipe", "ignore", "ignore"] });
    const exited = once(child, "exit");
    for (const file of group.procsFiles) writeFileSync(file, `${child.pid}`);
    expect(group.memoryKills()).toBe(0);
    child.stdin.write("go\n");
    expect((await exited)[1]).toBe("SIGKILL");
    expect(group.memoryKills()).toBe(1);
  });

  test("CPUs are read back: what the kernel does not grant is an error and leaves nothing", () => {
    const id = name();
    const group = tree.create(id, { ...limits, cpus: [0] });
    made.push(group);
    expect(group.effectiveCpus()).toEqual([0]);
    const absent = name();
    expect(() => tree.create(absent, { ...limits, cpus: [4000] })).toThrow();
    expect(tree.find(absent)).toBeUndefined();
  });

  test("a name that is a path is refused", () => {
    for (const bad of ["", "../x", "a/b", ".", "-x"]) expect(() => tree.create(bad, limits)).toThrow("cannot name");
  });
});
