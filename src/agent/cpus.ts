import { readFile } from "node:fs/promises";
import { ForgeError } from "../base/errors.ts";

/** In development cells share CPUs; a node then offers this many vCPUs a CPU. */
const developmentShare = 16;

/** Which host CPU belongs to which cell. In production one vCPU is one CPU and no CPU is given twice. */
export class CpuPool {
  readonly #exclusive: boolean;
  readonly #online: readonly number[];
  readonly #held = new Map<string, readonly number[]>();

  /** `online`: the CPUs cells may have; production keeps the first one for the host where there are more than one. */
  constructor(profile: "development" | "production", online: readonly number[]) {
    this.#exclusive = profile === "production";
    this.#online = this.#exclusive && online.length > 1 ? online.slice(1) : online;
  }

  get vcpus(): number {
    return this.#exclusive ? this.#online.length : this.#online.length * developmentShare;
  }

  /** CPUs for a cell's sole use, or null where CPUs are shared. Asking again for the same cell gives the same. NO_ROOM. */
  allocate(cellId: string, vcpus: number): readonly number[] | null {
    if (!this.#exclusive) return null;
    const mine = this.#held.get(cellId);
    if (mine !== undefined) return mine;
    const taken = new Set([...this.#held.values()].flat());
    const free = this.#online.filter((cpu) => !taken.has(cpu));
    if (free.length < vcpus) throw new ForgeError("NO_ROOM", `${vcpus} CPUs were asked for, ${free.length} are free on this node`);
    const given = free.slice(0, vcpus);
    this.#held.set(cellId, given);
    return given;
  }

  /** What a cell that outlived the agent already has. */
  adopt(cellId: string, cpus: readonly number[] | null): void {
    if (cpus !== null) this.#held.set(cellId, cpus);
  }

  free(cellId: string): void {
    this.#held.delete(cellId);
  }
}

/** The host's online CPUs, from the kernel's list form (`0-3,8`). */
export async function onlineCpus(): Promise<number[]> {
  return parseCpuList(await readFile("/sys/devices/system/cpu/online", "utf8"));
}

export function parseCpuList(list: string): number[] {
  return list
    .trim()
    .split(",")
    .filter((part) => part !== "")
    .flatMap((part) => {
      const [first = 0, last = first] = part.split("-").map(Number);
      return Array.from({ length: last - first + 1 }, (_, index) => first + index);
    });
}

/** Memory cells may have in all, MiB: what the machine has, less a tenth (at least 1 GiB) for the host. */
export async function offeredMemoryMib(): Promise<number> {
  const found = /^MemTotal:\s+(\d+) kB$/m.exec(await readFile("/proc/meminfo", "utf8"));
  const totalMib = Math.floor(Number(found?.[1] ?? 0) / 1024);
  return Math.max(0, Math.floor(totalMib - Math.max(1024, totalMib / 10)));
}
