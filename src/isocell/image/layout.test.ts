import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { run } from "../../base/exec.ts";
import { signatureTag } from "./attachment.ts";
import { makeLayout, writeIndex } from "./fixtures/layout.ts";
import { file, folder as directory, tar } from "./fixtures/tar.ts";
import { normalise, pushPlan, signImage } from "./layout.ts";
import { hostArchitecture } from "./manifest.ts";
import { parseImageReference, type LocalReference } from "./reference.ts";
import { generateSigningKey, verifySignatures } from "./signature.ts";
import { digestOf, ImageStore } from "./store.ts";

const key = generateSigningKey();
const trusted = [{ name: "team", publicKeyPem: key.publicKeyPem }];
const layer = tar([directory("etc/"), file("etc/motd", "one")]);
const otherLayer = tar([directory("etc/"), file("etc/motd", "two")]);

let base: string;
let store: ImageStore;
beforeEach(async () => {
  base = await mkdtemp(join(tmpdir(), "forge-layout-"));
  store = await ImageStore.open(join(base, "store"));
});
afterEach(async () => {
  await rm(base, { recursive: true, force: true });
});
const at = (text: string): LocalReference => parseImageReference(text, base) as LocalReference;

/** Flips one byte in the middle of a file. */
async function flip(path: string): Promise<void> {
  const bytes = await readFile(path);
  const middle = bytes.length >> 1;
  bytes[middle] = (bytes[middle] ?? 0) ^ 1;
  await writeFile(path, bytes);
}

describe("a layout's folder", () => {
  test("is brought into the store whole, with its config", async () => {
    const made = await makeLayout(join(base, "image"), [layer, otherLayer], {
      run: { User: "www", Env: ["A=b"], Cmd: ["x"], ExposedPorts: { "80/tcp": {} }, Entrypoint: null },
    });
    expect(await normalise(at("./image"), store)).toEqual({ digest: made.digest, signatures: [] });
    const manifest = await store.readManifest(made.digest);
    expect(manifest.config).toEqual({
      user: "www",
      env: ["A=b"],
      entrypoint: [],
      cmd: ["x"],
      workingDir: "",
      exposedPorts: ["80/tcp"],
      stopSignal: "",
    });
    const plan = await pushPlan(made.digest, store);
    expect(plan.map(({ digest }) => digest)).toEqual([...made.layers, made.config, made.digest]);
    expect(plan.every(({ sizeBytes, path }) => sizeBytes > 0 && path.startsWith(base))).toBe(true);
  });

  test("signed, its signature verifies; signing again adds to it", async () => {
    await makeLayout(join(base, "image"), [layer]);
    const other = generateSigningKey("ed25519");
    await signImage(at("./image"), store, other.privateKeyPem);
    const { digest, signatures } = await signImage(at("./image"), store, key.privateKeyPem);
    expect(signatures).toHaveLength(2);
    expect(verifySignatures(digest, signatures, trusted)).toEqual({ keyName: "team" });
    expect(verifySignatures(digest, signatures, [{ name: "other", publicKeyPem: other.publicKeyPem }])).toEqual({ keyName: "other" });
    expect(JSON.parse(await readFile(join(base, "image/index.json"), "utf8"))).toMatchObject({
      manifests: [{}, { annotations: { "org.opencontainers.image.ref.name": signatureTag(digest) } }],
    });
  });

  test("unsigned, re-tagged after signing, and byte-flipped: three refusals", async () => {
    const unsigned = await makeLayout(join(base, "image"), [layer]);
    const first = await normalise(at("./image"), store);
    expect(() => verifySignatures(first.digest, first.signatures, trusted)).toThrow(expect.objectContaining({ code: "IMAGE_UNSIGNED" }));

    await signImage(at("./image"), store, key.privateKeyPem);
    const index = JSON.parse(await readFile(join(base, "image/index.json"), "utf8")) as { manifests: object[] };
    await makeLayout(join(base, "image"), [otherLayer]); // the tag now means another image
    const moved = JSON.parse(await readFile(join(base, "image/index.json"), "utf8")) as { manifests: object[] };
    await writeIndex(join(base, "image"), [...moved.manifests, ...index.manifests.slice(1)]);
    const second = await normalise(at("./image"), store);
    expect(second.digest).not.toBe(unsigned.digest);
    expect(() => verifySignatures(second.digest, second.signatures, trusted)).toThrow(
      expect.objectContaining({ code: "IMAGE_SIGNATURE_MISMATCH" }),
    );

    for (const digest of [...unsigned.layers, unsigned.config, unsigned.digest]) {
      const again = await makeLayout(join(base, "flipped"), [layer]);
      await flip(join(base, "flipped/blobs/sha256", digest.slice(7)));
      await expect(normalise(at("./flipped"), store), "also where the store has the good bytes").rejects.toMatchObject({
        code: "IMAGE_CORRUPT",
      });
      expect(again.digest).toBe(unsigned.digest);
    }
  });

  test("an index chooses this machine's platform and keeps its own digest", async () => {
    const made = await makeLayout(join(base, "image"), [layer]);
    const size = (await readFile(join(base, "image/blobs/sha256", made.digest.slice(7)))).length;
    const entry = { mediaType: "application/vnd.oci.image.manifest.v1+json", digest: made.digest, size };
    const foreign = { ...entry, digest: `sha256:${"0".repeat(64)}`, platform: { os: "linux", architecture: "s390x" } };
    const nested = Buffer.from(
      JSON.stringify({ schemaVersion: 2, manifests: [foreign, { ...entry, platform: { os: "linux", architecture: hostArchitecture() } }] }),
    );
    await writeFile(join(base, "image/blobs/sha256", digestOf(nested).slice(7)), nested);
    await writeIndex(join(base, "image"), [
      { mediaType: "application/vnd.oci.image.index.v1+json", digest: digestOf(nested), size: nested.length },
    ]);
    const { digest } = await normalise(at("./image"), store);
    expect(digest).toBe(digestOf(nested));
    expect((await store.readManifest(digest)).manifestDigest).toBe(made.digest);
    expect((await pushPlan(digest, store)).at(-1)?.digest).toBe(digest);
  });

  test("what is missing or ambiguous is said", async () => {
    await expect(normalise(at("./absent"), store)).rejects.toMatchObject({ code: "IMAGE_NOT_FOUND" });
    await expect(normalise(at("."), store)).rejects.toMatchObject({ code: "IMAGE_NOT_FOUND" });
    await expect(normalise(at("oci-archive:."), store)).rejects.toMatchObject({ code: "IMAGE_NOT_FOUND" });
    const one = await makeLayout(join(base, "image"), [layer], { tag: "one" });
    const first = JSON.parse(await readFile(join(base, "image/index.json"), "utf8")) as { manifests: object[] };
    await makeLayout(join(base, "image"), [otherLayer], { tag: "two" });
    const second = JSON.parse(await readFile(join(base, "image/index.json"), "utf8")) as { manifests: object[] };
    await writeIndex(join(base, "image"), [...first.manifests, ...second.manifests]);
    await expect(normalise(at("./image"), store)).rejects.toMatchObject({ code: "INVALID_INPUT" });
    await expect(normalise(at("oci:./image:three"), store)).rejects.toMatchObject({ code: "IMAGE_NOT_FOUND" });
    expect((await normalise(at("oci:./image:one"), store)).digest).toBe(one.digest);
    await rm(join(base, "image/blobs/sha256", (one.layers[0] ?? "").slice(7)));
    await expect(normalise(at("oci:./image:one"), store)).rejects.toMatchObject({
      code: "IMAGE_CORRUPT",
      message: expect.stringContaining("lacks"),
    });
  });
});

describe("archives", () => {
  test("an OCI archive, plain or compressed, has the digest of its layout; a sidecar carries its signature", async () => {
    const made = await makeLayout(join(base, "image"), [layer]);
    await run("tar", ["-cf", join(base, "image.tar"), "-C", join(base, "image"), "."]);
    await writeFile(join(base, "image.tgz"), gzipSync(await readFile(join(base, "image.tar"))));
    for (const name of ["image.tar", "image.tgz"]) {
      expect(await normalise(at(`oci-archive:${name}`), store)).toEqual({ digest: made.digest, signatures: [] });
      const { digest, signatures } = await signImage(at(`oci-archive:${name}`), store, key.privateKeyPem);
      expect(verifySignatures(digest, signatures, trusted)).toEqual({ keyName: "team" });
    }
    await writeFile(join(base, "image.tar.sig.json"), "{}");
    await expect(normalise(at("oci-archive:image.tar"), store)).rejects.toMatchObject({ code: "INVALID_INPUT" });
  });

  test("a signature inside an OCI archive is found", async () => {
    await makeLayout(join(base, "image"), [layer]);
    await signImage(at("./image"), store, key.privateKeyPem);
    await run("tar", ["-cf", join(base, "image.tar"), "-C", join(base, "image"), "."]);
    const { digest, signatures } = await normalise(at("oci-archive:image.tar"), store);
    expect(verifySignatures(digest, signatures, trusted)).toEqual({ keyName: "team" });
  });

  test("a docker archive has the same digest each time, and its layers", async () => {
    await makeLayout(join(base, "image"), [layer, otherLayer]);
    await run("skopeo", [
      "--insecure-policy",
      "copy",
      "--quiet",
      `oci:${join(base, "image")}:latest`,
      `docker-archive:${join(base, "image.tar")}:example.org/app:v1`,
    ]);
    const first = await normalise(at("docker-archive:image.tar"), store);
    const again = await normalise(at("docker-archive:image.tar:v1"), await ImageStore.open(join(base, "other")));
    expect(again).toEqual(first);
    expect((await store.readManifest(first.digest)).layers).toHaveLength(2);
    await expect(normalise(at("docker-archive:image.tar:v2"), store)).rejects.toMatchObject({ code: "IMAGE_NOT_FOUND" });
  });

  test("corrupt archives are refused with a code", async () => {
    await makeLayout(join(base, "image"), [layer]);
    await run("tar", ["-cf", join(base, "image.tar"), "-C", join(base, "image"), "."]);
    const good = await readFile(join(base, "image.tar"));
    await writeFile(join(base, "cut.tar"), good.subarray(0, 1800));
    await writeFile(join(base, "noise.tar"), Buffer.from(Array.from({ length: 4000 }, (_, index) => (index * 31) % 253)));
    await writeFile(join(base, "empty.tar"), "");
    for (const name of ["cut.tar", "noise.tar", "empty.tar"]) {
      for (const kind of ["oci-archive", "docker-archive"]) {
        await expect(normalise(at(`${kind}:${name}`), store)).rejects.toMatchObject({
          code: expect.stringMatching(/^IMAGE_(CORRUPT|NOT_FOUND)$/),
        });
      }
    }
  });
});
