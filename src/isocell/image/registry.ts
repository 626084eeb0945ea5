import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { ImageSignature } from "../../api/resources.ts";
import { ForgeError } from "../../base/errors.ts";
import { maximumSignatureBytes, maximumSignatures, readSignatureManifest, signatureTag } from "./attachment.ts";
import type { ResolvedImage } from "./layout.ts";
import { parseDocument, selectPlatform } from "./manifest.ts";
import { formatImageReference, isLoopback, type RegistryReference } from "./reference.ts";
import { copyToFolder, inspectRaw } from "./skopeo.ts";
import { digestOf, type ImageStore, maximumBlobBytes } from "./store.ts";

export interface PullOptions {
  /** Decides, by throwing, before any layer is fetched: verifySignatures against the tenant's keys, and the audit. */
  readonly verify: (image: ResolvedImage) => Promise<void>;
  /** Plain HTTP for a registry on a loopback address; never for another. */
  readonly insecureLoopback?: boolean;
}

/** Resolves tag -> digest, finds the signatures, lets the caller decide, and only then fetches the blobs by digest. */
export async function pull(reference: RegistryReference, store: ImageStore, options: PullOptions): Promise<ResolvedImage> {
  const plainHttp = options.insecureLoopback === true && isLoopback(reference);
  const repository = `docker://${reference.registry}/${reference.repository}`;
  const document = await inspectRaw(`${repository}${selector(reference)}`, plainHttp);
  if (document === undefined) throw new ForgeError("IMAGE_NOT_FOUND", `the registry has no ${formatImageReference(reference)}`);
  const digest = digestOf(document);
  if (reference.digest !== undefined && reference.digest !== digest)
    throw new ForgeError("IMAGE_CORRUPT", `the registry answered ${digest} when asked for ${reference.digest}`);

  const image = { digest, signatures: await fetchSignatures(repository, digest, store, plainHttp) };
  await options.verify(image);

  await fetchImage(repository, document, digest, store, plainHttp);
  return image;
}

/** A digest, where there is one, is what counts. */
function selector({ tag, digest }: RegistryReference): string {
  return digest === undefined ? `:${tag ?? "latest"}` : `@${digest}`;
}

async function fetchSignatures(repository: string, digest: string, store: ImageStore, plainHttp: boolean): Promise<ImageSignature[]> {
  const source = `${repository}:${signatureTag(digest)}`;
  const bytes = await inspectRaw(source, plainHttp);
  if (bytes === undefined) return [];
  const document = parseDocument(bytes, "the signature manifest");
  if (document.kind === "index") return [];
  const blobs = [document.manifest.config, ...document.manifest.layers];
  if (blobs.length > maximumSignatures + 1 || blobs.some(({ size }) => size > maximumSignatureBytes)) {
    throw new ForgeError(
      "IMAGE_REFUSED",
      `${signatureTag(digest)} holds more than ${maximumSignatures} signatures or one of more than ${maximumSignatureBytes} bytes`,
    );
  }
  return store.withTemporary(async (folder) => {
    const copied = await copyToFolder(`${repository}@${digestOf(bytes)}`, folder, store, plainHttp);
    if (copied !== digestOf(bytes)) throw new ForgeError("IMAGE_CORRUPT", "the registry changed its answer about the signatures");
    return readSignatureManifest(await readFile(join(folder, "image", "manifest.json")), (blob) =>
      store.readBlob(blob, maximumSignatureBytes),
    );
  });
}

async function fetchImage(repository: string, document: Buffer, digest: string, store: ImageStore, plainHttp: boolean): Promise<void> {
  const parsed = parseDocument(document, `the document ${digest}`);
  const manifestDigest = parsed.kind === "manifest" ? digest : selectPlatform(parsed.index, `the index ${digest}`).digest;
  if (parsed.kind === "manifest" && parsed.manifest.layers.reduce((sum, { size }) => sum + size, 0) > maximumBlobBytes) {
    throw new ForgeError("IMAGE_REFUSED", `the image ${digest} is larger than ${maximumBlobBytes} bytes`);
  }
  await store.withTemporary(async (folder) => {
    const copied = await copyToFolder(`${repository}@${manifestDigest}`, folder, store, plainHttp);
    if (copied !== manifestDigest)
      throw new ForgeError("IMAGE_CORRUPT", `the registry answered ${copied} when asked for ${manifestDigest}`);
  });
  await store.putDocument(digest, document);
  await store.readManifest(digest);
}
