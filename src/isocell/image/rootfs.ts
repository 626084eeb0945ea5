import { createHash, randomBytes } from "node:crypto";
import { type BigIntStats } from "node:fs";
import { chmod, open, readdir, rename, rm, stat, statfs } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { digestSchema } from "../../api/resources.ts";
import { makeDirectory, readIfExists, syncDirectory, writeDurable } from "../../base/durable.ts";
import { errnoOf, ForgeError, toForgeError } from "../../base/errors.ts";
import { run } from "../../base/exec.ts";
import { tryLock, waitForLock } from "./lock.ts";
import { hexOf, type ImageStore } from "./store.ts";
import { isDiskFull, unpack } from "./unpack.ts";

export const blockSizeBytes = 4096;
const hexHashSchema = z.string().regex(/^[0-9a-f]{64}$/);

const artifactSchema = z.object({
  /** The image's digest it was asked by. */
  digest: digestSchema,
  /** One file, 0444: an EROFS file system, and behind it its dm-verity hash tree (no superblock). */
  path: z.string(),
  /** What the guest is booted with; SHA-256, hash type 1, 4096-byte data and hash blocks. */
  rootHash: hexHashSchema,
  salt: hexHashSchema,
  /** Blocks of the file system; the hash tree starts at block hashStartBlock of the same file. */
  dataBlocks: z.int().positive(),
  hashStartBlock: z.int().positive(),
  sizeBytes: z.int().positive(),
  config: z.object({
    user: z.string(),
    env: z.array(z.string()),
    entrypoint: z.array(z.string()),
    cmd: z.array(z.string()),
    workingDir: z.string(),
    exposedPorts: z.array(z.string()),
    stopSignal: z.string(),
  }),
  /** What stat said when the file was sealed; any difference asks for the full check. */
  seal: z.object({ dev: z.string(), ino: z.string(), size: z.string(), mtimeNs: z.string(), ctimeNs: z.string() }),
});

/** An image made ready to boot: a deterministic, verified, read-only root file system. */
export type RootfsArtifact = z.infer<typeof artifactSchema>;

/** Where the time of a first `prepare` went. */
export interface BuildTimings {
  readonly unpackMs: number;
  readonly erofsMs: number;
  readonly verityMs: number;
}

const lockTimeoutMs = 20 * 60_000;
const toolTimeoutMs = 10 * 60_000;
const temporaryPrefix = ".building-";

/**
 * Root file systems by image digest: `<hex>/root.img` and `<hex>/record.json`. A folder with its final name is whole
 * and durable; everything else is a build, or what a crash left of one.
 */
export class RootfsCache {
  readonly folder: string;
  readonly #store: ImageStore;
  readonly #inFlight = new Map<string, Promise<RootfsArtifact>>();
  readonly #onBuilt: ((digest: string, timings: BuildTimings) => void) | undefined;

  private constructor(folder: string, store: ImageStore, onBuilt: ((digest: string, timings: BuildTimings) => void) | undefined) {
    this.folder = folder;
    this.#store = store;
    this.#onBuilt = onBuilt;
  }

  static async open(folder: string, store: ImageStore, onBuilt?: (digest: string, timings: BuildTimings) => void): Promise<RootfsCache> {
    const cache = new RootfsCache(folder, store, onBuilt);
    await makeDirectory(folder);
    const release = await tryLock(cache.#lockPath);
    if (release === undefined) return cache; // another process builds at this moment: nothing here is abandoned
    try {
      for (const name of await readdir(folder)) {
        if (name.startsWith(temporaryPrefix)) await rm(join(folder, name), { recursive: true, force: true });
      }
    } finally {
      await release();
    }
    return cache;
  }

  /** The artifact for an image in the store; built once however often, and from however many processes, it is asked for. */
  async prepare(digest: string): Promise<RootfsArtifact> {
    const running = this.#inFlight.get(digest);
    if (running !== undefined) return running;
    const started = this.#prepare(digest).finally(() => this.#inFlight.delete(digest));
    this.#inFlight.set(digest, started);
    return started;
  }

  /** Throws IMAGE_TAMPERED when the file is not what was sealed. Cheap (one stat) while nothing touched it. */
  async verifySealed(artifact: RootfsArtifact): Promise<void> {
    const seal = await sealOf(artifact.path).catch((error: unknown) => {
      throw errnoOf(error) === "ENOENT" ? tampered(artifact.digest, "is gone") : error;
    });
    if (JSON.stringify(seal) === JSON.stringify(artifact.seal)) return;
    if (seal.size !== artifact.seal.size) throw tampered(artifact.digest, `has ${seal.size} bytes instead of ${artifact.seal.size}`);
    await verifyHashTree(artifact);
    await writeRecord(this.#pathOf(artifact.digest), { ...artifact, seal }); // touched (linked, copied) but not changed
  }

  /** Forgets an image's artifact; a running cell keeps its open file. */
  async remove(digest: string): Promise<void> {
    const doomed = join(this.folder, `${temporaryPrefix}${randomBytes(6).toString("hex")}`);
    try {
      await rename(this.#pathOf(digest), doomed);
    } catch (error) {
      if (errnoOf(error) === "ENOENT") return;
      throw error;
    }
    await syncDirectory(this.folder);
    await rm(doomed, { recursive: true, force: true });
  }

  async #prepare(digest: string): Promise<RootfsArtifact> {
    const cached = await this.lookup(digest);
    if (cached !== undefined) return cached;
    const release = await waitForLock(this.#lockPath, lockTimeoutMs);
    try {
      return (await this.lookup(digest)) ?? (await this.#build(digest));
    } finally {
      await release();
    }
  }

  /** The artifact where it is ready, its seal checked: neither the image's blobs nor a build is needed then. */
  async lookup(digest: string): Promise<RootfsArtifact | undefined> {
    const bytes = await readIfExists(join(this.#pathOf(digest), "record.json"));
    if (bytes === undefined) return undefined;
    const artifact = parseRecord(bytes, digest);
    await this.verifySealed(artifact);
    return artifact;
  }

  async #build(digest: string): Promise<RootfsArtifact> {
    const manifest = await this.#store.readManifest(digest);
    const work = join(this.folder, `${temporaryPrefix}${randomBytes(6).toString("hex")}`);
    try {
      await makeDirectory(work);
      const finished = join(work, "finished");
      await makeDirectory(finished);
      const image = join(finished, "root.img");
      const startedMs = performance.now();
      const rootfs = await unpack(manifest, this.#store, work);
      const unpackedMs = performance.now();
      const dataBlocks = await makeFileSystem(rootfs, image, digest);
      const formattedMs = performance.now();
      const salt = derive("dm-verity salt", digest);
      const rootHash = await appendHashTree(image, dataBlocks, salt);
      await sealFile(image);
      const seal = await sealOf(image);
      const path = join(this.#pathOf(digest), "root.img");
      const config = structuredClone(manifest.config) as RootfsArtifact["config"];
      const artifact = { digest, path, rootHash, salt, dataBlocks, hashStartBlock: dataBlocks, sizeBytes: Number(seal.size), config, seal };
      await writeRecord(finished, artifact);
      await rename(finished, this.#pathOf(digest));
      await syncDirectory(this.folder);
      this.#onBuilt?.(digest, {
        unpackMs: unpackedMs - startedMs,
        erofsMs: formattedMs - unpackedMs,
        verityMs: performance.now() - formattedMs,
      });
      return artifact;
    } catch (error) {
      throw await this.#explain(error);
    } finally {
      await rm(work, { recursive: true, force: true });
    }
  }

  /** Programs tell of a full disk in many words, or in none. */
  async #explain(error: unknown): Promise<ForgeError> {
    const known = toForgeError(error);
    if (known.code !== "EXEC_FAILED") return known;
    const { bavail, bsize } = await statfs(this.folder);
    const isFull = isDiskFull(known) || bavail * bsize < 1024 * 1024;
    return isFull ? new ForgeError("DISK_FULL", `no space left in ${this.folder} to prepare the image`, { cause: error }) : known;
  }

  get #lockPath(): string {
    return join(this.folder, ".lock");
  }

  #pathOf(digest: string): string {
    return join(this.folder, hexOf(digest));
  }
}

/** An EROFS image whose bytes follow from the folder's content alone; returns its length in blocks. */
async function makeFileSystem(rootfs: string, image: string, digest: string): Promise<number> {
  const hex = derive("erofs uuid", digest);
  // RFC 9562, version 8.
  const uuid = `${hex.slice(0, 8)}-${hex.slice(8, 12)}-8${hex.slice(13, 16)}-8${hex.slice(17, 20)}-${hex.slice(20, 32)}`;
  // Fixes the superblock's time, and keeps the files' own times, which all lie before it: packages compare them.
  const env = { SOURCE_DATE_EPOCH: "4102444800" };
  await run("mkfs.erofs", ["--quiet", "-U", uuid, image, rootfs], { env, timeoutMs: toolTimeoutMs });
  const { size } = await stat(image);
  if (size === 0 || size % blockSizeBytes !== 0) throw new ForgeError("INTERNAL", `mkfs.erofs made a file of ${size} bytes`);
  return size / blockSizeBytes;
}

/** Appends the dm-verity tree to the file system it protects and returns the root hash. */
async function appendHashTree(image: string, dataBlocks: number, salt: string): Promise<string> {
  const output = await run("veritysetup", ["format", ...verityArguments({ dataBlocks, salt }), image, image], { timeoutMs: toolTimeoutMs });
  const rootHash = /^Root hash:\s*([0-9a-f]{64})$/m.exec(output)?.[1];
  if (rootHash === undefined) throw new ForgeError("INTERNAL", "veritysetup named no root hash");
  return rootHash;
}

async function verifyHashTree(artifact: RootfsArtifact): Promise<void> {
  try {
    await run("veritysetup", ["verify", ...verityArguments(artifact), artifact.path, artifact.path, artifact.rootHash], {
      timeoutMs: toolTimeoutMs,
    });
  } catch (error) {
    if (error instanceof ForgeError && error.code === "EXEC_FAILED") throw tampered(artifact.digest, "does not match its root hash", error);
    throw error;
  }
}

function verityArguments({ dataBlocks, salt }: { dataBlocks: number; salt: string }): string[] {
  return [
    "--no-superblock",
    "--format=1",
    "--hash=sha256",
    `--salt=${salt}`,
    `--data-block-size=${blockSizeBytes}`,
    `--hash-block-size=${blockSizeBytes}`,
    `--data-blocks=${dataBlocks}`,
    `--hash-offset=${dataBlocks * blockSizeBytes}`,
  ];
}

async function sealFile(path: string): Promise<void> {
  await chmod(path, 0o444);
  const file = await open(path, "r");
  try {
    await file.sync();
  } finally {
    await file.close();
  }
}

async function sealOf(path: string): Promise<RootfsArtifact["seal"]> {
  const { dev, ino, size, mtimeNs, ctimeNs }: BigIntStats = await stat(path, { bigint: true });
  return { dev: `${dev}`, ino: `${ino}`, size: `${size}`, mtimeNs: `${mtimeNs}`, ctimeNs: `${ctimeNs}` };
}

async function writeRecord(folder: string, artifact: RootfsArtifact): Promise<void> {
  await writeDurable(join(folder, "record.json"), `${JSON.stringify(artifact, undefined, 2)}\n`, 0o444);
}

function parseRecord(bytes: Buffer, digest: string): RootfsArtifact {
  try {
    const artifact = artifactSchema.parse(JSON.parse(bytes.toString()));
    if (artifact.digest === digest) return artifact;
  } catch {
    // falls through to the same answer: records are renamed into place whole
  }
  throw tampered(digest, "has a record that Forge did not write");
}

/** A value that differs by purpose and image, and never between two builds. */
function derive(purpose: string, digest: string): string {
  return createHash("sha256").update(`forge ${purpose}\0${digest}`).digest("hex");
}

function tampered(digest: string, how: string, cause?: unknown): ForgeError {
  return new ForgeError("IMAGE_TAMPERED", `the prepared root file system of ${digest} ${how}`, { details: { digest }, cause });
}
