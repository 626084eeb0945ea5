import { mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Readable } from "node:stream";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { digestOf, ImageStore } from "./store.ts";

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-store-"));
});
afterEach(async () => {
  await rm(folder, { recursive: true, force: true });
});

const bytes = Buffer.from("some bytes");
const digest = digestOf(bytes);
const limits = { maxBytes: 1000 };
const stream = (content: Buffer): Readable => Readable.from([content.subarray(0, 3), content.subarray(3)]);

describe("the blob store", () => {
  test("gives back what it was given", async () => {
    const store = await ImageStore.open(folder);
    expect(await store.hasBlob(digest)).toBe(false);
    expect(await store.putBlob(digest, stream(bytes), limits)).toBe(bytes.length);
    expect(await store.readBlob(digest)).toEqual(bytes);
    expect(await store.missing([digest, digestOf(Buffer.from("x")), digest])).toEqual([digestOf(Buffer.from("x"))]);
    expect(Buffer.concat(await (await store.openBlob(digest)).toArray())).toEqual(bytes);
  });

  test("refuses other bytes, too many bytes, and leaves nothing of them", async () => {
    const store = await ImageStore.open(folder);
    await expect(store.putBlob(digest, stream(Buffer.from("other bytes")), limits)).rejects.toMatchObject({ code: "IMAGE_CORRUPT" });
    await expect(store.putBlob(digest, stream(bytes), { maxBytes: 5 })).rejects.toMatchObject({ code: "TOO_LARGE" });
    const broken = (async function* (): AsyncGenerator<Buffer> {
      yield bytes;
      throw new Error("the sender went away");
    })();
    await expect(store.putBlob(digest, broken, limits)).rejects.toMatchObject({ code: "INTERNAL" });
    expect(await store.hasBlob(digest)).toBe(false);
    expect(await readdir(join(folder, "incoming"))).toEqual([]);
  });

  test("takes the same blob twenty times at once", async () => {
    const store = await ImageStore.open(folder);
    await Promise.all(Array.from({ length: 20 }, () => store.putBlob(digest, stream(bytes), limits)));
    expect(await store.readBlob(digest)).toEqual(bytes);
    expect(await readdir(join(folder, "incoming"))).toEqual([]);
  });

  test("forgets what a crash left half-written", async () => {
    await ImageStore.open(folder);
    await writeFile(join(folder, "incoming", "left"), "half");
    await ImageStore.open(folder);
    expect(await readdir(join(folder, "incoming"))).toEqual([]);
  });

  test.each([
    "",
    "sha256:..",
    "sha256:../../../etc/passwd",
    `sha256:${"A".repeat(64)}`,
    `sha512:${"a".repeat(64)}`,
    `sha256:${"a".repeat(64)}\n`,
  ])("makes no path of %j", async (name) => {
    const store = await ImageStore.open(folder);
    await expect(store.hasBlob(name)).rejects.toMatchObject({ code: "INVALID_INPUT" });
  });

  test("notices a document that changed on disk", async () => {
    const store = await ImageStore.open(folder);
    await store.putDocument(digest, bytes);
    await rm(store.blobPath(digest));
    await writeFile(store.blobPath(digest), "changed");
    await expect(store.readBlob(digest)).rejects.toMatchObject({ code: "IMAGE_CORRUPT" });
  });
});
