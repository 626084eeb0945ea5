import { ForgeError } from "../../base/errors.ts";
import type { CellBoot, Vmm } from "./vmm.ts";

/**
 * The Firecracker driver, as far as it can be written without hardware virtualisation: what a cell's boot is in
 * Firecracker's own terms. Field names are those of its API description, src/firecracker/swagger/firecracker.yaml, and of
 * docs/jailer.md, both at 1.17.0-dev (commit 81b38b9). Starting is refused: the guest speaks over virtio-serial only, not
 * yet over vsock, the TAP would have to belong to the cell's user, and none of it has booted anywhere.
 */
export const firecrackerDriver: Vmm = {
  name: "firecracker",
  description: "Firecracker",
  emulated: false,
  overheadMib: () => overheadMib,
  buildLaunch() {
    throw new ForgeError("UNSUPPORTED", "this version of Forge cannot start cells with Firecracker yet; it uses QEMU");
  },
};

/** Its documented ceiling is 5 MiB of its own for a guest of 128 MiB (SPECIFICATION.md); threads and page tables on top. */
const overheadMib = 32;
const execFile = "/usr/bin/firecracker";
const mostVcpus = 32;
const maxConsoleBytes = 256 * 1024;
/** Addresses 0 to 2 are reserved (vsock(7)); every guest has its own socket, so all may be the same. */
const guestCid = 3;

/** Names of what the jail holds; hard links or copies, for the jailed process sees nothing else. */
export const jailFiles = {
  kernel: "vmlinux",
  initramfs: "initramfs",
  root: "root",
  config: "config",
  channel: "channel",
  vm: "vm.json",
} as const;

/** What `firecracker --no-api --config-file` reads: FullVmConfiguration of its API description. Paths as the jail has them. */
export function buildFirecrackerConfig(boot: CellBoot): Record<string, unknown> {
  if (!Number.isInteger(boot.vcpus) || boot.vcpus < 1 || boot.vcpus > mostVcpus) {
    throw new ForgeError("UNSUPPORTED", `Firecracker runs 1 to ${mostVcpus} vCPUs, not ${boot.vcpus}`);
  }
  return {
    "machine-config": { vcpu_count: boot.vcpus, mem_size_mib: boot.memoryMib, smt: false, track_dirty_pages: false },
    "boot-source": { kernel_image_path: inJail(jailFiles.kernel), initrd_path: inJail(jailFiles.initramfs), boot_args: boot.commandLine },
    drives: [drive("root", jailFiles.root), drive("config", jailFiles.config)],
    "network-interfaces": boot.tapFd === null ? [] : [{ iface_id: "eth0", host_dev_name: "tap0", guest_mac: boot.guestMac }],
    vsock: { guest_cid: guestCid, uds_path: inJail(jailFiles.channel) },
    entropy: { rate_limiter: { bandwidth: { size: 1024, refill_time: 1000 } } },
  };
}

/**
 * The jailer's command line. The control groups are ours (base/cgroup.ts): without `--cgroup`, version 2 with an existing
 * parent moves the process there and makes none of its own.
 */
export function buildJailerArgs(boot: CellBoot): string[] {
  return [
    ["--id", boot.cellId.replaceAll("_", "-")], // letters, digits and hyphens only
    ["--exec-file", execFile],
    ["--uid", `${boot.uid}`],
    ["--gid", `${boot.gid}`],
    ["--cgroup-version", "2"],
    ["--parent-cgroup", `forge/${boot.cellId}`],
    ["--chroot-base-dir", boot.cellDir],
    boot.netnsPath === null ? [] : ["--netns", boot.netnsPath],
    ["--resource-limit", `fsize=${maxConsoleBytes}`],
    "--new-pid-ns",
    "--",
    "--no-api",
    ["--config-file", inJail(jailFiles.vm)],
  ].flat();
}

/** Neither drive is a root device to Firecracker: the initramfs mounts the root, so the kernel gets no `root=`. */
function drive(id: string, name: string): Record<string, unknown> {
  return { drive_id: id, path_on_host: inJail(name), is_root_device: false, is_read_only: true, cache_type: "Unsafe", io_engine: "Sync" };
}

function inJail(name: string): string {
  return `/${name}`;
}
