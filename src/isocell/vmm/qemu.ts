import { join } from "node:path";
import { ForgeError } from "../../base/errors.ts";
import { run } from "../../base/exec.ts";
import type { CellBoot, Launch, Vmm } from "./vmm.ts";

export type Accelerator = "kvm" | "tcg";

const program = "/usr/bin/qemu-system-x86_64";
/** The console keeps the first words of a boot; what comes beyond is dropped, not rotated: early lines explain a failure. */
const maxConsoleBytes = 256 * 1024;
/** Translated code, bounded: left alone, QEMU takes an eighth of the host's memory for it. */
const translationBufferMib = 64;
/** QEMU itself, its threads and device buffers; measured 45 MiB, and page tables of the guest's memory grow with it. */
const ownMib = 96;
const mostVcpus = 64;

/** The QEMU driver: with KVM where a boot proved that it works, otherwise emulating (development and CI). */
export async function openQemu(accelerator: Accelerator): Promise<Vmm> {
  return qemuDriver(accelerator, await qemuVersion());
}

export function qemuDriver(accelerator: Accelerator, version: string): Vmm {
  return {
    name: "qemu",
    description: `QEMU ${version} (${accelerator})`,
    emulated: accelerator === "tcg",
    overheadMib: ({ memoryMib }) => ownMib + (accelerator === "tcg" ? translationBufferMib : 0) + Math.ceil(memoryMib / 256),
    buildLaunch: (boot) => buildLaunch(boot, accelerator),
  };
}

/** `7.2.22`. UNSUPPORTED where QEMU is not installed. */
export async function qemuVersion(): Promise<string> {
  const words = await run(program, ["--version"], { timeoutMs: 10_000 });
  return /version (\d+\.\d+\.\d+)/.exec(words)?.[1] ?? "unknown";
}

function buildLaunch(boot: CellBoot, accelerator: Accelerator): Launch {
  return {
    program,
    args: buildQemuArgs(boot, accelerator),
    inheritedFds: boot.tapFd === null ? [] : [boot.tapFd],
    files: [],
    maxFileBytes: maxConsoleBytes,
  };
}

type Option = readonly [flag: string, value?: string];

/** The whole command line; the TAP, where there is one, is descriptor 3 of the process. No secret is ever in it. */
export function buildQemuArgs(boot: CellBoot, accelerator: Accelerator): string[] {
  if (!Number.isInteger(boot.vcpus) || boot.vcpus < 1 || boot.vcpus > mostVcpus) {
    throw new ForgeError("UNSUPPORTED", `a cell has 1 to ${mostVcpus} vCPUs, not ${boot.vcpus}`);
  }
  return [
    ...identity(boot),
    ...machine(boot, accelerator),
    ...kernel(boot),
    ...console(boot),
    ...disk("root", boot.rootfsPath),
    ...disk("config", boot.configDrivePath),
    ...channel(boot),
    ...entropy(),
    ...network(boot),
    ...confinement(boot),
  ].flatMap(([flag, value]) => (value === undefined ? [flag] : [flag, value]));
}

function identity(boot: CellBoot): Option[] {
  return [
    ["-name", `guest=forge-${escapeCommas(boot.cellId)}`],
    ["-nodefaults"],
    ["-no-user-config"],
    ["-display", "none"],
    ["-monitor", "none"],
    ["-no-reboot"],
  ];
}

/**
 * q35 without the devices a cell has no use for: the smallest PC that a distribution's kernel boots (its virtio drivers
 * want PCI, so `microvm` is for our own kernel). Guest memory is neither shared between guests nor dumped.
 */
function machine(boot: CellBoot, accelerator: Accelerator): Option[] {
  const without = ["usb", "vmport", "smm", "hpet", "sata", "smbus", "i8042", "dump-guest-core", "mem-merge"];
  const threads = boot.vcpus > 1 ? "multi" : "single";
  return [
    ["-machine", ["q35", ...without.map((option) => `${option}=off`)].join(",")],
    ["-accel", accelerator === "kvm" ? "kvm" : `tcg,thread=${threads},tb-size=${translationBufferMib}`],
    ["-cpu", accelerator === "kvm" ? "host" : "max"],
    ["-smp", `cpus=${boot.vcpus},sockets=1,cores=${boot.vcpus},threads=1`],
    ["-m", `size=${boot.memoryMib}M`],
    ["-overcommit", "mem-lock=off"],
    ["-rtc", "base=utc"],
  ];
}

function kernel(boot: CellBoot): Option[] {
  return [
    ["-kernel", boot.kernelPath],
    ["-initrd", boot.initramfsPath],
    ["-append", boot.commandLine],
  ];
}

/** Appended to by one writer and bounded by Launch.maxFileBytes: what does not fit is dropped and the guest runs on. */
function console(boot: CellBoot): Option[] {
  return [
    ["-chardev", `file,id=console,path=${escapeCommas(boot.consolePath)},append=on`],
    ["-serial", "chardev:console"],
  ];
}

/** Read-only twice: QEMU opens the file so, and the guest's device says so. Cells of one image share the page cache. */
function disk(id: string, path: string): Option[] {
  const file = `file.driver=file,file.filename=${escapeCommas(path)},file.aio=threads`;
  return [
    ["-blockdev", `driver=raw,node-name=${id},read-only=on,${file}`],
    ["-device", `virtio-blk-pci,drive=${id},serial=forge-${id},disable-legacy=on,romfile=`],
  ];
}

function channel(boot: CellBoot): Option[] {
  return [
    ["-chardev", `socket,id=channel,path=${escapeCommas(boot.channelPath)},server=on,wait=off`],
    ["-device", "virtio-serial-pci,max_ports=2,disable-legacy=on,romfile="],
    ["-device", "virtserialport,chardev=channel,name=forge.0,nr=1"],
  ];
}

/** The guest cannot drain the host's entropy: at most 1 KiB a second. */
function entropy(): Option[] {
  return [
    ["-object", "rng-builtin,id=entropy"],
    ["-device", "virtio-rng-pci,rng=entropy,max-bytes=1024,period=1000,disable-legacy=on,romfile="],
  ];
}

function network(boot: CellBoot): Option[] {
  if (boot.tapFd === null) return [["-nic", "none"]];
  return [
    ["-netdev", "tap,id=net,fd=3,vhost=off"],
    ["-device", `virtio-net-pci,netdev=net,mac=${boot.guestMac},disable-legacy=on,romfile=`],
  ];
}

/**
 * Before the guest's first instruction QEMU locks itself into an empty folder, becomes an unprivileged user of its own, and
 * gives up starting programs. `elevateprivileges` stays allowed because its filter is in force before that step and would
 * forbid the very setuid that drops root; no_new_privs, which the filter brings along, keeps root out of reach after it.
 */
function confinement(boot: CellBoot): Option[] {
  return [
    ["-chroot", join(boot.cellDir, "jail")],
    ["-runas", `${boot.uid}:${boot.gid}`],
    ["-sandbox", "on,obsolete=deny,elevateprivileges=allow,spawn=deny,resourcecontrol=deny"],
  ];
}

/** In QEMU's option syntax a comma ends a value; doubled it is a comma (qemu-options, "-drive"). */
function escapeCommas(value: string): string {
  return value.replaceAll(",", ",,");
}
