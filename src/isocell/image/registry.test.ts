import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { run } from "../../base/exec.ts";
import { signatureTag } from "./attachment.ts";
import { makeLayout } from "./fixtures/layout.ts";
import { type LoopbackRegistry, startRegistry } from "./fixtures/registry.ts";
import { file, tar } from "./fixtures/tar.ts";
import { signImage } from "./layout.ts";
import type { RegistryReference } from "./reference.ts";
import { pull } from "./registry.ts";
import { generateSigningKey, verifySignatures } from "./signature.ts";
import { ImageStore } from "./store.ts";

const key = generateSigningKey();
let base: string;
let registry: LoopbackRegistry;
let store: ImageStore;
beforeAll(async () => {
  base = await mkdtemp(join(tmpdir(), "forge-pull-"));
  store = await ImageStore.open(join(base, "store"));
  registry = await startRegistry();
});
afterAll(async () => {
  await registry?.stop();
  await rm(base, { recursive: true, force: true });
});

const reference = (repository: string, more: Partial<RegistryReference> = {}): RegistryReference => ({
  kind: "registry",
  registry: registry.host,
  repository,
  tag: "v1",
  ...more,
});
const verify = async (image: { digest: string; signatures: Parameters<typeof verifySignatures>[1] }): Promise<void> => {
  verifySignatures(image.digest, image.signatures, [{ name: "team", publicKeyPem: key.publicKeyPem }]);
};

/** Makes an image, signs it where asked, and pushes both with skopeo, digests preserved. */
async function push(repository: string, content: string, signed: boolean): Promise<{ digest: string; layers: readonly string[] }> {
  const path = join(base, repository);
  const made = await makeLayout(path, [tar([file("content", content)])]);
  const copy = async (from: string, to: string): Promise<unknown> =>
    run("skopeo", [
      "--insecure-policy",
      "copy",
      "--quiet",
      "--preserve-digests",
      "--dest-tls-verify=false",
      `oci:${path}:${from}`,
      `docker://${registry.host}/${repository}:${to}`,
    ]);
  await copy("latest", "v1");
  if (signed) {
    await signImage({ kind: "folder", path }, await ImageStore.open(join(base, `${repository}-store`)), key.privateKeyPem);
    await copy(signatureTag(made.digest), signatureTag(made.digest));
  }
  return made;
}

describe("a registry", () => {
  test("tag -> digest, signature, decision, and only then the layers", async () => {
    const made = await push("good", "hello", true);
    let seen = "";
    const image = await pull(reference("good"), store, {
      insecureLoopback: true,
      verify: async (candidate) => {
        seen = candidate.digest;
        expect(await store.missing(made.layers)).toEqual(made.layers);
        await verify(candidate);
      },
    });
    expect(seen).toBe(made.digest);
    expect(image.digest).toBe(made.digest);
    expect((await store.readManifest(made.digest)).layers.map(({ descriptor }) => descriptor.digest)).toEqual(made.layers);
    expect(
      registry.requests().some((line) => line.startsWith("GET") && line.includes(made.layers[0] ?? "?")),
      "the log this suite rests on",
    ).toBe(true);
    expect(await pull(reference("good", { digest: made.digest }), store, { insecureLoopback: true, verify })).toEqual(image);
  });

  test("an unsigned image is refused before a layer is asked for", async () => {
    const made = await push("unsigned", "plain", false);
    await expect(pull(reference("unsigned"), store, { insecureLoopback: true, verify })).rejects.toMatchObject({ code: "IMAGE_UNSIGNED" });
    expect(await store.missing([made.digest, ...made.layers])).toEqual([made.digest, ...made.layers]);
    expect(registry.requests().filter((line) => line.startsWith("GET") && line.includes(made.layers[0] ?? "?"))).toEqual([]);
  });

  test("a tag that moved after signing has no signature of its own", async () => {
    await push("moved", "first", true);
    await push("moved", "second", false);
    await expect(pull(reference("moved"), store, { insecureLoopback: true, verify })).rejects.toMatchObject({ code: "IMAGE_UNSIGNED" });
  });

  test("a signature copied to another image's tag is a mismatch", async () => {
    const first = await push("copied", "one", true);
    const second = await makeLayout(join(base, "copied"), [tar([file("content", "two")])]);
    const docker = `docker://${registry.host}/copied`;
    await run("skopeo", [
      "--insecure-policy",
      "copy",
      "--quiet",
      "--dest-tls-verify=false",
      `oci:${join(base, "copied")}:latest`,
      `${docker}:v2`,
    ]);
    const tls = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    await run("skopeo", [
      "--insecure-policy",
      "copy",
      "--quiet",
      ...tls,
      `${docker}:${signatureTag(first.digest)}`,
      `${docker}:${signatureTag(second.digest)}`,
    ]);
    await expect(pull(reference("copied", { tag: "v2" }), store, { insecureLoopback: true, verify })).rejects.toMatchObject({
      code: "IMAGE_SIGNATURE_MISMATCH",
    });
  });

  test("what is not there, does not answer, or speaks no TLS is said", async () => {
    await push("there", "x", false);
    await expect(pull(reference("absent"), store, { insecureLoopback: true, verify })).rejects.toMatchObject({ code: "IMAGE_NOT_FOUND" });
    await expect(pull(reference("there", { tag: "v9" }), store, { insecureLoopback: true, verify })).rejects.toMatchObject({
      code: "IMAGE_NOT_FOUND",
    });
    await expect(pull(reference("there"), store, { verify })).rejects.toMatchObject({ code: "UNAVAILABLE" });
    const nobody = { ...reference("there"), registry: "127.0.0.1:1" };
    await expect(pull(nobody, store, { insecureLoopback: true, verify })).rejects.toMatchObject({ code: "UNAVAILABLE" });
  });

  test("what is signed here is a signature of cosign's form", async () => {
    const made = await push("form", "f", true);
    const raw = await run("skopeo", [
      "inspect",
      "--raw",
      "--tls-verify=false",
      `docker://${registry.host}/form:${signatureTag(made.digest)}`,
    ]);
    const captured = JSON.parse(await readFile(join(import.meta.dirname, "fixtures/cosign.json"), "utf8")) as {
      saved: { manifest: { layers: { mediaType: string; annotations: object }[] } };
    };
    const own = JSON.parse(raw) as typeof captured.saved.manifest;
    expect(own.layers.map(({ mediaType, annotations }) => [mediaType, Object.keys(annotations)])).toEqual(
      captured.saved.manifest.layers.map(({ mediaType, annotations }) => [mediaType, Object.keys(annotations)]),
    );
  });
});
