import { createHash, createPrivateKey, createPublicKey, generateKeyPairSync, type KeyObject, sign, verify } from "node:crypto";
import { z } from "zod";
import type { ImageSignature } from "../../api/resources.ts";
import { ForgeError } from "../../base/errors.ts";

/**
 * Image signatures in the form cosign uses with a key: a "simple signing" JSON payload that names the manifest's
 * digest, signed with ECDSA P-256 over SHA-256 (DER) or with Ed25519.
 * https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md
 */

export interface TrustedKeyPem {
  readonly name: string;
  /** SubjectPublicKeyInfo. */
  readonly publicKeyPem: string;
}

export type SigningKeyType = "ecdsa-p256" | "ed25519";

export interface SigningKey {
  /** PKCS#8. */
  readonly privateKeyPem: string;
  readonly publicKeyPem: string;
}

const payloadType = "cosign container image signature";

/** Only what the decision rests on; other members are the signer's business. */
const payloadSchema = z.object({
  critical: z.object({ image: z.object({ "docker-manifest-digest": z.string() }), type: z.literal(payloadType) }),
});

/**
 * Finds one signature by a trusted key over exactly this digest and names the key.
 * Throws IMAGE_UNSIGNED without any signature, IMAGE_SIGNATURE_MISMATCH when a trusted key signed only another
 * digest, IMAGE_SIGNATURE_UNTRUSTED when no trusted key made any of them.
 */
export function verifySignatures(
  digest: string,
  signatures: readonly ImageSignature[],
  trustedKeys: readonly TrustedKeyPem[],
): { keyName: string } {
  if (signatures.length === 0) throw new ForgeError("IMAGE_UNSIGNED", `the image ${digest} carries no signature`);
  const keys = trustedKeys.map(({ name, publicKeyPem }) => ({ name, key: readPublicKey(publicKeyPem) }));
  let other: { keyName: string; digest: string } | undefined;
  for (const { payload, signature } of signatures) {
    const bytes = Buffer.from(payload, "base64");
    for (const { name, key } of keys) {
      if (!isSignedBy(key, bytes, Buffer.from(signature, "base64"))) continue;
      const named = digestIn(bytes);
      if (named === digest) return { keyName: name };
      if (named !== undefined) other = { keyName: name, digest: named };
    }
  }
  if (other !== undefined) {
    throw new ForgeError("IMAGE_SIGNATURE_MISMATCH", `the signature by ${other.keyName} is for ${other.digest}, not for ${digest}`, {
      details: { signed: other.digest, digest },
    });
  }
  throw new ForgeError("IMAGE_SIGNATURE_UNTRUSTED", `no trusted key made the ${signatures.length} signature(s) of ${digest}`, {
    details: { digest },
  });
}

/** Signs a digest under the name the deployer gave it. The payload is byte for byte what cosign writes. */
export function signDigest(digest: string, reference: string, privateKeyPem: string): ImageSignature {
  const key = readPrivateKey(privateKeyPem);
  const critical = { identity: { "docker-reference": reference }, image: { "docker-manifest-digest": digest }, type: payloadType };
  const payload = Buffer.from(JSON.stringify({ critical, optional: null }));
  return { payload: payload.toString("base64"), signature: sign(hashOf(key), payload, key).toString("base64") };
}

/** cosign's own keys are ECDSA P-256, so that is the default. */
export function generateSigningKey(type: SigningKeyType = "ecdsa-p256"): SigningKey {
  const { privateKey, publicKey } =
    type === "ed25519" ? generateKeyPairSync("ed25519") : generateKeyPairSync("ec", { namedCurve: "P-256" });
  return { privateKeyPem: privateKey.export({ type: "pkcs8", format: "pem" }), publicKeyPem: pemOf(publicKey) };
}

/** The public half of a private key, for `forge trust add`. */
export function publicKeyOf(privateKeyPem: string): string {
  return pemOf(createPublicKey(readPrivateKey(privateKeyPem)));
}

/** Accepts a key to trust: canonical PEM and SHA-256 of its SubjectPublicKeyInfo in hex. INVALID_INPUT otherwise. */
export function describePublicKey(publicKeyPem: string): { publicKeyPem: string; fingerprint: string } {
  const key = readPublicKey(publicKeyPem);
  return {
    publicKeyPem: pemOf(key),
    fingerprint: createHash("sha256")
      .update(key.export({ type: "spki", format: "der" }))
      .digest("hex"),
  };
}

function isSignedBy(key: KeyObject, payload: Buffer, signature: Buffer): boolean {
  try {
    return verify(hashOf(key), payload, key, signature);
  } catch {
    return false; // a signature that is not even well formed
  }
}

function digestIn(payload: Buffer): string | undefined {
  try {
    return payloadSchema.parse(JSON.parse(payload.toString())).critical.image["docker-manifest-digest"];
  } catch {
    return undefined; // signed by the key, but no signature over an image
  }
}

function readPublicKey(pem: string): KeyObject {
  // createPublicKey would also take a private key, which nobody should paste here, and certificates.
  if (!/^-----BEGIN PUBLIC KEY-----/m.test(pem) || /PRIVATE/.test(pem))
    throw unusable("a public key must be PEM: -----BEGIN PUBLIC KEY-----");
  return supported(() => createPublicKey(pem));
}

function readPrivateKey(pem: string): KeyObject {
  return supported(() => createPrivateKey(pem));
}

function supported(read: () => KeyObject): KeyObject {
  let key: KeyObject;
  try {
    key = read();
  } catch {
    throw unusable("the key cannot be read"); // the cause could quote the key
  }
  const isP256 = key.asymmetricKeyType === "ec" && key.asymmetricKeyDetails?.namedCurve === "prime256v1";
  if (!isP256 && key.asymmetricKeyType !== "ed25519") throw unusable("the key must be ECDSA P-256 or Ed25519");
  return key;
}

/** Ed25519 brings its own hash. */
function hashOf(key: KeyObject): string | null {
  return key.asymmetricKeyType === "ed25519" ? null : "sha256";
}

function pemOf(publicKey: KeyObject): string {
  return publicKey.export({ type: "spki", format: "pem" });
}

function unusable(message: string): ForgeError {
  return new ForgeError("INVALID_INPUT", message);
}
