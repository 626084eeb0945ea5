import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { failureOf, TestControl, uploadImage } from "../../test/support/control.ts";
import { startPostgres, type TestPostgres } from "../../test/support/postgres.ts";
import type { ForgeClient } from "../api/client.ts";
import { digestOf, generateSigningKey, ImageStore, signDigest } from "../isocell/image/index.ts";
import { TenantBlobs } from "./blobs.ts";

let postgres: TestPostgres;
let plane: TestControl;
let tenantId: string;
let client: ForgeClient;
let stranger: ForgeClient;

beforeAll(async () => {
  postgres = await startPostgres();
  plane = await TestControl.start(await postgres.createDatabase());
  client = await plane.client();
  const other = await plane.addTenant("stranger");
  tenantId = other.tenantId;
  stranger = await plane.client(other.token);
}, 120_000);

afterAll(async () => {
  await plane?.stop();
  await postgres?.stop();
}, 60_000);

async function* bytesOf(...chunks: readonly Buffer[]): AsyncGenerator<Uint8Array> {
  yield* chunks;
}

describe("a tenant has only what it brought itself", () => {
  test("somebody else's blob looks as one that nobody has, and is stored again all the same", async () => {
    const blob = Buffer.from("some bytes");
    const digest = digestOf(blob);
    const missing = async (who: ForgeClient) => (await who.call("findBlobs", { body: { digests: [digest, digest] } })).missing;
    expect(await missing(client)).toEqual([digest]);
    for (const _ of ["once", "again"]) await client.upload("putBlob", { params: { digest } }, bytesOf(blob));
    expect(await missing(client)).toEqual([]);
    expect(await missing(stranger)).toEqual([digest]);
    await stranger.upload("putBlob", { params: { digest } }, bytesOf(blob));
    expect(await missing(stranger)).toEqual([]);
  });

  test("an image is not admitted by its digest, nor by its manifest alone", async () => {
    const key = generateSigningKey();
    await stranger.call("addTrustedKey", { body: { name: "key", publicKeyPem: key.publicKeyPem } });
    const digest = await uploadImage(client, "not yours");
    const body = { digest, reference: "test:1", signatures: [signDigest(digest, "test:1", key.privateKeyPem)] };
    expect(await failureOf(stranger.call("addImage", { body }))).toBe("IMAGE_NOT_FOUND");
    const manifest = await plane.control.images.readBlob(digest);
    await stranger.upload("putBlob", { params: { digest } }, bytesOf(manifest));
    expect(await failureOf(stranger.call("addImage", { body }))).toBe("IMAGE_NOT_FOUND");
    await uploadImage(stranger, "not yours");
    expect((await stranger.call("addImage", { body })).digest).toBe(digest);
  });
});

describe("the quota", () => {
  const kib = (fill: string): Buffer => Buffer.alloc(1024, fill);

  async function withQuota(work: (blobs: TenantBlobs, store: ImageStore) => Promise<void>): Promise<void> {
    const folder = await mkdtemp(join(tmpdir(), "forge-blobs-"));
    try {
      await plane.control.db.deleteFrom("tenant_blobs").where("tenant_id", "=", tenantId).execute();
      const store = await ImageStore.open(folder);
      await work(new TenantBlobs(plane.control.db, store, 3 * 1024), store);
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  }

  test("is met while the bytes come, and keeps nothing of what passes it", () =>
    withQuota(async (blobs, store) => {
      const put = (...chunks: readonly Buffer[]) => blobs.put(tenantId, digestOf(Buffer.concat(chunks)), bytesOf(...chunks));
      await put(kib("a"), kib("b"));
      await put(kib("a"), kib("b")); // twice is not more
      await expect(put(kib("c"), kib("d"))).rejects.toMatchObject({ code: "TOO_LARGE" });
      expect(await store.hasBlob(digestOf(Buffer.concat([kib("c"), kib("d")])))).toBe(false);
      await put(kib("c"));
      await expect(put(kib("d"))).rejects.toMatchObject({ code: "TOO_LARGE" });
      await expect(blobs.pull(tenantId, () => Promise.reject(new Error("never asked")))).rejects.toMatchObject({ code: "TOO_LARGE" });
    }));

  test("holds for uploads at the same time", () =>
    withQuota(async (blobs) => {
      const uploads = ["a", "b", "c", "d", "e"].map((fill) => blobs.put(tenantId, digestOf(kib(fill)), bytesOf(kib(fill))));
      const results = await Promise.allSettled(uploads);
      expect(results.filter(({ status }) => status === "fulfilled")).toHaveLength(3);
    }));
});
