import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { errnoOf, ForgeError } from "./errors.ts";

/**
 * Control groups of both versions, and of the two side by side (v1 controllers with an empty v2 hierarchy). Each group
 * is `forge/<name>` in every hierarchy that has a controller we set, and in the v2 one, which can kill a group at once.
 * Calls are synchronous: kernfs never waits for a disk, and each takes microseconds.
 * Sources: kernel documentation, admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/.
 */

export interface CgroupLimits {
  /** Beyond it the kernel reclaims, then kills inside the group. Swap is never used: memory holds secrets. */
  readonly memoryBytes: number;
  readonly processes: number;
  /** CPUs the group is pinned to; null leaves it to the scheduler. */
  readonly cpus: readonly number[] | null;
}

type Controller = "cpuset" | "memory" | "pids";

interface Hierarchy {
  readonly version: 1 | 2;
  readonly mountPoint: string;
  readonly controllers: readonly Controller[];
}

const controllers: readonly Controller[] = ["cpuset", "memory", "pids"];
const parentName = "forge";

export class CgroupTree {
  readonly #hierarchies: readonly Hierarchy[];

  constructor(mountInfo: string = readFileSync("/proc/self/mountinfo", "utf8")) {
    this.#hierarchies = findHierarchies(mountInfo);
  }

  /** Controllers this machine does not offer; a limit that needs one is UNSUPPORTED. */
  get missing(): readonly Controller[] {
    return controllers.filter((controller) => !this.#hierarchies.some((hierarchy) => hierarchy.controllers.includes(controller)));
  }

  /** Makes the group with its limits, or takes over one of that name. Nothing is left of it when it throws. */
  create(name: string, limits: CgroupLimits): Cgroup {
    const missing = this.missing.filter((controller) => controller !== "cpuset" || limits.cpus !== null);
    if (missing.length > 0) throw new ForgeError("UNSUPPORTED", `no control group controller here for: ${missing.join(", ")}`);
    const group = this.#group(name);
    try {
      for (const hierarchy of this.#hierarchies) {
        prepareParent(hierarchy);
        mkdirSync(join(hierarchy.mountPoint, parentName, name), { recursive: true });
      }
      group.limit(limits);
      return group;
    } catch (error) {
      group.removeEmpty();
      if (error instanceof ForgeError) throw error;
      throw new ForgeError("UNSUPPORTED", `control groups cannot be set up here: ${String(error)}`, { cause: error });
    }
  }

  find(name: string): Cgroup | undefined {
    const group = this.#group(name);
    return group.exists() ? group : undefined;
  }

  /** Names of the groups that exist in any hierarchy. */
  list(): string[] {
    const names = this.#hierarchies.flatMap((hierarchy) => listFolders(join(hierarchy.mountPoint, parentName)));
    return [...new Set(names)].sort();
  }

  #group(name: string): Cgroup {
    if (!/^[A-Za-z0-9][A-Za-z0-9_.-]{0,80}$/.test(name)) throw new ForgeError("INVALID_INPUT", `"${name}" cannot name a control group`);
    return new Cgroup(this.#hierarchies.map((hierarchy) => ({ ...hierarchy, folder: join(hierarchy.mountPoint, parentName, name) })));
  }
}

interface GroupFolder extends Hierarchy {
  readonly folder: string;
}

export class Cgroup {
  readonly #folders: readonly GroupFolder[];

  constructor(folders: readonly GroupFolder[]) {
    this.#folders = folders;
  }

  /** A process joins by writing its id to each of these. */
  get procsFiles(): readonly string[] {
    return this.#folders.map(({ folder }) => join(folder, "cgroup.procs"));
  }

  exists(): boolean {
    return this.#folders.some(({ folder }) => existsSync(folder));
  }

  limit(limits: CgroupLimits): void {
    const memory = this.#with("memory");
    writeFileSync(join(memory.folder, memory.version === 2 ? "memory.max" : "memory.limit_in_bytes"), `${limits.memoryBytes}`);
    if (memory.version === 2) writeIfPresent(join(memory.folder, "memory.swap.max"), "0");
    else writeIfPresent(join(memory.folder, "memory.swappiness"), "0");
    writeFileSync(join(this.#with("pids").folder, "pids.max"), `${limits.processes}`);
    this.#pin(limits.cpus);
  }

  /** CPUs the group really runs on. */
  effectiveCpus(): number[] {
    const cpuset = this.#with("cpuset");
    const file = cpuset.version === 2 ? "cpuset.cpus.effective" : "cpuset.effective_cpus";
    return parseCpuList(readFileSync(join(cpuset.folder, file), "utf8"));
  }

  /** Processes in the group, in whichever hierarchy they are. */
  processIds(): number[] {
    const lines = this.procsFiles.flatMap((file) => readIfPresent(file).split("\n"));
    return [...new Set(lines.filter((line) => line !== "").map(Number))];
  }

  /** How many of its processes the kernel killed because the group was at its memory limit. */
  memoryKills(): number {
    const memory = this.#with("memory");
    const text = readIfPresent(join(memory.folder, memory.version === 2 ? "memory.events" : "memory.oom_control"));
    return Number(/^oom_kill (\d+)$/m.exec(text)?.[1] ?? 0);
  }

  /** Kills every process of the group and returns when all are gone. Nothing in it can fork its way out. */
  async killAll(timeoutMs = 10_000): Promise<void> {
    const pids = this.#folders.find((folder) => folder.controllers.includes("pids"));
    if (pids !== undefined) writeIfPresent(join(pids.folder, "pids.max"), "0");
    const deadline = performance.now() + timeoutMs;
    for (let pauseMs = 1; ; pauseMs = Math.min(pauseMs * 2, 50)) {
      for (const { folder } of this.#folders) writeIfPresent(join(folder, "cgroup.kill"), "1");
      const left = this.processIds();
      if (left.length === 0) return;
      for (const pid of left) killIgnoringGone(pid);
      if (performance.now() > deadline) throw new ForgeError("TIMEOUT", `processes ${left.join(", ")} did not die within ${timeoutMs} ms`);
      await delay(pauseMs); // the kernel tells nobody when a v1 group has become empty
    }
  }

  /** Kills what is in the group and removes it; absent is fine. */
  async remove(): Promise<void> {
    await this.killAll();
    for (let attempt = 0; attempt < 100; attempt++) {
      if (this.removeEmpty()) return;
      await delay(5); // a process that was reaped a moment ago still counts
    }
    throw new ForgeError("TIMEOUT", `control group ${this.#folders[0]?.folder} stays busy`);
  }

  /** False while something is still in it. */
  removeEmpty(): boolean {
    let gone = true;
    for (const { folder } of this.#folders) {
      try {
        rmdirSync(folder);
      } catch (error) {
        if (errnoOf(error) !== "ENOENT") gone = false;
      }
    }
    return gone;
  }

  #pin(cpus: readonly number[] | null): void {
    if (cpus === null) {
      const cpuset = this.#folders.find((folder) => folder.controllers.includes("cpuset"));
      if (cpuset?.version === 1) inheritCpuset(join(cpuset.folder, ".."), cpuset.folder); // v1: no process may enter before
      return;
    }
    const cpuset = this.#with("cpuset");
    if (cpuset.version === 1) inheritCpuset(join(cpuset.folder, ".."), cpuset.folder);
    writeFileSync(join(cpuset.folder, "cpuset.cpus"), cpus.join(","));
    const effective = this.effectiveCpus();
    if (effective.length !== cpus.length || cpus.some((cpu) => !effective.includes(cpu))) {
      throw new ForgeError("NO_ROOM", `CPUs ${cpus.join(",")} were allocated but the kernel grants ${effective.join(",") || "none"}`);
    }
  }

  #with(controller: Controller): GroupFolder {
    const found = this.#folders.find((folder) => folder.controllers.includes(controller));
    if (found === undefined) throw new ForgeError("UNSUPPORTED", `no ${controller} controller here`);
    return found;
  }
}

/** `0-2,5` → [0, 1, 2, 5] (cpuset(7), "List format"). */
export function parseCpuList(text: string): number[] {
  const parts = text
    .trim()
    .split(",")
    .filter((part) => part !== "");
  return parts.flatMap((part) => {
    const match = /^(\d{1,5})(?:-(\d{1,5}))?$/.exec(part);
    if (match === null) throw new ForgeError("INVALID_INPUT", `"${text.trim()}" is not a list of CPUs`);
    const first = Number(match[1]);
    const last = Number(match[2] ?? match[1]);
    return Array.from({ length: Math.max(0, last - first + 1) }, (_, index) => first + index);
  });
}

/** From mountinfo (proc_pid_mountinfo(5)): the first mount of each hierarchy, when it carries something we use. */
export function findHierarchies(mountInfo: string): Hierarchy[] {
  const found: Hierarchy[] = [];
  for (const line of mountInfo.split("\n")) {
    const [before = "", after = ""] = line.split(" - ");
    const [type, , superOptions = ""] = after.split(" ");
    const mountPoint = before.split(" ")[4]?.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));
    if (mountPoint === undefined) continue;
    if (type === "cgroup2") {
      const offered = readIfPresent(join(mountPoint, "cgroup.controllers")).trim().split(" ");
      add(found, { version: 2, mountPoint, controllers: controllers.filter((controller) => offered.includes(controller)) });
    } else if (type === "cgroup") {
      const options = superOptions.split(",");
      const mine = controllers.filter((controller) => options.includes(controller));
      if (mine.length > 0) add(found, { version: 1, mountPoint, controllers: mine });
    }
  }
  return found;
}

/** One hierarchy may be mounted more than once. */
function add(found: Hierarchy[], hierarchy: Hierarchy): void {
  const same = (other: Hierarchy): boolean =>
    other.version === hierarchy.version && other.controllers.join() === hierarchy.controllers.join();
  if (!found.some(same)) found.push(hierarchy);
}

/** `forge` itself: passes its controllers on to the groups inside. Each step is looked at again: an earlier run may have died between them. */
function prepareParent(hierarchy: Hierarchy): void {
  const parent = join(hierarchy.mountPoint, parentName);
  mkdirSync(parent, { recursive: true });
  if (hierarchy.version === 2) {
    delegate(hierarchy.mountPoint, hierarchy.controllers);
    delegate(parent, hierarchy.controllers);
  } else if (hierarchy.controllers.includes("cpuset") && readFileSync(join(parent, "cpuset.cpus"), "utf8").trim() === "") {
    inheritCpuset(hierarchy.mountPoint, parent);
  }
}

function delegate(folder: string, names: readonly Controller[]): void {
  const file = join(folder, "cgroup.subtree_control");
  const enabled = readFileSync(file, "utf8").trim().split(" ");
  const wanted = names.filter((name) => !enabled.includes(name));
  if (wanted.length > 0) writeFileSync(file, wanted.map((name) => `+${name}`).join(" "));
}

/** A new v1 cpuset is empty and accepts no process until both lists are set (cgroup-v1/cpusets.rst). */
function inheritCpuset(from: string, to: string): void {
  for (const file of ["cpuset.mems", "cpuset.cpus"]) writeFileSync(join(to, file), readFileSync(join(from, file), "utf8").trim());
}

function listFolders(path: string): string[] {
  try {
    return readdirSync(path, { withFileTypes: true })
      .filter((entry) => entry.isDirectory())
      .map((entry) => entry.name);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return [];
    throw error;
  }
}

/** Empty where the file is not, or no longer: a group may vanish under us. */
function readIfPresent(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    if (isGone(error)) return "";
    throw error;
  }
}

function writeIfPresent(path: string, text: string): void {
  if (!existsSync(path)) return; // writing would try to create it
  try {
    writeFileSync(path, text);
  } catch (error) {
    if (!isGone(error)) throw error;
  }
}

function isGone(error: unknown): boolean {
  return ["ENOENT", "ENODEV"].includes(errnoOf(error) ?? "");
}

function killIgnoringGone(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch (error) {
    if (errnoOf(error) !== "ESRCH") throw error;
  }
}
