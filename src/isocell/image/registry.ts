import { ForgeError } from "../../base/errors.ts";
import type { ResolvedImage } from "./layout.ts";
import type { RegistryReference } from "./reference.ts";
import type { ImageStore } from "./store.ts";

export interface PullOptions {
  /** Decides, by throwing, before any layer is fetched: verifySignatures against the tenant's keys, and the audit. */
  readonly verify: (image: ResolvedImage) => Promise<void>;
  /** Plain HTTP for a registry on a loopback address; never for another. */
  readonly insecureLoopback?: boolean;
}

/** Resolves tag -> digest, finds the signatures, lets the caller decide, and only then fetches the blobs by digest. */
export async function pull(reference: RegistryReference, store: ImageStore, options: PullOptions): Promise<ResolvedImage> {
  throw new ForgeError("INTERNAL", `not written yet: ${reference.repository} ${store.folder} ${String(options)}`);
}
