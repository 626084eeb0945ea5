import { createHash } from "node:crypto";
import { readdir, readFile, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { makeDirectory, readIfExists, writeDurable } from "../../base/durable.ts";
import { ForgeError, toForgeError } from "../../base/errors.ts";

/** What every cell boots: built once a machine, the same for all. */
export interface GuestFiles {
  /** An ELF kernel, which every VMM starts directly. */
  readonly kernelPath: string;
  readonly initramfsPath: string;
  /** `uname -r` inside a cell. */
  readonly kernelRelease: string;
  /** `sha256:<hex>` of the files' bytes. */
  readonly kernelDigest: string;
  readonly initramfsDigest: string;
}

/** build/guest/guest.json: what was made, from what. */
interface GuestRecord {
  /** Hash over the sources. */
  readonly inputs: string;
  /** Sizes and times of the files made. */
  readonly outputs: string;
  readonly kernelPackage: string;
  readonly kernelVersion: string;
  readonly kernelRelease: string;
  readonly kernelDigest: string;
  readonly initramfsDigest: string;
}

const kernelName = "vmlinux";
const initramfsName = "initramfs";
const recordName = "guest.json";

/** What `buildGuest` made earlier, byte for byte. UNSUPPORTED when it was not run, or when the files are others now. */
export async function loadGuest(buildDir: string): Promise<GuestFiles> {
  const folder = resolve(buildDir, "guest");
  const record = await readRecord(folder);
  if (record === undefined) throw new ForgeError("UNSUPPORTED", `there is no guest kernel in ${folder}: run tools/setup`);
  const files = guestFiles(folder, record);
  const [kernel, initramfs] = await Promise.all([readIfExists(files.kernelPath), readIfExists(files.initramfsPath)]);
  const isSame =
    kernel !== undefined &&
    initramfs !== undefined &&
    digestOf(kernel) === record.kernelDigest &&
    digestOf(initramfs) === record.initramfsDigest;
  if (!isSame)
    throw new ForgeError("UNSUPPORTED", `the guest in ${folder} is not the one that was built: remove the folder and run tools/setup`);
  return files;
}

/** Fetches the kernel, compiles init, writes the initramfs. Does nothing when sources and results are as they were. */
export async function buildGuest(buildDir: string): Promise<GuestFiles> {
  const folder = resolve(buildDir, "guest");
  const inputs = await hashSources();
  const record = await readRecord(folder);
  if (record !== undefined && record.inputs === inputs && record.outputs === (await statOutputs(folder))) return guestFiles(folder, record);

  const { makeGuest } = await import("./make.ts"); // set-up asks each time: what it rarely needs is not loaded in vain
  await makeDirectory(folder, 0o755);
  const { kernel, image, initramfs } = await makeGuest(folder);
  await writeDurable(join(folder, kernelName), image, 0o644);
  await writeDurable(join(folder, initramfsName), initramfs, 0o644);
  const made: GuestRecord = {
    inputs,
    outputs: await statOutputs(folder),
    kernelPackage: kernel.package,
    kernelVersion: kernel.version,
    kernelRelease: kernel.release,
    kernelDigest: digestOf(image),
    initramfsDigest: digestOf(initramfs),
  };
  await writeDurable(join(folder, recordName), `${JSON.stringify(made, undefined, 2)}\n`, 0o644);
  return guestFiles(folder, made);
}

/** One hash over everything in this folder that the result depends on. */
async function hashSources(): Promise<string> {
  const names = (await readdir(import.meta.dirname)).filter((name) => /^[\w-]+\.(?:c|h|ts)$/.test(name)).sort();
  const hash = createHash("sha256");
  for (const name of names) hash.update(`${name}\0`).update(await readFile(join(import.meta.dirname, name)));
  return hash.digest("hex");
}

async function readRecord(folder: string): Promise<GuestRecord | undefined> {
  const bytes = await readIfExists(join(folder, recordName));
  if (bytes === undefined) return undefined;
  const read = JSON.parse(bytes.toString()) as Partial<Record<keyof GuestRecord, unknown>>; // written by buildGuest alone
  const { inputs, outputs, kernelPackage, kernelVersion, kernelRelease, kernelDigest, initramfsDigest } = read;
  const fields = { inputs, outputs, kernelPackage, kernelVersion, kernelRelease, kernelDigest, initramfsDigest };
  return Object.values(fields).every((field) => typeof field === "string") ? (fields as GuestRecord) : undefined;
}

/** Enough to see that nothing has to be made; that the bytes are right is for loadGuest to check. */
async function statOutputs(folder: string): Promise<string> {
  const stats = await Promise.all([kernelName, initramfsName].map(async (name) => await stat(join(folder, name)).catch(() => undefined)));
  return stats.map((file) => (file === undefined ? "absent" : `${file.size}@${file.mtimeMs}`)).join(" ");
}

function guestFiles(folder: string, record: GuestRecord): GuestFiles {
  const { kernelRelease, kernelDigest, initramfsDigest } = record;
  return { kernelPath: join(folder, kernelName), initramfsPath: join(folder, initramfsName), kernelRelease, kernelDigest, initramfsDigest };
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
