import type { ImageSignature } from "../../api/resources.ts";
import { ForgeError } from "../../base/errors.ts";
import type { LocalReference } from "./reference.ts";
import type { ImageStore } from "./store.ts";

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
  throw new ForgeError("INTERNAL", `not written yet: ${reference.path} ${store.folder}`);
}

/** Signs what the reference resolves to, and keeps the signature beside it: in the layout, or as `<archive>.sig.json`. */
export async function signImage(reference: LocalReference, store: ImageStore, privateKeyPem: string): Promise<ResolvedImage> {
  throw new ForgeError("INTERNAL", `not written yet: ${reference.path} ${store.folder} ${privateKeyPem.length}`);
}

/** Every blob a digest needs on the other side, the small documents last, so that a manifest never precedes its parts. */
export async function pushPlan(digest: string, store: ImageStore): Promise<BlobToPush[]> {
  throw new ForgeError("INTERNAL", `not written yet: ${digest} ${store.folder}`);
}
