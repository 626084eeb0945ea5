import { createHash, randomBytes } from "node:crypto";
import { constants } from "node:fs";
import { type FileHandle, mkdtemp, open, readdir, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { Readable } from "node:stream";
import { digestSchema } from "../../api/resources.ts";
import { makeDirectory, renameDurable } from "../../base/durable.ts";
import { errnoOf, ForgeError, toForgeError } from "../../base/errors.ts";
import { type Descriptor, type ImageManifest, maximumDocumentBytes, parseConfig, parseDocument, selectPlatform } from "./manifest.ts";

/** The largest blob Forge takes at all; a caller may ask for less. */
export const maximumBlobBytes = 16 * 1024 * 1024 * 1024;

/**
 * Blobs by their SHA-256: `blobs/sha256/<hex>`, as in an OCI image layout. A blob that has its name has its bytes:
 * they were hashed while written and were on stable storage before they got the name.
 */
export class ImageStore {
  readonly folder: string;
  readonly #blobs: string;
  readonly #incoming: string;

  private constructor(folder: string) {
    this.folder = folder;
    this.#blobs = join(folder, "blobs", "sha256");
    this.#incoming = join(folder, "incoming");
  }

  /** Opens the store, creating it where there is none. What a crash left half-written is removed: one process writes a store. */
  static async open(folder: string): Promise<ImageStore> {
    const store = new ImageStore(folder);
    await makeDirectory(store.#blobs);
    await makeDirectory(store.#incoming);
    for (const name of await readdir(store.#incoming)) await rm(join(store.#incoming, name), { recursive: true, force: true });
    return store;
  }

  /**
   * Stores the bytes of `source` under `digest` and returns their number. Resolves when they are durable. Storing the same blob again, or
   * at the same time, is fine. IMAGE_CORRUPT when the bytes are not what the digest says, TOO_LARGE beyond maxBytes.
   */
  async putBlob(digest: string, source: AsyncIterable<Uint8Array>, limits: { maxBytes: number }): Promise<number> {
    const path = this.blobPath(digest);
    const temporary = join(this.#incoming, randomBytes(12).toString("hex"));
    try {
      const file = await open(temporary, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o600);
      let sizeBytes: number;
      try {
        sizeBytes = await writeHashed(file, digest, source, Math.min(limits.maxBytes, maximumBlobBytes));
        await file.chmod(0o400);
        await file.datasync();
      } finally {
        await file.close();
      }
      await renameDurable(temporary, path);
      return sizeBytes;
    } catch (error) {
      await rm(temporary, { force: true }).catch(() => undefined); // the first failure is the one to report
      throw toForgeError(error);
    }
  }

  /** Stores a small blob that is already in memory. */
  async putDocument(digest: string, bytes: Buffer): Promise<void> {
    await this.putBlob(digest, Readable.from([bytes]), { maxBytes: maximumDocumentBytes });
  }

  async hasBlob(digest: string): Promise<boolean> {
    return (await this.blobSize(digest)) !== undefined;
  }

  /** Those of the digests that are not stored, each once. */
  async missing(digests: readonly string[]): Promise<string[]> {
    const absent: string[] = [];
    for (const digest of new Set(digests)) if (!(await this.hasBlob(digest))) absent.push(digest);
    return absent;
  }

  /** The blob's size, or undefined where there is none. */
  async blobSize(digest: string): Promise<number | undefined> {
    try {
      return (await stat(this.blobPath(digest))).size;
    } catch (error) {
      if (errnoOf(error) === "ENOENT") return undefined;
      throw error;
    }
  }

  /** The bytes of a blob. Who rests a decision on them hashes them again: a disk may lie. */
  async openBlob(digest: string): Promise<Readable> {
    try {
      return (await open(this.blobPath(digest), "r")).createReadStream({ highWaterMark: 256 * 1024 });
    } catch (error) {
      if (errnoOf(error) === "ENOENT") throw new ForgeError("IMAGE_NOT_FOUND", `the blob ${digest} is not in the store`);
      throw error;
    }
  }

  /** A small blob whole, its digest checked. */
  async readBlob(digest: string, maxBytes = maximumDocumentBytes): Promise<Buffer> {
    const size = await this.blobSize(digest);
    if (size !== undefined && size > maxBytes)
      throw new ForgeError("IMAGE_REFUSED", `the document ${digest} is larger than ${maxBytes} bytes`);
    const bytes = Buffer.concat(await (await this.openBlob(digest)).toArray());
    if (digestOf(bytes) !== digest) throw new ForgeError("IMAGE_CORRUPT", `the blob ${digest} changed on disk`);
    return bytes;
  }

  /**
   * The image behind a digest, for this machine's platform, with every blob present and of the size its descriptor
   * says. IMAGE_NOT_FOUND when a blob is missing, IMAGE_CORRUPT or IMAGE_REFUSED when the documents are not right.
   */
  async readManifest(digest: string): Promise<ImageManifest> {
    const manifestDigest = await this.resolvePlatform(digest);
    const name = `the manifest ${manifestDigest}`;
    const document = parseDocument(await this.readBlob(manifestDigest), name);
    if (document.kind === "index") throw new ForgeError("IMAGE_REFUSED", `${name} is an index inside an index`);
    const { config: configDescriptor, layers } = document.manifest;
    for (const descriptor of [configDescriptor, ...layers]) await this.#checkSize(descriptor);
    const { config, diffIds } = parseConfig(
      await this.readBlob(configDescriptor.digest),
      `the config ${configDescriptor.digest}`,
      layers.length,
    );
    return {
      digest,
      manifestDigest,
      configDescriptor,
      config,
      layers: layers.map((descriptor, index) => ({ descriptor, diffId: diffIds[index] ?? "" })),
      sizeBytes: [configDescriptor, ...layers].reduce((sum, { size }) => sum + size, 0),
    };
  }

  /** The blobs a platform's manifest is made of, itself not among them; they need not be stored yet. */
  async references(manifestDigest: string): Promise<string[]> {
    const name = `the manifest ${manifestDigest}`;
    const document = parseDocument(await this.readBlob(manifestDigest), name);
    if (document.kind === "index") throw new ForgeError("IMAGE_REFUSED", `${name} is an index inside an index`);
    return [document.manifest.config, ...document.manifest.layers].map(({ digest }) => digest);
  }

  /** The digest of the manifest for this machine: the digest itself, or the index's entry. */
  async resolvePlatform(digest: string): Promise<string> {
    const document = parseDocument(await this.readBlob(digest), `the document ${digest}`);
    return document.kind === "manifest" ? digest : selectPlatform(document.index, `the index ${digest}`).digest;
  }

  /** A folder for files on their way into the store, removed when `work` is done. */
  async withTemporary<T>(work: (folder: string) => Promise<T>): Promise<T> {
    const folder = await mkdtemp(join(this.#incoming, "work-"));
    try {
      return await work(folder);
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  }

  blobPath(digest: string): string {
    return join(this.#blobs, hexOf(digest));
  }

  async #checkSize({ digest, size }: Descriptor): Promise<void> {
    const actual = await this.blobSize(digest);
    if (actual === undefined) throw new ForgeError("IMAGE_NOT_FOUND", `the blob ${digest} is not in the store`);
    if (actual !== size) throw new ForgeError("IMAGE_CORRUPT", `the blob ${digest} has ${actual} bytes; its descriptor says ${size}`);
  }
}

/** The digest of bytes, as image documents write it. */
export function digestOf(bytes: Uint8Array): string {
  return `sha256:${createHash("sha256").update(bytes).digest("hex")}`;
}

/** The hex part of a digest; INVALID_INPUT for anything else, so that no path is ever made of one. */
export function hexOf(digest: string): string {
  const result = digestSchema.safeParse(digest);
  if (!result.success) throw new ForgeError("INVALID_INPUT", "a digest must be sha256: and 64 hexadecimal digits in lower case");
  return result.data.slice("sha256:".length);
}

async function writeHashed(file: FileHandle, digest: string, source: AsyncIterable<Uint8Array>, maxBytes: number): Promise<number> {
  const hash = createHash("sha256");
  let sizeBytes = 0;
  for await (const chunk of source) {
    sizeBytes += chunk.length;
    if (sizeBytes > maxBytes) throw new ForgeError("TOO_LARGE", `the blob ${digest} is larger than ${maxBytes} bytes`);
    hash.update(chunk);
    await file.writeFile(chunk); // at the handle's position, all of it
  }
  if (`sha256:${hash.digest("hex")}` !== digest) throw new ForgeError("IMAGE_CORRUPT", `the bytes sent as ${digest} are not what it says`);
  return sizeBytes;
}
