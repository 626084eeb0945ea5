import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { basename, join } from "node:path";
import { z } from "zod";
import { makeDirectory, readIfExists, renameDurable, writeDurable } from "../../base/durable.ts";
import { ForgeError } from "../../base/errors.ts";
import { run } from "../../base/exec.ts";

/** The distribution's cloud kernel, unpacked and never installed on the host. */
export interface Kernel {
  readonly package: string;
  readonly version: string;
  readonly release: string;
  readonly imagePath: string;
  readonly modules: readonly KernelModule[];
}

export interface KernelModule {
  readonly name: string;
  readonly path: string;
}

/** What a cell's hardware and root need; what these depend on is found in the modules themselves. */
const wantedModules = [
  "virtio_pci",
  "virtio_console",
  "virtio_blk",
  "virtio_net",
  "virtio_rng",
  "sha256_generic",
  "dm_verity",
  "crc32c_generic",
  "erofs",
  "overlay",
];
const metaPackage = "linux-image-cloud-amd64";

const recordSchema = z.object({ package: z.string(), version: z.string(), release: z.string() });

/** Fetches the kernel into `folder` unless it is there. apt checks the package against the archive's signatures. */
export async function fetchKernel(folder: string): Promise<Kernel> {
  const record = await readIfExists(join(folder, "kernel.json"));
  if (record === undefined) await downloadKernel(folder);
  const known = recordSchema.parse(JSON.parse((record ?? (await readFile(join(folder, "kernel.json")))).toString()));
  const root = join(folder, "root");
  const modules = await orderModules(join(root, "lib/modules", known.release));
  return { ...known, imagePath: join(root, "boot", `vmlinuz-${known.release}`), modules };
}

async function downloadKernel(folder: string): Promise<void> {
  const depends = await run("apt-cache", ["depends", "--important", metaPackage]);
  const name = /Depends: (linux-image-[0-9]\S*-cloud-amd64)/.exec(depends)?.[1];
  if (name === undefined)
    throw new ForgeError("UNSUPPORTED", `the package index knows no kernel for cells (${metaPackage}): run apt-get update`);
  await rm(folder, { recursive: true, force: true });
  await makeDirectory(join(folder, ".."), 0o755);
  const work = await mkdtemp(`${folder}-`);
  try {
    await run("apt-get", ["download", "-q", "-o", "APT::Sandbox::User=root", name], { cwd: work, timeoutMs: 600_000 });
    const archive = (await readdir(work)).find((file) => file.endsWith(".deb"));
    if (archive === undefined) throw new ForgeError("EXEC_FAILED", `apt-get download left no ${name}`);
    await run("dpkg-deb", ["-x", archive, "root"], { cwd: work, timeoutMs: 300_000 });
    const version = (await run("dpkg-deb", ["-f", archive, "Version"], { cwd: work })).trim();
    await rm(join(work, archive));
    await rm(join(work, "root/usr"), { recursive: true, force: true });
    const release = (await readdir(join(work, "root/lib/modules")))[0];
    await writeDurable(join(work, "kernel.json"), `${JSON.stringify({ package: name, version, release })}\n`, 0o644);
    await renameDurable(work, folder);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/** The wanted modules and all they depend on, each after what it needs. What is built in is left out. */
async function orderModules(folder: string): Promise<KernelModule[]> {
  const files = (await readdir(join(folder, "kernel"), { recursive: true })).filter((file) => file.endsWith(".ko"));
  const paths = new Map(files.map((file) => [moduleName(file), join(folder, "kernel", file)]));
  const builtIn = new Set((await readFile(join(folder, "modules.builtin"), "utf8")).split("\n").map(moduleName));
  const ordered = new Map<string, KernelModule>();
  const add = async (name: string): Promise<void> => {
    if (ordered.has(name) || builtIn.has(name)) return;
    const path = paths.get(name);
    if (path === undefined) throw new ForgeError("UNSUPPORTED", `the kernel in ${folder} has no module ${name}`);
    for (const dependency of await readDependencies(path)) await add(dependency);
    ordered.set(name, { name, path });
  };
  for (const name of wantedModules) await add(name);
  return [...ordered.values()];
}

/** The `depends=` entry of the module's .modinfo section: depmod's own source, where its index is not shipped. */
async function readDependencies(path: string): Promise<string[]> {
  const bytes = await readFile(path);
  const marker = Buffer.from("\0depends=");
  const at = bytes.indexOf(marker);
  if (at === -1) return [];
  const list = bytes.toString("latin1", at + marker.length, bytes.indexOf(0, at + marker.length));
  return list === "" ? [] : list.split(",").map(moduleName);
}

function moduleName(path: string): string {
  return basename(path, ".ko").replaceAll("-", "_");
}
