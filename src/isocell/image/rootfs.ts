import { z } from "zod";
import { digestSchema } from "../../api/resources.ts";
import { ForgeError } from "../../base/errors.ts";
import type { ImageStore } from "./store.ts";

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

export class RootfsCache {
  readonly folder: string;
  readonly #store: ImageStore;

  private constructor(folder: string, store: ImageStore) {
    this.folder = folder;
    this.#store = store;
  }

  static async open(folder: string, store: ImageStore): Promise<RootfsCache> {
    return new RootfsCache(folder, store);
  }

  /** The artifact for an image in the store; built once however often it is asked for at the same time. */
  async prepare(digest: string): Promise<RootfsArtifact> {
    throw new ForgeError("INTERNAL", `not written yet: ${digest} ${this.#store.folder}`);
  }

  /** Throws IMAGE_TAMPERED when the file is not what was sealed. Cheap (one stat) while nothing touched it. */
  async verifySealed(artifact: RootfsArtifact): Promise<void> {
    throw new ForgeError("INTERNAL", `not written yet: ${artifact.digest}`);
  }

  /** Forgets an image's artifact; a running cell keeps its open file. */
  async remove(digest: string): Promise<void> {
    throw new ForgeError("INTERNAL", `not written yet: ${digest}`);
  }
}
