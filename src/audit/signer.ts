import { createPrivateKey, createPublicKey, generateKeyPairSync, type KeyObject, sign } from "node:crypto";
import { stat } from "node:fs/promises";
import { readIfExists, writeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";

/** Signs the entries of one chain with Ed25519. A file today; an HSM can stand behind the same two members. */
export interface Signer {
  /** SubjectPublicKeyInfo, PEM. */
  readonly publicKeyPem: string;
  sign(bytes: Uint8Array): Buffer;
}

/** The signer whose key lives in this file (PKCS #8 PEM, 0600); the key is created, durably, where there is none. */
export async function fileSigner(path: string): Promise<Signer> {
  const pem = (await readIfExists(path)) ?? (await createKey(path));
  const { mode } = await stat(path);
  if ((mode & 0o077) !== 0) throw new ForgeError("AUDIT_UNAVAILABLE", `the audit key ${path} can be read by others than its owner`);
  return signerOf(parseKey(pem, path));
}

async function createKey(path: string): Promise<Buffer> {
  const pem = Buffer.from(generateKeyPairSync("ed25519").privateKey.export({ type: "pkcs8", format: "pem" }));
  await writeDurable(path, pem, 0o600);
  return pem;
}

function parseKey(pem: Buffer, path: string): KeyObject {
  let key: KeyObject;
  try {
    key = createPrivateKey(pem);
  } catch (error) {
    throw new ForgeError("AUDIT_UNAVAILABLE", `the audit key ${path} is not a private key`, { cause: error });
  }
  if (key.asymmetricKeyType !== "ed25519") throw new ForgeError("AUDIT_UNAVAILABLE", `the audit key ${path} is not an Ed25519 key`);
  return key;
}

function signerOf(key: KeyObject): Signer {
  return {
    publicKeyPem: createPublicKey(key).export({ type: "spki", format: "pem" }),
    sign: (bytes) => sign(null, bytes, key),
  };
}
