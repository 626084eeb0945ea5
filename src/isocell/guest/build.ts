import { createHash } from "node:crypto";
import { mkdtemp, readdir, readFile, rm, symlink } from "node:fs/promises";
import { join, resolve } from "node:path";
import { z } from "zod";
import { makeDirectory, readIfExists, writeDurable } from "../../base/durable.ts";
import { ForgeError, toForgeError } from "../../base/errors.ts";
import { run } from "../../base/exec.ts";
import { unpackKernel } from "./bzimage.ts";
import { type CpioEntry, writeCpio } from "./cpio.ts";
import { fetchKernel, type KernelModule } from "./kernel.ts";

/** What every cell boots: built once a machine, the same for all. */
export interface GuestFiles {
  readonly kernelPath: string;
  readonly initramfsPath: string;
  /** `uname -r` inside a cell. */
  readonly kernelRelease: string;
  /** `sha256:<hex>` of the files' bytes. */
  readonly kernelDigest: string;
  readonly initramfsDigest: string;
}

/** build/guest/guest.json: the files by name, so that the folder can be moved. */
const recordSchema = z.object({
  inputs: z.string(),
  kernelPackage: z.string(),
  kernelVersion: z.string(),
  kernelRelease: z.string(),
  kernelDigest: z.string(),
  initramfsDigest: z.string(),
});
type GuestRecord = z.infer<typeof recordSchema>;

const kernelName = "vmlinux";
const initramfsName = "initramfs";
const recordName = "guest.json";

/** What `buildGuest` made earlier. UNSUPPORTED when it was not run. */
export async function loadGuest(buildDir: string): Promise<GuestFiles> {
  const folder = resolve(buildDir, "guest");
  const record = await readRecord(folder);
  if (record === undefined) throw new ForgeError("UNSUPPORTED", `there is no guest kernel in ${folder}: run tools/setup`);
  return guestFiles(folder, record);
}

/** Fetches the kernel, compiles init, writes the initramfs. Does nothing when sources and results are as they were. */
export async function buildGuest(buildDir: string): Promise<GuestFiles> {
  const folder = resolve(buildDir, "guest");
  const inputs = await hashSources();
  const record = await readRecord(folder);
  if (record !== undefined && record.inputs === inputs && (await isIntact(folder, record))) return guestFiles(folder, record);

  await makeDirectory(folder, 0o755);
  const kernel = await fetchKernel(join(folder, "kernel"));
  const image = unpackKernel(await readFile(kernel.imagePath));
  const initramfs = await makeInitramfs(await compileInit(folder), kernel.modules);
  await writeDurable(join(folder, kernelName), image, 0o644);
  await writeDurable(join(folder, initramfsName), initramfs, 0o644);
  const made: GuestRecord = {
    inputs,
    kernelPackage: kernel.package,
    kernelVersion: kernel.version,
    kernelRelease: kernel.release,
    kernelDigest: digestOf(image),
    initramfsDigest: digestOf(initramfs),
  };
  await writeDurable(join(folder, recordName), `${JSON.stringify(made, undefined, 2)}\n`, 0o644);
  return guestFiles(folder, made);
}

async function readRecord(folder: string): Promise<GuestRecord | undefined> {
  const bytes = await readIfExists(join(folder, recordName));
  return bytes === undefined ? undefined : recordSchema.safeParse(JSON.parse(bytes.toString())).data;
}

async function isIntact(folder: string, record: GuestRecord): Promise<boolean> {
  const [kernel, initramfs] = await Promise.all([readIfExists(join(folder, kernelName)), readIfExists(join(folder, initramfsName))]);
  if (kernel === undefined || initramfs === undefined) return false;
  return digestOf(kernel) === record.kernelDigest && digestOf(initramfs) === record.initramfsDigest;
}

function guestFiles(folder: string, record: GuestRecord): GuestFiles {
  const { kernelRelease, kernelDigest, initramfsDigest } = record;
  return { kernelPath: join(folder, kernelName), initramfsPath: join(folder, initramfsName), kernelRelease, kernelDigest, initramfsDigest };
}

/** One hash over everything in this folder that the result depends on. */
async function hashSources(): Promise<string> {
  const names = (await readdir(import.meta.dirname)).filter((name) => /\.(?:c|h|ts)$/.test(name) && !name.includes(".test.")).sort();
  const hash = createHash("sha256");
  for (const name of names) hash.update(`${name}\0`).update(await readFile(join(import.meta.dirname, name)));
  return hash.digest("hex");
}

const compilerFlags = [
  "-static", "-s", "-std=gnu17", "-O2", "-D_GNU_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-Wl,-z,relro,-z,now",
  "-Wall", "-Wextra", "-Werror",
];

async function compileInit(folder: string): Promise<Buffer> {
  const work = await mkdtemp(join(folder, "init-"));
  try {
    // The kernel's headers beside musl's own, without the rest of the host's C library.
    for (const name of ["linux", "asm-generic"]) await symlink(join("/usr/include", name), join(work, name));
    await symlink("/usr/include/x86_64-linux-gnu/asm", join(work, "asm"));
    const sources = (await readdir(import.meta.dirname)).filter((name) => name.endsWith(".c")).sort();
    await run("musl-gcc", [...compilerFlags, "-isystem", work, "-o", join(work, "init"), ...sources], { cwd: import.meta.dirname });
    return await readFile(join(work, "init"));
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/** Not compressed: an emulated CPU reads faster than it unpacks, and the file is small. */
async function makeInitramfs(init: Buffer, modules: readonly KernelModule[]): Promise<Buffer> {
  const list = modules.map((module) => `/modules/${module.name}.ko\n`).join("");
  const entries: CpioEntry[] = [
    { path: "dev", mode: 0o040755 },
    { path: "dev/console", mode: 0o020600, device: { major: 5, minor: 1 } },
    { path: "init", mode: 0o100755, data: init },
    { path: "modules", mode: 0o040755 },
    { path: "modules/list", mode: 0o100644, data: Buffer.from(list) },
  ];
  for (const module of modules) entries.push({ path: `modules/${module.name}.ko`, mode: 0o100644, data: await readFile(module.path) });
  return writeCpio(entries);
}

function digestOf(bytes: Uint8Array): string {
  return `sha256:${createHash("sha256").update(bytes).digest("hex")}`;
}

if (import.meta.main) {
  const buildDir = process.env["FORGE_BUILD_DIR"] ?? resolve(import.meta.dirname, "../../../build");
  try {
    const guest = await buildGuest(buildDir);
    process.stdout.write(`guest: kernel ${guest.kernelRelease}, ${guest.kernelDigest}; initramfs ${guest.initramfsDigest}\n`);
  } catch (thrown) {
    const error = toForgeError(thrown);
    process.stderr.write(`guest: ${error.code}: ${error.message}\n`);
    process.exitCode = error.exitCode;
  }
}
