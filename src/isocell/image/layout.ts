import { createReadStream } from "node:fs";
import { open, stat } from "node:fs/promises";
import { basename, join } from "node:path";
import { extract, type Header } from "tar-stream";
import { z } from "zod";
import { type ImageSignature, imageSignatureSchema } from "../../api/resources.ts";
import { readIfExists, writeDurable } from "../../base/durable.ts";
import { errnoOf, ForgeError, toForgeError } from "../../base/errors.ts";
import { decompress } from "./layers.ts";
import { type Descriptor, type ImageIndex, maximumDocumentBytes, parseDocument, parseIndex, selectPlatform } from "./manifest.ts";
import type { ArchiveReference, LocalReference } from "./reference.ts";
import { attachSignature, findSignatureEntries, maximumSignatureBytes, maximumSignatures, readSignatureManifest } from "./attachment.ts";
import { signDigest } from "./signature.ts";
import { copyToFolder } from "./skopeo.ts";
import { digestOf, hexOf, type ImageStore, maximumBlobBytes } from "./store.ts";

/** An image by its digest, with every signature found beside it, not yet judged. */
export interface ResolvedImage {
  readonly digest: string;
  readonly signatures: readonly ImageSignature[];
}

/** One blob of an image, to be uploaded. */
export interface BlobToPush {
  readonly digest: string;
  readonly sizeBytes: number;
  readonly path: string;
}

/** Brings a folder's or an archive's image into the store, each blob checked, and finds its signatures. Nothing is unpacked. */
export async function normalise(reference: LocalReference, store: ImageStore): Promise<ResolvedImage> {
  await requireExists(reference);
  if (reference.kind === "folder") return importLayout(await folderBlobs(reference.path), reference, store);
  const image =
    reference.kind === "oci-archive"
      ? await importLayout(await archiveBlobs(reference.path, store), reference, store)
      : await importDockerArchive(reference, store);
  return { digest: image.digest, signatures: [...(await readSidecar(reference.path)), ...image.signatures].slice(0, maximumSignatures) };
}

/** Signs what the reference resolves to, and keeps the signature beside it: in the layout, or as `<archive>.sig.json`. */
export async function signImage(reference: LocalReference, store: ImageStore, privateKeyPem: string): Promise<ResolvedImage> {
  const { digest } = await normalise(reference, store);
  const signature = signDigest(digest, basename(reference.path), privateKeyPem);
  if (reference.kind === "folder") await attachSignature(reference.path, digest, signature);
  else {
    const signatures = [...(await readSidecar(reference.path)), signature].slice(-maximumSignatures);
    await writeDurable(sidecarOf(reference.path), `${JSON.stringify({ signatures }, undefined, 2)}\n`, 0o644);
  }
  return normalise(reference, store);
}

/** Every blob a digest needs on the other side, the documents last, so that a manifest never precedes its parts. */
export async function pushPlan(digest: string, store: ImageStore): Promise<BlobToPush[]> {
  const { manifestDigest, configDescriptor, layers } = await store.readManifest(digest);
  const digests = new Set([...layers.map(({ descriptor }) => descriptor.digest), configDescriptor.digest, manifestDigest, digest]);
  return Promise.all(
    [...digests].map(async (each) => ({ digest: each, sizeBytes: (await store.blobSize(each)) ?? 0, path: store.blobPath(each) })),
  );
}

/** Where the blobs of a layout lie: its folder, or the store that its archive was read into. */
interface LayoutBlobs {
  readonly index: ImageIndex;
  readonly pathOf: (digest: string) => string;
}

async function importLayout(blobs: LayoutBlobs, reference: LocalReference, store: ImageStore): Promise<ResolvedImage> {
  const entry = selectEntry(blobs.index, reference);
  const document = parseDocument(await importDocument(entry.digest, blobs, store), `the document ${entry.digest}`);
  const manifestDigest = document.kind === "manifest" ? entry.digest : selectPlatform(document.index, `the index ${entry.digest}`).digest;
  const child =
    document.kind === "manifest"
      ? document
      : parseDocument(await importDocument(manifestDigest, blobs, store), `the manifest ${manifestDigest}`);
  if (child.kind === "index") throw new ForgeError("IMAGE_REFUSED", `the manifest ${manifestDigest} is an index inside an index`);
  for (const { digest } of [child.manifest.config, ...child.manifest.layers])
    await importBlob(digest, blobs.pathOf(digest), store, maximumBlobBytes);
  await store.readManifest(entry.digest);
  return { digest: entry.digest, signatures: await readLayoutSignatures(entry.digest, blobs) };
}

async function importDocument(digest: string, blobs: LayoutBlobs, store: ImageStore): Promise<Buffer> {
  await importBlob(digest, blobs.pathOf(digest), store, maximumDocumentBytes);
  return store.readBlob(digest);
}

/** Reads the source to its end also when the store has the blob: a changed layout must not pass because of an older one. */
async function importBlob(digest: string, path: string, store: ImageStore, maxBytes: number): Promise<void> {
  if (path === store.blobPath(digest)) return; // hashed on its way in from the archive
  try {
    const source = (await open(path, "r")).createReadStream({ highWaterMark: 256 * 1024 });
    await store.putBlob(digest, source as AsyncIterable<Buffer>, { maxBytes });
  } catch (error) {
    if (errnoOf(error) === "ENOENT") throw new ForgeError("IMAGE_CORRUPT", `the layout lacks the blob ${digest}`);
    if (error instanceof ForgeError && error.code === "IMAGE_CORRUPT") {
      throw new ForgeError(error.code, error.message, { details: { digest, path } });
    }
    throw error;
  }
}

async function readLayoutSignatures(digest: string, blobs: LayoutBlobs): Promise<ImageSignature[]> {
  const read = (blob: string, maxBytes: number): Promise<Buffer> => readChecked(blobs.pathOf(blob), blob, maxBytes);
  const signatures: ImageSignature[] = [];
  for (const entry of findSignatureEntries(blobs.index, digest)) {
    if (signatures.length >= maximumSignatures) break;
    signatures.push(
      ...(await readSignatureManifest(await read(entry.digest, maximumDocumentBytes), (blob) => read(blob, maximumSignatureBytes))),
    );
  }
  return signatures.slice(0, maximumSignatures);
}

async function readChecked(path: string, digest: string, maxBytes: number): Promise<Buffer> {
  const bytes = await readBounded(path, maxBytes);
  if (bytes === undefined) throw new ForgeError("IMAGE_CORRUPT", `the layout lacks the blob ${digest}`);
  if (digestOf(bytes) !== digest) throw new ForgeError("IMAGE_CORRUPT", `the bytes of ${digest} are not what it says`);
  return bytes;
}

/** The entry the reference means: by tag, or the only image there is. */
function selectEntry(index: ImageIndex, reference: LocalReference): Descriptor {
  const images = index.manifests.filter((entry) => !isAttachment(entry));
  const { tag } = reference;
  const found = tag === undefined ? images : images.filter((entry) => nameOf(entry) === tag || nameOf(entry)?.endsWith(`:${tag}`));
  const first = found[0];
  if (first === undefined)
    throw new ForgeError("IMAGE_NOT_FOUND", `${reference.path} holds no image${tag === undefined ? "" : ` with the tag ${tag}`}`);
  if (found.some(({ digest }) => digest !== first.digest)) {
    throw new ForgeError("INVALID_INPUT", `${reference.path} holds several images: name one by its tag, as oci:PATH:TAG`);
  }
  return first;
}

/** Signatures, attestations and the like, which share the index with images. */
function isAttachment(entry: Descriptor): boolean {
  const kind = entry.annotations?.["kind"] ?? "";
  return (
    /^sha256-[0-9a-f]{64}\.[a-z]+$/.test(nameOf(entry) ?? "") ||
    /^dev\.cosignproject\.cosign\/(?!image)/.test(kind) ||
    entry.annotations?.["vnd.docker.reference.type"] !== undefined
  );
}

function nameOf(entry: Descriptor): string | undefined {
  return entry.annotations?.["org.opencontainers.image.ref.name"];
}

async function folderBlobs(path: string): Promise<LayoutBlobs> {
  const index = await readBounded(join(path, "index.json"), maximumDocumentBytes);
  if (index === undefined) throw new ForgeError("IMAGE_NOT_FOUND", `${path} is no OCI image layout: it has no index.json`);
  return { index: parseIndex(index, "index.json"), pathOf: (digest) => join(path, "blobs", "sha256", hexOf(digest)) };
}

/** Reads the archive once, straight into the store. */
async function archiveBlobs(path: string, store: ImageStore): Promise<LayoutBlobs> {
  let index: Buffer | undefined;
  await readArchive(path, async ({ name, type }, content) => {
    const file = name.replace(/^\.\//, "");
    const blob = /^blobs\/sha256\/([0-9a-f]{64})$/.exec(file)?.[1];
    if (type === "file" && blob !== undefined) await store.putBlob(`sha256:${blob}`, content, { maxBytes: maximumBlobBytes });
    else if (type === "file" && file === "index.json") index = await collect(content, "index.json");
  });
  if (index === undefined) throw new ForgeError("IMAGE_NOT_FOUND", `${path} is no OCI archive: it has no index.json`);
  return { index: parseIndex(index, "index.json"), pathOf: (digest) => store.blobPath(digest) };
}

const dockerManifestSchema = z.array(z.object({ RepoTags: z.array(z.string()).nullish() })).max(4096);

/** `docker save` archives have no manifest; skopeo makes one that names the layers as they lie there, so the digest is stable. */
async function importDockerArchive(reference: ArchiveReference, store: ImageStore): Promise<ResolvedImage> {
  const position = await positionInDockerArchive(reference);
  return store.withTemporary(async (folder) => ({
    digest: await copyToFolder(`docker-archive:${reference.path}:@${position}`, folder, store),
    signatures: [],
  }));
}

async function positionInDockerArchive({ path, tag }: ArchiveReference): Promise<number> {
  let document: Buffer | undefined;
  await readArchive(path, async ({ name }, content) => {
    if (name === "manifest.json") document = await collect(content, name);
  });
  if (document === undefined) throw new ForgeError("IMAGE_NOT_FOUND", `${path} is no docker archive: it has no manifest.json`);
  const images = parseDockerManifest(document);
  const found = tag === undefined ? 0 : images.findIndex(({ RepoTags }) => RepoTags?.some((name) => name.endsWith(`:${tag}`)) === true);
  if (images.length === 0 || found === -1)
    throw new ForgeError("IMAGE_NOT_FOUND", `${path} holds no image${tag === undefined ? "" : ` with the tag ${tag}`}`);
  if (tag === undefined && images.length > 1)
    throw new ForgeError("INVALID_INPUT", `${path} holds several images: name one by its tag, as docker-archive:PATH:TAG`);
  return found;
}

function parseDockerManifest(document: Buffer): z.infer<typeof dockerManifestSchema> {
  try {
    return dockerManifestSchema.parse(JSON.parse(document.toString()));
  } catch {
    throw new ForgeError("IMAGE_CORRUPT", "the archive's manifest.json is malformed");
  }
}

/** Shows each entry of a tar, plain or compressed, to `onEntry`; what that does not read is skipped. */
async function readArchive(path: string, onEntry: (header: Header, content: AsyncIterable<Buffer>) => Promise<void>): Promise<void> {
  const archive = extract();
  const source = decompress(createReadStream(path, { highWaterMark: 256 * 1024 }) as AsyncIterable<Buffer>);
  const feeding = feed(source, archive);
  feeding.catch((error: unknown) => archive.destroy(toForgeError(error)));
  try {
    for await (const entry of archive) {
      await onEntry(entry.header, entry as AsyncIterable<Buffer>);
      entry.resume();
    }
    await feeding;
  } catch (error) {
    if (error instanceof ForgeError && error.code !== "INTERNAL") throw error;
    throw new ForgeError("IMAGE_CORRUPT", `${path} is not a readable archive: ${toForgeError(error).message.slice(0, 200)}`, {
      cause: error,
    });
  }
}

/** Writes a source into an archive reader, at the reader's pace. */
async function feed(source: AsyncIterable<Buffer>, archive: ReturnType<typeof extract>): Promise<void> {
  const closed = new Promise<void>((resolve) => archive.once("close", resolve));
  for await (const chunk of source) {
    if (archive.destroyed) return;
    if (!archive.write(chunk)) await Promise.race([new Promise<void>((resolve) => archive.once("drain", resolve)), closed]);
  }
  archive.end(undefined);
}

async function collect(content: AsyncIterable<Buffer>, name: string): Promise<Buffer> {
  const chunks: Buffer[] = [];
  let sizeBytes = 0;
  for await (const chunk of content) {
    sizeBytes += chunk.length;
    if (sizeBytes > maximumDocumentBytes) throw new ForgeError("IMAGE_REFUSED", `${name} is larger than ${maximumDocumentBytes} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

const sidecarSchema = z.strictObject({ signatures: z.array(imageSignatureSchema).max(maximumSignatures) });

/** Signatures of an archive, which cannot be written into: a JSON file beside it. */
async function readSidecar(path: string): Promise<ImageSignature[]> {
  const bytes = await readBounded(sidecarOf(path), maximumDocumentBytes);
  if (bytes === undefined) return [];
  try {
    return sidecarSchema.parse(JSON.parse(bytes.toString())).signatures;
  } catch {
    throw new ForgeError("INVALID_INPUT", `${sidecarOf(path)} is malformed: it must be {"signatures": [{"payload", "signature"}]}`);
  }
}

function sidecarOf(path: string): string {
  return `${path}.sig.json`;
}

async function readBounded(path: string, maxBytes: number): Promise<Buffer | undefined> {
  const { size } = await stat(path).catch((error: unknown) => {
    if (errnoOf(error) === "ENOENT") return { size: 0 };
    throw error;
  });
  if (size > maxBytes) throw new ForgeError("IMAGE_REFUSED", `${path} is larger than ${maxBytes} bytes`);
  return readIfExists(path);
}

async function requireExists(reference: LocalReference): Promise<void> {
  try {
    const { isDirectory } = await stat(reference.path).then((stats) => ({ isDirectory: stats.isDirectory() }));
    if (isDirectory !== (reference.kind === "folder"))
      throw new ForgeError("IMAGE_NOT_FOUND", `${reference.path} is ${isDirectory ? "a folder, not an archive" : "no folder"}`);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") throw new ForgeError("IMAGE_NOT_FOUND", `there is no ${reference.path}`);
    throw error;
  }
}
