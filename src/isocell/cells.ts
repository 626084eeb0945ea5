import { mkdir, readdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { type Cgroup, CgroupTree } from "../base/cgroup.ts";
import { makeDirectory, readIfExists } from "../base/durable.ts";
import { errnoOf, ForgeError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { Cell, type CellHandlers } from "./cell.ts";
import { encodeConfigDrive, type GuestConfig, guestCommandLine } from "./config-drive.ts";
import { type GuestFiles, loadGuest } from "./guest/build.ts";
import type { RootfsArtifact, RootfsCache } from "./image/rootfs.ts";
import { measureBoot } from "./measure.ts";
import { findVmm, spawnVmm, type VmmProcess } from "./vmm/process.ts";
import type { CellBoot, Vmm } from "./vmm/vmm.ts";

/** What a cell is to be: complete, so that starting it needs nothing else. */
export interface CellSpec {
  /** `cell_…`: names its folder and its control group. */
  readonly cellId: string;
  readonly artifact: RootfsArtifact;
  /** What runs inside, merged from image and manifest. */
  readonly guest: Omit<GuestConfig, "cellId">;
  readonly vcpus: number;
  readonly memoryMib: number;
  /** Host CPUs this cell has for itself, allocated by the caller; null: shared. */
  readonly cpus: readonly number[] | null;
  readonly network: CellNetwork;
}

/** The cell's side of the mesh, made before the VMM exists. */
export interface CellNetwork {
  readonly netnsPath: string;
  /** An open TAP device; the caller closes its own copy once `start` settled. */
  readonly tapFd: number;
  readonly guestMac: string;
}

export interface IsoCellsOptions {
  /** Everything of every cell on disk is below it; private to root. */
  readonly dir: string;
  /** Guest kernel and initramfs, as tools/setup made them. */
  readonly buildDir: string;
  readonly vmm: Vmm;
  /** Says whether an artifact is still what was sealed: asked before every boot. */
  readonly rootfs: Pick<RootfsCache, "verifySealed">;
  readonly log: Logger;
  /** From the start to the guest's first word; default 60 s. */
  readonly bootTimeoutMs?: number;
}

/** unix(7): sun_path holds 108 bytes with its terminator. */
const maxSocketPathBytes = 107;
const cellIdPattern = /^cell_[0-9a-z]{1,40}$/;
/** Processes and threads of one VMM and of the cell's port proxies: vCPUs, I/O workers, margin. */
const processesBeyondVcpus = 256;
/** One unprivileged user per cell, from a range that nothing else uses (systemd, UIDS-GIDS.md: 0x70000000 and up). */
const firstUid = 0x70000000;
const uidCount = 65_536;

const recordSchema = z.object({
  uid: z.int(),
  measurement: z.string(),
  spawnedAtMs: z.number(),
});
type CellRecord = z.infer<typeof recordSchema>;

/**
 * All microVMs of one node. A cell is one folder `<dir>/<cellId>` and one control group; `remove` of both leaves nothing.
 * Cells outlive this process: `reattach` finds them again.
 */
export class IsoCells {
  readonly vmm: Vmm;
  /** `uname -r` inside every cell. */
  readonly kernelRelease: string;
  readonly #options: IsoCellsOptions;
  readonly #guest: GuestFiles;
  readonly #cgroups = new CgroupTree();
  readonly #cells = new Map<string, Cell>();
  readonly #uids = new Map<string, number>();
  #isClosed = false;

  static async open(options: IsoCellsOptions): Promise<IsoCells> {
    const longest = join(options.dir, `cell_${"0".repeat(24)}`, files.channel);
    if (Buffer.byteLength(longest) > maxSocketPathBytes) {
      throw new ForgeError(
        "INVALID_INPUT",
        `${options.dir} is too long a path: a socket below it would exceed ${maxSocketPathBytes} bytes`,
      );
    }
    await makeDirectory(options.dir);
    const cells = new IsoCells(options, await loadGuest(options.buildDir));
    for (const cellId of await cells.list()) {
      const record = await cells.#readRecord(cellId);
      if (record !== undefined) cells.#uids.set(cellId, record.uid);
    }
    return cells;
  }

  private constructor(options: IsoCellsOptions, guest: GuestFiles) {
    this.#options = options;
    this.#guest = guest;
    this.vmm = options.vmm;
    this.kernelRelease = guest.kernelRelease;
  }

  /** Host memory a cell of this size may use, all in all: what a scheduler must count. */
  memoryMibOf(size: { readonly vcpus: number; readonly memoryMib: number }): number {
    return size.memoryMib + this.vmm.overheadMib(size);
  }

  /**
   * Boots a cell and returns as soon as its VMM runs; the handlers and `ended` tell the rest.
   * When it throws nothing of the cell is left.
   */
  async start(spec: CellSpec, handlers: CellHandlers = {}): Promise<Cell> {
    const beganMs = performance.now();
    this.#checkOpen();
    const cellDir = await this.#claim(spec.cellId);
    try {
      await this.#options.rootfs.verifySealed(spec.artifact);
      const boot = this.#describeBoot(spec, cellDir);
      const configDrive = encodeConfigDrive({ ...spec.guest, cellId: spec.cellId });
      const measurement = measureBoot({ ...this.#guest, rootHash: spec.artifact.rootHash, commandLine: boot.commandLine, configDrive });
      const launch = this.vmm.buildLaunch(boot);
      const cgroup = this.#createCgroup(spec);
      const record: CellRecord = { uid: boot.uid, measurement, spawnedAtMs: Date.now() };
      await Promise.all([
        mkdir(join(cellDir, files.jail), { mode: 0o755 }),
        writeFile(boot.configDrivePath, configDrive, { mode: 0o400 }),
        writeFile(join(cellDir, files.record), JSON.stringify(record), { mode: 0o600 }),
        handlers.measured?.(measurement),
      ]);
      const vmm = await spawnVmm(launch, { cellDir, netnsPath: boot.netnsPath, cgroup });
      const spawnMs = performance.now() - beganMs;
      return await this.#follow({ cellId: spec.cellId, cellDir, record, spawnMs, vmm, cgroup }, handlers, 0);
    } catch (error) {
      await this.remove(spec.cellId);
      throw error;
    }
  }

  /**
   * The cell as an earlier process left it, with its channel connected again; undefined when its VMM no longer runs (or
   * never did): then `remove` it. `lastLogSequence` is the last log held durably.
   */
  async reattach(cellId: string, handlers: CellHandlers = {}, lastLogSequence = 0): Promise<Cell | undefined> {
    this.#checkOpen();
    const known = this.#cells.get(checkedId(cellId));
    if (known !== undefined && known.state !== "ended") throw new ForgeError("CONFLICT", `${cellId} is already attached`);
    const cellDir = join(this.#options.dir, cellId);
    const [record, vmm] = await Promise.all([this.#readRecord(cellId), findVmm(cellDir)]);
    const cgroup = this.#cgroups.find(cellId);
    if (record === undefined || vmm === undefined || cgroup === undefined) return undefined;
    return await this.#follow({ cellId, cellDir, record, spawnMs: undefined, vmm, cgroup }, handlers, lastLogSequence);
  }

  get(cellId: string): Cell | undefined {
    return this.#cells.get(cellId);
  }

  /** Every cell of which something is left on disk, running or not. */
  async list(): Promise<string[]> {
    const entries = await readdir(this.#options.dir, { withFileTypes: true });
    return entries
      .filter((entry) => entry.isDirectory() && cellIdPattern.test(entry.name))
      .map((entry) => entry.name)
      .sort();
  }

  /** Ends the cell however it is, and removes every trace: processes, control group, files. Absent is fine. */
  async remove(cellId: string): Promise<void> {
    const cellDir = join(this.#options.dir, checkedId(cellId));
    await this.#cells.get(cellId)?.kill();
    await this.#cgroups.find(cellId)?.remove();
    await rm(cellDir, { recursive: true, force: true });
    this.#cells.delete(cellId);
    this.#uids.delete(cellId);
  }

  /** What the guest's kernel wrote to its console, for a person: at most the bound of the file. Not trusted text. */
  async readConsole(cellId: string): Promise<Buffer> {
    return (await readIfExists(join(this.#options.dir, checkedId(cellId), files.console))) ?? Buffer.alloc(0);
  }

  /** Lets go of every cell, also of one whose start is under way: all run on. Nothing is started or attached after it. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await Promise.all([...this.#cells.values()].map((cell) => cell.detach()));
    this.#cells.clear();
  }

  #checkOpen(): void {
    if (this.#isClosed) throw new ForgeError("UNAVAILABLE", "this node's cells were let go");
  }

  /** One start per cell: the folder is the lock. */
  async #claim(cellId: string): Promise<string> {
    const cellDir = join(this.#options.dir, checkedId(cellId));
    try {
      await mkdir(cellDir, { mode: 0o700 });
      return cellDir;
    } catch (error) {
      if (errnoOf(error) === "EEXIST") throw new ForgeError("CONFLICT", `${cellId} exists on this node: reattach or remove it first`);
      throw error;
    }
  }

  #describeBoot(spec: CellSpec, cellDir: string): CellBoot {
    const uid = this.#takeUid(spec.cellId);
    return {
      cellId: spec.cellId,
      cellDir,
      kernelPath: this.#guest.kernelPath,
      initramfsPath: this.#guest.initramfsPath,
      commandLine: guestCommandLine(spec.artifact),
      rootfsPath: spec.artifact.path,
      configDrivePath: join(cellDir, files.config),
      vcpus: spec.vcpus,
      memoryMib: spec.memoryMib,
      cpus: spec.cpus,
      netnsPath: spec.network.netnsPath,
      tapFd: spec.network.tapFd,
      guestMac: spec.network.guestMac,
      channelPath: join(cellDir, files.channel),
      consolePath: join(cellDir, files.console),
      uid,
      gid: uid,
    };
  }

  #takeUid(cellId: string): number {
    const taken = new Set(this.#uids.values());
    for (let uid = firstUid; uid < firstUid + uidCount; uid++) {
      if (taken.has(uid)) continue;
      this.#uids.set(cellId, uid);
      return uid;
    }
    throw new ForgeError("NO_ROOM", `this node already holds ${uidCount} cells`);
  }

  #createCgroup(spec: CellSpec): Cgroup {
    const memoryBytes = this.memoryMibOf(spec) * 1024 * 1024;
    return this.#cgroups.create(spec.cellId, { memoryBytes, processes: spec.vcpus + processesBeyondVcpus, cpus: spec.cpus });
  }

  async #follow(
    found: { cellId: string; cellDir: string; record: CellRecord; spawnMs: number | undefined; vmm: VmmProcess; cgroup: Cgroup },
    handlers: CellHandlers,
    lastLogSequence: number,
  ): Promise<Cell> {
    const { record, ...parts } = found;
    const channelPath = join(parts.cellDir, files.channel);
    const bootTimeoutMs = this.#options.bootTimeoutMs ?? 60_000;
    const cell = new Cell(
      { ...parts, channelPath, bootTimeoutMs, measurement: record.measurement, spawnedAtMs: record.spawnedAtMs, log: this.#options.log },
      handlers,
      lastLogSequence,
    );
    if (this.#isClosed) await cell.detach();
    else this.#cells.set(parts.cellId, cell);
    return cell;
  }

  async #readRecord(cellId: string): Promise<CellRecord | undefined> {
    const text = await readIfExists(join(this.#options.dir, cellId, files.record));
    if (text === undefined) return undefined;
    try {
      return recordSchema.parse(JSON.parse(text.toString("utf8")));
    } catch {
      return undefined; // cut off by a crash before the spawn: the cell never ran
    }
  }
}

/** Names inside a cell's folder; process.ts adds its own. */
const files = { record: "cell.json", config: "config", channel: "channel", console: "console", jail: "jail" } as const;

function checkedId(cellId: string): string {
  if (!cellIdPattern.test(cellId)) throw new ForgeError("INVALID_INPUT", `"${cellId}" is no cell`);
  return cellId;
}
