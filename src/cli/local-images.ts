import { createReadStream } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { join } from "node:path";
import type { Image, ImageSignature } from "../api/resources.ts";
import { makeDirectory } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import { formatImageReference, ImageStore, type LocalReference, normalise, pushPlan } from "../isocell/image/index.ts";
import type { Connection, ForgeHome } from "./context.ts";

const maximumFindBlobs = 512;

/** An image of this machine, its blobs checked and at hand. */
export interface LocalImage {
  readonly reference: LocalReference;
  readonly store: ImageStore;
  readonly digest: string;
  readonly signatures: readonly ImageSignature[];
}

export type UploadProgress = (sentBytes: number, totalBytes: number) => void;

/** Runs `work` with the image in a store of its own, which goes afterwards: the region keeps images, the CLI does not. */
export async function withLocalImage<T>(home: ForgeHome, reference: LocalReference, work: (image: LocalImage) => Promise<T>): Promise<T> {
  return withStore(home, async (store) => work({ reference, store, ...(await normalise(reference, store)) }));
}

export async function withStore<T>(home: ForgeHome, work: (store: ImageStore) => Promise<T>): Promise<T> {
  await makeDirectory(home.path("tmp"), 0o700);
  const folder = await mkdtemp(join(home.path("tmp"), "images-"));
  try {
    return await work(await ImageStore.open(folder));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/**
 * Like `withLocalImage`, for an image that is meant for the region. A blob that is not what its digest says is sent all the
 * same: the region refuses it too, and so the attempt is on record.
 */
export async function withOfferedImage<T>(
  home: ForgeHome,
  api: Connection,
  reference: LocalReference,
  work: (image: LocalImage) => Promise<T>,
): Promise<T> {
  return withLocalImage(home, reference, work).catch(async (error: unknown) => {
    const { digest, path } = error instanceof ForgeError && error.code === "IMAGE_CORRUPT" ? (error.details ?? {}) : {};
    if (typeof digest === "string" && typeof path === "string") await api.upload("putBlob", { params: { digest } }, createReadStream(path));
    throw error;
  });
}

/** Sends the blobs the region lacks, then asks it to admit the image. */
export async function uploadImage(api: Connection, image: LocalImage, progress: UploadProgress): Promise<Image> {
  const blobs = await pushPlan(image.digest, image.store);
  const missing = new Set<string>();
  for (let start = 0; start < blobs.length; start += maximumFindBlobs) {
    const digests = blobs.slice(start, start + maximumFindBlobs).map(({ digest }) => digest);
    for (const digest of (await api.call("findBlobs", { body: { digests } })).missing) missing.add(digest);
  }
  const toSend = blobs.filter(({ digest }) => missing.has(digest));
  const totalBytes = toSend.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  let sentBytes = 0;
  for (const { digest, path } of toSend) {
    const counted = count(createReadStream(path, { highWaterMark: 256 * 1024 }), (bytes) => progress((sentBytes += bytes), totalBytes));
    await api.upload("putBlob", { params: { digest } }, counted);
  }
  const body = { digest: image.digest, reference: formatImageReference(image.reference), signatures: [...image.signatures] };
  return api.call("addImage", { body }, 600_000);
}

async function* count(source: AsyncIterable<Uint8Array>, report: (bytes: number) => void): AsyncGenerator<Uint8Array> {
  for await (const chunk of source) {
    yield chunk;
    report(chunk.length);
  }
}
