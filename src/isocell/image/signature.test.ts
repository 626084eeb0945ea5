import { generateKeyPairSync, sign } from "node:crypto";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { ForgeError } from "../../base/errors.ts";
import { findSignatureEntries, readSignatureManifest } from "./attachment.ts";
import cosign from "./fixtures/cosign.json" with { type: "json" };
import { parseIndex } from "./manifest.ts";
import { describePublicKey, generateSigningKey, publicKeyOf, signDigest, verifySignatures } from "./signature.ts";

const digest = `sha256:${"12".repeat(32)}`;
const otherDigest = `sha256:${"34".repeat(32)}`;
const keys = { "ecdsa-p256": generateSigningKey("ecdsa-p256"), ed25519: generateSigningKey("ed25519") };
const trusted = (...names: (keyof typeof keys)[]): { name: string; publicKeyPem: string }[] =>
  names.map((name) => ({ name, publicKeyPem: keys[name].publicKeyPem }));
const codeOf = (action: () => unknown): string => {
  try {
    action();
  } catch (error) {
    if (error instanceof ForgeError) return error.code;
    throw error;
  }
  return "accepted";
};

describe("signatures", () => {
  test.each(["ecdsa-p256", "ed25519"] as const)("%s: signed here, accepted here, by the key's name", (type) => {
    const signature = signDigest(digest, "web", keys[type].privateKeyPem);
    expect(verifySignatures(digest, [signature], trusted("ecdsa-p256", "ed25519"))).toEqual({ keyName: type });
  });

  test("three different refusals", () => {
    const signature = signDigest(digest, "web", keys.ed25519.privateKeyPem);
    expect(codeOf(() => verifySignatures(digest, [], trusted("ed25519")))).toBe("IMAGE_UNSIGNED");
    expect(codeOf(() => verifySignatures(digest, [signature], trusted("ecdsa-p256")))).toBe("IMAGE_SIGNATURE_UNTRUSTED");
    expect(codeOf(() => verifySignatures(digest, [signature], []))).toBe("IMAGE_SIGNATURE_UNTRUSTED");
    expect(codeOf(() => verifySignatures(otherDigest, [signature], trusted("ed25519")))).toBe("IMAGE_SIGNATURE_MISMATCH");
  });

  test("one good signature among others is enough", () => {
    const good = signDigest(digest, "web", keys.ed25519.privateKeyPem);
    const stale = signDigest(otherDigest, "web", keys.ed25519.privateKeyPem);
    const foreign = signDigest(digest, "web", generateSigningKey().privateKeyPem);
    expect(verifySignatures(digest, [foreign, stale, good], trusted("ecdsa-p256", "ed25519"))).toEqual({ keyName: "ed25519" });
  });

  test("a trusted key's signature over anything but an image payload is worth nothing", () => {
    for (const text of [
      "",
      "{}",
      "null",
      JSON.stringify({ critical: { image: { "docker-manifest-digest": digest }, type: "something else" } }),
    ]) {
      const payload = Buffer.from(text);
      const signature = {
        payload: payload.toString("base64"),
        signature: sign(null, payload, keys.ed25519.privateKeyPem).toString("base64"),
      };
      expect(codeOf(() => verifySignatures(digest, [signature], trusted("ed25519")))).toBe("IMAGE_SIGNATURE_UNTRUSTED");
    }
  });

  test("no change of a byte passes", () => {
    const signature = signDigest(digest, "web", keys["ecdsa-p256"].privateKeyPem);
    fc.assert(
      fc.property(fc.constantFrom("payload", "signature"), fc.nat(), fc.integer({ min: 1, max: 255 }), (field, position, flip) => {
        const bytes = Buffer.from(signature[field as "payload"], "base64");
        const at = position % bytes.length;
        bytes[at] = (bytes[at] ?? 0) ^ flip;
        const changed = { ...signature, [field]: bytes.toString("base64") };
        expect(codeOf(() => verifySignatures(digest, [changed], trusted("ecdsa-p256", "ed25519")))).toBe("IMAGE_SIGNATURE_UNTRUSTED");
      }),
      { numRuns: 300 },
    );
  });
});

describe("the real cosign", () => {
  const captured = (kind: string): { signature: { payload: string; signature: string }; key: { name: string; publicKeyPem: string } } => {
    const found = cosign.signatures.find(({ key }) => key === kind);
    if (found === undefined) throw new Error(`no fixture ${kind}`);
    return { signature: { payload: found.payload, signature: found.signature }, key: { name: "team", publicKeyPem: found.publicKeyPem } };
  };

  test.each(["ecdsa-p256", "ed25519"])("an image signed with it is accepted: %s", (kind) => {
    const { signature, key } = captured(kind);
    expect(verifySignatures(cosign.digest, [signature], [key])).toEqual({ keyName: "team" });
    expect(codeOf(() => verifySignatures(otherDigest, [signature], [key]))).toBe("IMAGE_SIGNATURE_MISMATCH");
  });

  test("Ed25519ph, which cosign itself does not verify with a key, is refused", () => {
    const { signature, key } = captured("ed25519ph");
    expect(codeOf(() => verifySignatures(cosign.digest, [signature], [key]))).toBe("IMAGE_SIGNATURE_UNTRUSTED");
  });

  test("the payload is byte for byte what cosign writes", () => {
    const { signature } = captured("ecdsa-p256");
    const reference = (
      JSON.parse(Buffer.from(signature.payload, "base64").toString()) as { critical: { identity: { "docker-reference": string } } }
    ).critical.identity["docker-reference"];
    expect(signDigest(cosign.digest, reference, keys["ecdsa-p256"].privateKeyPem).payload).toBe(signature.payload);
  });

  test("signatures in what `cosign save` writes are found", async () => {
    const index = parseIndex(Buffer.from(JSON.stringify(cosign.saved.index)), "index.json");
    expect(findSignatureEntries(index, cosign.digest)).toHaveLength(1);
    const { signature } = captured("ecdsa-p256");
    const found = await readSignatureManifest(Buffer.from(JSON.stringify(cosign.saved.manifest)), async () =>
      Buffer.from(signature.payload, "base64"),
    );
    expect(found).toEqual([signature]);
  });
});

describe("keys", () => {
  test("a fingerprint is the same for every spelling of a key", () => {
    const { publicKeyPem, privateKeyPem } = keys["ecdsa-p256"];
    expect(describePublicKey(`\n${publicKeyPem.trim().replaceAll("\n", "\r\n")}\n`)).toEqual(describePublicKey(publicKeyPem));
    expect(publicKeyOf(privateKeyPem)).toBe(publicKeyPem);
    expect(describePublicKey(publicKeyPem).fingerprint).toMatch(/^[0-9a-f]{64}$/);
  });

  test("anything but P-256 and Ed25519 is refused, private keys included", () => {
    const pem = (key: { export(options: { type: "spki"; format: "pem" }): string | Buffer }): string =>
      key.export({ type: "spki", format: "pem" }).toString();
    const refusedKeys = [
      "",
      "no key",
      keys.ed25519.privateKeyPem,
      keys.ed25519.privateKeyPem + keys.ed25519.publicKeyPem,
      pem(generateKeyPairSync("rsa", { modulusLength: 2048 }).publicKey),
      pem(generateKeyPairSync("ec", { namedCurve: "P-384" }).publicKey),
      pem(generateKeyPairSync("ed448").publicKey),
    ];
    for (const key of refusedKeys) expect(codeOf(() => describePublicKey(key))).toBe("INVALID_INPUT");
  });
});
