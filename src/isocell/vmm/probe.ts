import { constants } from "node:fs";
import { access, mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { CgroupTree } from "../../base/cgroup.ts";
import { makeDirectory, readIfExists, writeDurable } from "../../base/durable.ts";
import { toForgeError } from "../../base/errors.ts";
import { GuestChannel } from "../channel.ts";
import { type GuestFiles, loadGuest } from "../guest/build.ts";
import { spawnVmm } from "./process.ts";
import { type Accelerator, qemuDriver, qemuVersion } from "./qemu.ts";
import type { CellBoot, Vmm } from "./vmm.ts";

export interface VmmChoice {
  readonly accelerator: Accelerator;
  /** One sentence: what was seen. */
  readonly reason: string;
}

export interface ChooseOptions {
  /** Keeps the verdict; private to root. */
  readonly stateDir: string;
  readonly buildDir: string;
}

/** Enough for a kernel on real hardware virtualisation many times over; an emulated one may need it. */
const bootDeadlineMs = { kvm: 10_000, tcg: 60_000 } as const;

const verdictSchema = z.object({ key: z.string(), accelerator: z.enum(["kvm", "tcg"]), reason: z.string() });

/**
 * The monitor for this machine. A device file proves nothing (nested and shared hosts have one that hangs the guest), so
 * hardware virtualisation is used only after a guest has booted on it. That is tried once per boot of the host, guest
 * kernel and QEMU version; the verdict is kept on disk.
 */
export async function chooseVmm(options: ChooseOptions): Promise<{ vmm: Vmm; choice: VmmChoice }> {
  const [version, guest, bootId] = await Promise.all([
    qemuVersion(),
    loadGuest(options.buildDir),
    readFile("/proc/sys/kernel/random/boot_id", "utf8"),
  ]);
  await makeDirectory(options.stateDir);
  const choice = await verdict(options.stateDir, [bootId.trim(), version, guest.kernelDigest, guest.initramfsDigest].join(" "), guest);
  return { vmm: qemuDriver(choice.accelerator, version), choice };
}

async function verdict(stateDir: string, key: string, guest: GuestFiles): Promise<VmmChoice> {
  const exclusion = await excludeKvm("/dev/kvm", "/proc/cpuinfo");
  if (exclusion !== undefined) return { accelerator: "tcg", reason: `emulating: ${exclusion}` };
  const path = join(stateDir, "vmm.json");
  const kept = await readVerdict(path);
  if (kept?.key === key) return { accelerator: kept.accelerator, reason: kept.reason };
  const failure = await tryBoot("kvm", stateDir, guest);
  const choice: VmmChoice =
    failure === undefined
      ? { accelerator: "kvm", reason: "hardware virtualisation: a guest booted on it" }
      : { accelerator: "tcg", reason: `emulating: ${failure}` };
  await writeDurable(path, JSON.stringify({ key, ...choice }));
  return choice;
}

/** Why hardware virtualisation cannot be here, where that is plain without trying. */
export async function excludeKvm(devicePath: string, cpuInfoPath: string): Promise<string | undefined> {
  try {
    await access(devicePath, constants.R_OK | constants.W_OK);
  } catch {
    return `${devicePath} cannot be opened`;
  }
  const cpuInfo = await readFile(cpuInfoPath, "utf8");
  if (!/^flags\s*:.*\b(?:vmx|svm)\b/m.test(cpuInfo)) return `${devicePath} is there but the processor offers neither VMX nor SVM`;
  return undefined;
}

/** Boots the guest without an image; undefined when its init answered, otherwise what went wrong. Leaves nothing. */
export async function tryBoot(accelerator: Accelerator, stateDir: string, guest: GuestFiles): Promise<string | undefined> {
  const cellDir = await mkdtemp(join(stateDir, "probe-"));
  const cgroup = new CgroupTree().create(`probe-${process.pid}`, { memoryBytes: 512 * 1024 * 1024, processes: 64, cpus: null });
  try {
    const boot = probeBoot(cellDir, guest);
    await Promise.all([
      mkdir(join(cellDir, "jail")),
      writeFile(boot.rootfsPath, Buffer.alloc(4096)),
      writeFile(boot.configDrivePath, Buffer.alloc(4096)),
    ]);
    const vmm = await spawnVmm(qemuDriver(accelerator, "").buildLaunch(boot), { cellDir, netnsPath: null, cgroup });
    const died = new AbortController();
    void vmm.exited?.then(() => died.abort());
    const channel = await GuestChannel.connect(boot.channelPath, {
      lastLogSequence: 0,
      timeoutMs: bootDeadlineMs[accelerator],
      signal: died.signal,
    });
    await channel.close();
    return undefined;
  } catch (error) {
    return toForgeError(error).message;
  } finally {
    await cgroup.remove();
    await rm(cellDir, { recursive: true, force: true });
  }
}

function probeBoot(cellDir: string, guest: GuestFiles): CellBoot {
  return {
    cellId: "probe",
    cellDir,
    kernelPath: guest.kernelPath,
    initramfsPath: guest.initramfsPath,
    commandLine: "console=ttyS0 quiet panic=-1 reboot=t rdinit=/init",
    rootfsPath: join(cellDir, "root"),
    configDrivePath: join(cellDir, "config"),
    vcpus: 1,
    memoryMib: 256,
    cpus: null,
    netnsPath: null,
    tapFd: null,
    guestMac: "02:f0:00:00:00:02",
    channelPath: join(cellDir, "channel"),
    consolePath: join(cellDir, "console"),
    uid: 65_534,
    gid: 65_534,
  };
}

async function readVerdict(path: string): Promise<z.infer<typeof verdictSchema> | undefined> {
  const text = await readIfExists(path);
  if (text === undefined) return undefined;
  try {
    return verdictSchema.parse(JSON.parse(text.toString("utf8")));
  } catch {
    return undefined; // an older version's: tried again
  }
}
