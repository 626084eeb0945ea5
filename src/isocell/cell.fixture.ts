import { closeSync } from "node:fs";
import { copyFile, mkdir, mkdtemp, readFile, rm, stat, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { pino } from "pino";
import { run } from "../base/exec.ts";
import { newId } from "../base/ids.ts";
import { createNetns, inNetns, openTap, removeNetns } from "../base/linux.ts";
import { type CellSpec, IsoCells, type IsoCellsOptions } from "./cells.ts";
import type { RootfsArtifact } from "./image/rootfs.ts";
import { qemuDriver, qemuVersion } from "./vmm/qemu.ts";

/** For tests: everything a cell needs, below one folder that `[Symbol.asyncDispose]` leaves no trace of. */
export interface Bench extends AsyncDisposable {
  readonly folder: string;
  readonly artifact: RootfsArtifact;
  open(options?: Partial<IsoCellsOptions>): Promise<IsoCells>;
  /** A cell that runs `script` in busybox's shell. Its TAP stays open until the bench ends or lets go of it. */
  spec(script: string, changes?: Partial<CellSpec>): CellSpec;
  /** Closes our end of the cell's TAP, so that another process may open it. */
  closeTap(spec: CellSpec): void;
}

export const buildDir = resolve(process.env["FORGE_BUILD_DIR"] ?? "build");

export async function openBench(): Promise<Bench> {
  const folder = await mkdtemp(join(tmpdir(), "forge-cell-"));
  const artifact = await busyboxRootfs(folder);
  const opened: IsoCells[] = [];
  const netnsPaths: string[] = [];
  const taps = new Set<number>();
  const vmm = qemuDriver("tcg", await qemuVersion());
  return {
    folder,
    artifact,
    async open(options = {}) {
      const rootfs = { verifySealed: async () => undefined };
      const cells = await IsoCells.open({ dir: join(folder, "cells"), buildDir, vmm, rootfs, log: pino({ level: "silent" }), ...options });
      opened.push(cells);
      return cells;
    },
    spec(script, changes = {}) {
      const netnsPath = join(folder, `net${netnsPaths.length}`);
      createNetns(netnsPath, () => undefined);
      netnsPaths.push(netnsPath);
      const tapFd = inNetns(netnsPath, () => openTap("tap0", { persist: false }));
      taps.add(tapFd);
      const network = { netnsPath, tapFd, guestMac: "02:f0:00:00:00:02" };
      return { cellId: newId("cell"), artifact, guest: guestOf(script), vcpus: 1, memoryMib: 256, cpus: null, network, ...changes };
    },
    closeTap({ network: { tapFd } }) {
      if (taps.delete(tapFd)) closeSync(tapFd);
    },
    async [Symbol.asyncDispose]() {
      for (const cells of opened.splice(0)) for (const cellId of await cells.list()) await cells.remove(cellId);
      for (const tapFd of taps) closeSync(tapFd);
      taps.clear();
      for (const netnsPath of netnsPaths.splice(0)) removeNetns(netnsPath);
      await rm(folder, { recursive: true, force: true });
    },
  };
}

function guestOf(script: string): CellSpec["guest"] {
  const network = { address: "2001:db8::2", gateway: "2001:db8::1", gatewayMac: "02:f0:00:00:00:01", mtu: 1400 };
  return { hostname: "test", argv: ["/bin/sh", "-c", script], env: { PATH: "/bin" }, cwd: "/", user: "", stopSignal: 15, ...network };
}

/** Busybox alone, sealed in the form the image part seals its own. */
async function busyboxRootfs(folder: string): Promise<RootfsArtifact> {
  const root = join(folder, "root");
  for (const name of ["bin", "dev", "etc", "proc", "sys", "tmp"]) await mkdir(join(root, name), { recursive: true });
  await copyFile("/usr/bin/busybox", join(root, "bin/busybox"));
  for (const name of ["sh", "sleep", "echo", "cat", "dd", "nproc", "uname"]) await symlink("busybox", join(root, "bin", name));
  await writeFile(join(root, "etc/passwd"), "root:x:0:0::/:/bin/sh\n");
  const path = join(folder, "rootfs");
  await run("mkfs.erofs", ["-T0", "-U00000000-0000-0000-0000-000000000000", path, root]);
  const { size } = await stat(path);
  const dataBlocks = Math.ceil(size / 4096);
  const salt = "00".repeat(32);
  const tree = join(folder, "tree");
  const words = await run("veritysetup", ["format", "--no-superblock", `--data-blocks=${dataBlocks}`, `--salt=${salt}`, path, tree]);
  const rootHash = /Root hash:\s*([0-9a-f]{64})/.exec(words)?.[1] ?? "";
  await writeFile(path, Buffer.concat([await readFile(path), Buffer.alloc(dataBlocks * 4096 - size), await readFile(tree)]));
  const { size: sizeBytes } = await stat(path);
  const config = { user: "", env: [], entrypoint: [], cmd: ["/bin/sh"], workingDir: "/", exposedPorts: [], stopSignal: "" };
  const seal = { dev: "", ino: "", size: "", mtimeNs: "", ctimeNs: "" };
  return { digest: `sha256:${rootHash}`, path, rootHash, salt, dataBlocks, hashStartBlock: dataBlocks, sizeBytes, config, seal };
}
