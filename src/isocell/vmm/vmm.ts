/**
 * What a virtual machine monitor is to the rest of Forge: a pure translation from "this guest" to "this process".
 * Starting, finding again and ending that process is the same for every driver (process.ts).
 */

/** Everything a driver needs to describe one guest. Paths are absolute; nothing here is secret. */
export interface CellBoot {
  readonly cellId: string;
  /** Private folder of the cell; the process is confined to `<cellDir>/jail`. */
  readonly cellDir: string;
  readonly kernelPath: string;
  readonly initramfsPath: string;
  readonly commandLine: string;
  /** First disk, read-only: the EROFS image with its verity tree appended. */
  readonly rootfsPath: string;
  /** Second disk, read-only: the configuration of this cell. */
  readonly configDrivePath: string;
  readonly vcpus: number;
  readonly memoryMib: number;
  /** Host CPUs the process is pinned to; null leaves it to the scheduler. */
  readonly cpus: readonly number[] | null;
  /** Network namespace the process runs in; null: the starter's own (tests without a network). */
  readonly netnsPath: string | null;
  /** An open TAP device of that namespace, handed to the process; null: the guest has no interface. */
  readonly tapFd: number | null;
  readonly guestMac: string;
  /** Unix socket the VMM listens on: the guest's channel. At most 107 bytes (sun_path, unix(7)). */
  readonly channelPath: string;
  /** Where the guest's serial console goes; bounded by `Launch.maxFileBytes`. */
  readonly consolePath: string;
  /** What the process becomes before the guest runs. */
  readonly uid: number;
  readonly gid: number;
}

/** A process to be started. */
export interface Launch {
  readonly program: string;
  readonly args: readonly string[];
  /** Descriptors of the starter that the process gets as 3, 4, … in this order. */
  readonly inheritedFds: readonly number[];
  /** Files to write before the start, inside the cell's folder. */
  readonly files: readonly { readonly path: string; readonly content: string }[];
  /** No file the process writes grows beyond this: a hostile guest cannot fill the disk through its console. */
  readonly maxFileBytes: number;
}

export interface Vmm {
  readonly name: "qemu" | "firecracker";
  /** For people: `QEMU 7.2.22 (tcg)`. */
  readonly description: string;
  /** True where no hardware isolates the guest: development and CI only. */
  readonly emulated: boolean;
  /** Host memory on top of the guest's own that the process may use; the limit of its control group is the sum. */
  overheadMib(size: { readonly vcpus: number; readonly memoryMib: number }): number;
  /** Pure: the same boot gives the same launch. Throws UNSUPPORTED for what this driver cannot run. */
  buildLaunch(boot: CellBoot): Launch;
}
