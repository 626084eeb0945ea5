import { join } from "node:path";
import { z } from "zod";
import { type ImageSignature, imageSignatureSchema } from "../../api/resources.ts";
import { makeDirectory, readIfExists, writeDurable } from "../../base/durable.ts";
import { ForgeError } from "../../base/errors.ts";
import { type Descriptor, type ImageIndex, mediaTypes, parseDocument, parseIndex } from "./manifest.ts";
import { digestOf, hexOf } from "./store.ts";

/**
 * How cosign attaches signatures to an image: a second manifest under the tag `sha256-<hex>.sig`, whose layers are the
 * signed payloads, each with its signature as an annotation.
 * https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md
 */

export const maximumSignatures = 16;
export const maximumSignatureBytes = 48 * 1024;

const signatureAnnotation = "dev.cosignproject.cosign/signature";
const nameAnnotation = "org.opencontainers.image.ref.name";
/** What `cosign save` puts in a layout's index instead of a tag. */
const signaturesKind = "dev.cosignproject.cosign/sigs";

/** The tag under which signatures of a digest are found. */
export function signatureTag(digest: string): string {
  return `sha256-${hexOf(digest)}.sig`;
}

/**
 * Entries of a layout's index that hold signatures, those of this digest first. The others tell a tag that moved
 * after signing from an image that was never signed.
 */
export function findSignatureEntries(index: ImageIndex, digest: string): Descriptor[] {
  const named = (entry: Descriptor): string => entry.annotations?.[nameAnnotation] ?? "";
  const own = index.manifests.filter((entry) => named(entry) === signatureTag(digest));
  const other = index.manifests.filter(
    (entry) => !own.includes(entry) && (/^sha256-[0-9a-f]{64}\.sig$/.test(named(entry)) || entry.annotations?.["kind"] === signaturesKind),
  );
  return [...own, ...other];
}

/** The signatures a manifest holds; `readPayload` fetches a payload by digest. What is not a signature is passed over. */
export async function readSignatureManifest(
  bytes: Uint8Array,
  readPayload: (digest: string) => Promise<Buffer>,
): Promise<ImageSignature[]> {
  const document = parseDocument(bytes, "the signature manifest");
  if (document.kind === "index") return [];
  const signatures: ImageSignature[] = [];
  for (const layer of document.manifest.layers.slice(0, maximumSignatures)) {
    const signature = layer.annotations?.[signatureAnnotation];
    if (layer.mediaType !== mediaTypes.simpleSigning || signature === undefined || layer.size > maximumSignatureBytes) continue;
    const parsed = imageSignatureSchema.safeParse({ payload: (await readPayload(layer.digest)).toString("base64"), signature });
    if (parsed.success) signatures.push(parsed.data);
  }
  return signatures;
}

/** Adds a signature to a layout under the digest's tag, beside those that are there. */
export async function attachSignature(layout: string, digest: string, signature: ImageSignature): Promise<void> {
  const blobs = join(layout, "blobs", "sha256");
  await makeDirectory(blobs, 0o755);
  const put = async (bytes: Buffer, mediaType: string): Promise<Descriptor> => {
    const descriptor = { mediaType, digest: digestOf(bytes), size: bytes.length };
    await writeDurable(join(blobs, hexOf(descriptor.digest)), bytes, 0o644);
    return descriptor;
  };
  const index = await readRawIndex(layout);
  const present = index.manifests.find((entry) => entry.annotations?.[nameAnnotation] === signatureTag(digest));
  const earlier = present === undefined ? [] : await layersOf(join(blobs, hexOf(present.digest)));
  const payload = await put(Buffer.from(signature.payload, "base64"), mediaTypes.simpleSigning);
  const layers = [...earlier, { ...payload, annotations: { [signatureAnnotation]: signature.signature } }].slice(-maximumSignatures);
  const config = { architecture: "", os: "", config: {}, rootfs: { type: "layers", diff_ids: layers.map((layer) => layer.digest) } };
  const document = {
    schemaVersion: 2,
    mediaType: mediaTypes.ociManifest,
    config: await put(Buffer.from(JSON.stringify(config)), mediaTypes.ociConfig),
    layers,
  };
  const entry = {
    ...(await put(Buffer.from(JSON.stringify(document)), mediaTypes.ociManifest)),
    annotations: { [nameAnnotation]: signatureTag(digest) },
  };
  const manifests = [...index.manifests.filter((other) => other !== present), entry];
  await writeDurable(join(layout, "index.json"), JSON.stringify({ ...index, manifests }), 0o644);
}

/** Members Forge does not know must survive the rewrite. */
const rawIndexSchema = z.looseObject({
  manifests: z.array(z.looseObject({ digest: z.string(), annotations: z.record(z.string(), z.string()).optional() })),
});

async function readRawIndex(layout: string): Promise<z.infer<typeof rawIndexSchema>> {
  const bytes = await readIfExists(join(layout, "index.json"));
  if (bytes === undefined) throw new ForgeError("IMAGE_NOT_FOUND", `${layout} is no OCI image layout: it has no index.json`);
  parseIndex(bytes, "index.json");
  return rawIndexSchema.parse(JSON.parse(bytes.toString()));
}

async function layersOf(path: string): Promise<Descriptor[]> {
  const bytes = await readIfExists(path);
  if (bytes === undefined) return [];
  const document = parseDocument(bytes, "the signature manifest");
  return document.kind === "index" ? [] : document.manifest.layers;
}
