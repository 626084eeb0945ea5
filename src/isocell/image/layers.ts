import { createHash, type Hash } from "node:crypto";
import { once } from "node:events";
import type { FileHandle } from "node:fs/promises";
import { pipeline, type Readable } from "node:stream";
import { createGunzip, createZstdDecompress } from "node:zlib";
import { extract, type Header } from "tar-stream";
import { ForgeError, toForgeError } from "../../base/errors.ts";
import type { ImageLayer, ImageManifest } from "./manifest.ts";
import type { ImageStore } from "./store.ts";
import { type EntryType, ImageTree, imageLimits, type LayerEntry, refused } from "./tree.ts";

/**
 * Reads every layer of an image once, before anything is unpacked: digest of the stored bytes, digest of the plain
 * tar, every entry. `keep` receives each plain tar, so that what is unpacked later is what was checked here.
 * Throws IMAGE_CORRUPT when bytes are not what their digest says, IMAGE_REFUSED for what Forge does not take.
 */
export async function checkLayers(
  manifest: ImageManifest,
  store: ImageStore,
  keep?: (layer: ImageLayer) => Promise<FileHandle>,
): Promise<ImageTree> {
  const tree = new ImageTree();
  let totalBytes = 0;
  for (const layer of manifest.layers) {
    tree.beginLayer();
    const file = await keep?.(layer);
    try {
      totalBytes += await checkLayer(layer, store, tree, imageLimits.uncompressedBytes - totalBytes, file);
    } finally {
      await file?.close();
    }
  }
  return tree;
}

async function checkLayer(
  layer: ImageLayer,
  store: ImageStore,
  tree: ImageTree,
  maxBytes: number,
  keep: FileHandle | undefined,
): Promise<number> {
  const { digest, mediaType } = layer.descriptor;
  if (!layerMediaType.test(mediaType))
    throw new ForgeError("IMAGE_REFUSED", `the layer ${digest} has the media type ${JSON.stringify(mediaType.slice(0, 100))}`);
  const stored = createHash("sha256");
  const plain = createHash("sha256");
  const counter = { storedBytes: 0, plainBytes: 0 };
  try {
    const source = hashed(await store.openBlob(digest), stored, counter);
    await readTar(bounded(decompress(source), plain, counter, maxBytes, digest, keep), tree);
  } catch (error) {
    throw await explain(error, layer, store);
  }
  if (`sha256:${stored.digest("hex")}` !== digest) throw changed(digest);
  const diffId = `sha256:${plain.digest("hex")}`;
  if (diffId !== layer.diffId)
    throw new ForgeError("IMAGE_CORRUPT", `the layer ${digest} unpacks to ${diffId}; its config says ${layer.diffId}`);
  return counter.plainBytes;
}

/** The layer types of OCI and Docker; which compression it is, its own first bytes say. */
const layerMediaType =
  /^application\/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1|docker\.image\.rootfs\.(foreign\.)?diff)\.tar([+.](gzip|zstd))?$/;

async function* hashed(source: Readable, hash: Hash, counter: { storedBytes: number }): AsyncGenerator<Buffer> {
  for await (const chunk of source as AsyncIterable<Buffer>) {
    hash.update(chunk);
    counter.storedBytes += chunk.length;
    yield chunk;
  }
}

/** Plain bytes of gzip, zstd or plain input, told apart by magic number (RFC 1952, RFC 8878). */
export async function* decompress(source: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
  const iterator = source[Symbol.asyncIterator]();
  const first = await iterator.next();
  if (first.done === true) return;
  const head = first.value;
  const rest = (async function* (): AsyncGenerator<Buffer> {
    yield head;
    yield* { [Symbol.asyncIterator]: () => iterator };
  })();
  const stage = decompressorFor(head);
  if (stage === undefined) return yield* rest;
  // A failure of the source or of the stage destroys the stage, and the loop below throws it.
  pipeline(rest, stage, () => undefined);
  yield* stage as AsyncIterable<Buffer>;
}

function decompressorFor(head: Buffer): ReturnType<typeof createGunzip> | ReturnType<typeof createZstdDecompress> | undefined {
  if (head.length >= 2 && head.readUInt16BE(0) === 0x1f8b) return createGunzip({ chunkSize: 256 * 1024 });
  if (head.length >= 4 && head.readUInt32LE(0) === 0xfd2fb528) return createZstdDecompress({ chunkSize: 256 * 1024 });
  return undefined;
}

async function* bounded(
  source: AsyncIterable<Buffer>,
  hash: Hash,
  counter: { storedBytes: number; plainBytes: number },
  maxBytes: number,
  digest: string,
  keep: FileHandle | undefined,
): AsyncGenerator<Buffer> {
  for await (const chunk of source) {
    counter.plainBytes += chunk.length;
    if (counter.plainBytes > maxBytes)
      throw new ForgeError("IMAGE_REFUSED", `the image unpacks to more than ${imageLimits.uncompressedBytes} bytes`);
    const isSuspect =
      counter.plainBytes > imageLimits.compressionFreeBytes && counter.plainBytes > counter.storedBytes * imageLimits.compressionRatio;
    if (isSuspect)
      throw new ForgeError(
        "IMAGE_REFUSED",
        `the layer ${digest} is a decompression bomb: more than ${imageLimits.compressionRatio} times its size`,
      );
    hash.update(chunk);
    await keep?.writeFile(chunk);
    yield chunk;
  }
}

/** Adds every entry of a tar to the tree. Reads to the end of the source even where the archive ends before. */
export async function readTar(source: AsyncIterable<Buffer>, tree: ImageTree): Promise<void> {
  const archive = extract();
  archive.on("entry", (header, content, next) => {
    content.on("error", () => undefined); // the archive reports the same error
    try {
      tree.add(entryOf(header));
    } catch (error) {
      return next(toForgeError(error));
    }
    content.on("end", () => next(null));
    content.resume();
  });
  const finished = new Promise<void>((resolve, reject) => archive.once("finish", resolve).once("error", reject));
  finished.catch(() => undefined); // also seen by the race below
  let failed = false;
  archive.on("error", () => (failed = true));
  for await (const chunk of source) {
    if (!archive.write(chunk)) await Promise.race([once(archive, "drain"), finished]);
    if (failed) break;
  }
  if (!failed) archive.end(undefined);
  await finished;
}

/** The types Forge takes. GNU sparse files, multi-volume parts and contiguous files are of no use in an image. */
const entryTypes = new Set<string>([
  "file",
  "directory",
  "symlink",
  "link",
  "character-device",
  "block-device",
  "fifo",
] satisfies EntryType[]);
const xattrPrefix = "SCHILY.xattr.";

function entryOf(header: Header): LayerEntry {
  const pax = (header.pax ?? {}) as Readonly<Record<string, string>>;
  const type: string = header.type ?? "unknown";
  // The reader gives null for a size it cannot decode, and would then wait for ever.
  if (typeof header.size !== "number") throw refused(header.name, "an unreadable size");
  if (!entryTypes.has(type)) throw refused(header.name, `an entry of the type ${type}`);
  const mtimeSeconds = paxNumber(pax["mtime"]) ?? header.mtime.getTime() / 1000;
  const isDevice = type === "character-device" || type === "block-device";
  const xattrs = new Map<string, number>();
  let paxBytes = 0;
  for (const [key, value] of Object.entries(pax)) {
    paxBytes += Buffer.byteLength(key) + Buffer.byteLength(value);
    if (paxBytes > imageLimits.paxBytes) throw refused(header.name, "an absurd pax header");
    if (key.startsWith("GNU.sparse.")) throw refused(header.name, "a sparse file");
    if (key.startsWith("LIBARCHIVE.xattr.")) throw refused(header.name, "extended attributes in a form that is not read back (LIBARCHIVE)");
    if (key.startsWith(xattrPrefix)) xattrs.set(key.slice(xattrPrefix.length), Buffer.byteLength(value));
  }
  return {
    name: header.name,
    type: type as EntryType,
    linkName: header.linkname ?? "",
    mode: header.mode & 0o7777,
    uid: paxNumber(pax["uid"]) ?? header.uid,
    gid: paxNumber(pax["gid"]) ?? header.gid,
    sizeBytes: header.size,
    mtimeSeconds: Number.isFinite(mtimeSeconds) ? mtimeSeconds : 0,
    deviceMajor: isDevice ? header.devmajor : 0,
    deviceMinor: isDevice ? header.devminor : 0,
    xattrs,
  };
}

function paxNumber(text: string | undefined): number | undefined {
  return text === undefined || text === "" ? undefined : Number(text);
}

/** A layer that cannot be read may simply not be what was stored: that is the better answer then. */
async function explain(error: unknown, layer: ImageLayer, store: ImageStore): Promise<ForgeError> {
  const { digest } = layer.descriptor;
  const known = toForgeError(error);
  if (known.code === "DISK_FULL" || known.code === "IMAGE_NOT_FOUND") return known;
  const hash = createHash("sha256");
  for await (const chunk of (await store.openBlob(digest)) as AsyncIterable<Buffer>) hash.update(chunk);
  if (`sha256:${hash.digest("hex")}` !== digest) return changed(digest);
  if (error instanceof ForgeError) return error;
  return new ForgeError("IMAGE_REFUSED", `the layer ${digest} is not a readable archive: ${known.message.slice(0, 200)}`, { cause: error });
}

function changed(digest: string): ForgeError {
  return new ForgeError("IMAGE_CORRUPT", `the blob ${digest} changed on disk`);
}
