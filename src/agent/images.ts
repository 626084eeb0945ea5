import type { CellAssignment } from "../api/node.ts";
import { ImageStore, maximumBlobBytes, type RootfsArtifact, RootfsCache, verifySignatures } from "../isocell/image/index.ts";
import type { ControlLink } from "./control-link.ts";

/** The node's images: verified here once more, fetched by digest, built once. */
export class NodeImages {
  readonly #store: ImageStore;
  readonly rootfs: RootfsCache;
  readonly #link: ControlLink;

  private constructor(store: ImageStore, rootfs: RootfsCache, link: ControlLink) {
    this.#store = store;
    this.rootfs = rootfs;
    this.#link = link;
  }

  static async open(folder: string, link: ControlLink): Promise<NodeImages> {
    const store = await ImageStore.open(`${folder}/images`);
    return new NodeImages(store, await RootfsCache.open(`${folder}/rootfs`, store), link);
  }

  /**
   * A bootable root for the assignment's image. The signature is checked before a byte of the image is fetched: the
   * control plane's word is not enough. Refusals are the IMAGE_… codes.
   */
  async prepare(image: CellAssignment["image"], signal: AbortSignal): Promise<RootfsArtifact> {
    const trusted = image.trustedKeysPem.map((publicKeyPem, index) => ({ name: `key-${index + 1}`, publicKeyPem }));
    verifySignatures(image.digest, image.signatures, trusted);
    const cached = await this.rootfs.lookup(image.digest);
    if (cached !== undefined) return cached;
    await this.#fetch(image.digest, signal);
    return this.rootfs.prepare(image.digest);
  }

  async #fetch(digest: string, signal: AbortSignal): Promise<void> {
    await this.#fetchBlob(digest, signal);
    const manifestDigest = await this.#store.resolvePlatform(digest);
    await this.#fetchBlob(manifestDigest, signal);
    for (const blob of await this.#store.references(manifestDigest)) await this.#fetchBlob(blob, signal);
  }

  async #fetchBlob(digest: string, signal: AbortSignal): Promise<void> {
    if (await this.#store.hasBlob(digest)) return;
    await this.#store.putBlob(digest, await this.#link.blob(digest, signal), { maxBytes: maximumBlobBytes });
  }
}
