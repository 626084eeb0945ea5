import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { chmod, copyFile, mkdir, mkdtemp, open, readFile, rm, stat, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { childEnvironment, run } from "../../base/exec.ts";
import { type ConnectOptions, type ExitStatus, GuestChannel, type GuestHandlers, type GuestLog } from "../channel.ts";
import { encodeConfigDrive, type GuestConfig, guestCommandLine, type VerityParameters } from "../config-drive.ts";
import { loadGuest } from "./build.ts";

/** For tests: a small root file system, and guests booted from it by a QEMU without the driver's refinements. */
export interface GuestBench extends AsyncDisposable {
  readonly folder: string;
  readonly diskPath: string;
  readonly verity: VerityParameters;
  boot(config: Partial<GuestConfig>, options?: BootOptions): Promise<Guest>;
}

export interface BootOptions {
  readonly diskPath?: string;
  readonly memoryMib?: number;
}

export interface Guest {
  readonly told: Told;
  readonly console: () => Promise<string>;
  /** Resolves when QEMU has ended. */
  readonly ended: Promise<void>;
  /** Every connection adds to `told`. */
  connect(options?: Partial<ConnectOptions>): Promise<GuestChannel>;
  kill(): void;
}

/** Everything the guest has told, over all connections. */
export class Told {
  readonly logs: GuestLog[] = [];
  readonly dropped: { fromSequence: number; toSequence: number }[] = [];
  readonly fatals: { code: string; message: string }[] = [];
  readonly exits: ExitStatus[] = [];
  readonly boots: string[] = [];
  readonly starts: { at: Date; initUs: number; pid: number }[] = [];
  readonly #watchers = new Set<() => void>();

  handlers(): GuestHandlers {
    const note = <T>(list: T[], item: T): void => {
      list.push(item);
      for (const watcher of this.#watchers) watcher();
    };
    return {
      booted: (event) => note(this.boots, event.bootId),
      started: (event) => note(this.starts, event),
      log: (log) => note(this.logs, { ...log, bytes: Buffer.from(log.bytes) }),
      dropped: (event) => note(this.dropped, event),
      fatal: (event) => note(this.fatals, event),
      exited: (event) => note(this.exits, event.status),
    };
  }

  text(stream: "stdout" | "stderr"): string {
    return Buffer.concat(this.logs.filter((log) => log.stream === stream).map((log) => log.bytes)).toString();
  }

  /** Resolves when `condition` holds of what was told. */
  async until(condition: (told: Told) => boolean, timeoutMs = 60_000): Promise<void> {
    const held = Promise.withResolvers<void>();
    const check = (): void => {
      if (condition(this)) held.resolve();
    };
    const timer = setTimeout(() => held.reject(new Error(`not told in time; so far: ${JSON.stringify(this)}`)), timeoutMs);
    this.#watchers.add(check);
    check();
    try {
      await held.promise;
    } finally {
      clearTimeout(timer);
      this.#watchers.delete(check);
    }
  }
}

const buildDir = resolve(process.env["FORGE_BUILD_DIR"] ?? "build");
const applets = [
  "sh",
  "cat",
  "echo",
  "id",
  "env",
  "sleep",
  "stty",
  "ls",
  "ps",
  "kill",
  "yes",
  "head",
  "true",
  "pwd",
  "nc",
  "httpd",
  "ip",
  "mount",
  "uname",
  "dd",
  "hostname",
  "wc",
  "seq",
  "touch",
  "nproc",
  "grep",
  "setsid",
  "tty",
  "date",
  "printf",
  "mkfifo",
];

export async function openGuestBench(): Promise<GuestBench> {
  const folder = await mkdtemp(join(tmpdir(), "forge-guest-"));
  const children: ChildProcess[] = [];
  const disk = await makeDisk(folder);
  return {
    folder,
    ...disk,
    async boot(config, options = {}) {
      const name = join(folder, `guest${children.length}`);
      await writeFile(`${name}.config`, encodeConfigDrive({ ...exampleConfig, ...config }));
      const args = await qemuArgs(name, options.diskPath ?? disk.diskPath, disk.verity, options.memoryMib ?? 256);
      const child = spawn("qemu-system-x86_64", args, { stdio: "ignore", env: childEnvironment });
      children.push(child);
      const told = new Told();
      return {
        told,
        ended: once(child, "exit").then(() => undefined),
        console: async () => await readFile(`${name}.console`, "utf8"),
        connect: async (changes = {}) =>
          await GuestChannel.connect(`${name}.channel`, { lastLogSequence: 0, timeoutMs: 90_000, handlers: told.handlers(), ...changes }),
        kill: () => void child.kill("SIGKILL"),
      };
    },
    async [Symbol.asyncDispose]() {
      for (const child of children.filter((one) => one.exitCode === null && one.signalCode === null)) {
        const gone = once(child, "exit");
        child.kill("SIGKILL");
        await gone;
      }
      await rm(folder, { recursive: true, force: true });
    },
  };
}

export const exampleConfig: GuestConfig = {
  cellId: "cell_test",
  hostname: "web-1",
  argv: ["/bin/sh", "-c", "exec sleep 600"],
  env: {},
  cwd: "/",
  user: "",
  stopSignal: 15,
  address: "2001:db8::2",
  gateway: "2001:db8::1",
  gatewayMac: "02:f0:00:00:00:01",
  mtu: 1400,
};

/** A copy of the disk with one byte of a file's content changed: of the first block that holds `needle`. */
export async function alterByte(diskPath: string, copyPath: string, needle: string): Promise<void> {
  const bytes = await readFile(diskPath);
  const at = bytes.indexOf(needle);
  if (at === -1) throw new Error(`the disk does not hold ${needle}`);
  await copyFile(diskPath, copyPath);
  const file = await open(copyPath, "r+");
  await file.write(Buffer.from([(bytes[at] ?? 0) ^ 1]), 0, 1, at);
  await file.close();
}

async function makeDisk(folder: string): Promise<{ diskPath: string; verity: VerityParameters }> {
  const root = join(folder, "root");
  for (const name of ["bin", "etc", "tmp", "home/app", "www"]) await mkdir(join(root, name), { recursive: true });
  await copyFile("/usr/bin/busybox", join(root, "bin/busybox"));
  await chmod(join(root, "tmp"), 0o1777);
  for (const applet of applets) await symlink("busybox", join(root, "bin", applet));
  await writeFile(join(root, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n");
  await writeFile(join(root, "etc/group"), "root:x:0:\napp:x:1001:\nextra:x:2000:other,app\nwheel:x:2001:root\n");
  await writeFile(join(root, "www/index.html"), "well\n");
  await writeFile(join(root, "www/needle"), `${"needle-in-the-file ".repeat(1000)}\n`);
  await writeFile(join(root, "etc/not-executable"), "#!/bin/sh\n");
  const diskPath = join(folder, "disk");
  await run("mkfs.erofs", ["-T0", "-U00000000-0000-0000-0000-000000000000", diskPath, root]);
  const { size } = await stat(diskPath);
  const dataBlocks = Math.ceil(size / 4096);
  const tree = join(folder, "tree");
  const words = await run("veritysetup", ["format", "--no-superblock", "--salt=-", `--data-blocks=${dataBlocks}`, diskPath, tree]);
  const rootHash = /Root hash:\s*([0-9a-f]{64})/.exec(words)?.[1] ?? "";
  await writeFile(diskPath, Buffer.concat([await readFile(diskPath), Buffer.alloc(dataBlocks * 4096 - size), await readFile(tree)]));
  return { diskPath, verity: { rootHash, salt: "", dataBlocks, hashStartBlock: dataBlocks } };
}

async function qemuArgs(name: string, diskPath: string, verity: VerityParameters, memoryMib: number): Promise<string[]> {
  const guest = await loadGuest(buildDir);
  return [
    "-machine",
    "q35,accel=tcg",
    "-cpu",
    "max",
    "-m",
    `${memoryMib}`,
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
    "-kernel",
    guest.kernelPath,
    "-initrd",
    guest.initramfsPath,
    "-append",
    guestCommandLine(verity),
    "-drive",
    `if=none,id=root,format=raw,readonly=on,file=${diskPath}`,
    "-device",
    "virtio-blk-pci,drive=root",
    "-drive",
    `if=none,id=config,format=raw,readonly=on,file=${name}.config`,
    "-device",
    "virtio-blk-pci,drive=config",
    "-netdev",
    "hubport,id=net,hubid=0",
    "-device",
    "virtio-net-pci,netdev=net,romfile=",
    "-chardev",
    `socket,id=channel,path=${name}.channel,server=on,wait=off`,
    "-device",
    "virtio-serial-pci",
    "-device",
    "virtserialport,chardev=channel,name=forge.0",
    "-chardev",
    `file,id=console,path=${name}.console`,
    "-serial",
    "chardev:console",
  ];
}
