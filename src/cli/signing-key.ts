import { describePublicKey, generateSigningKey, type SigningKey } from "../isocell/image/index.ts";
import { readIfExists } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import type { Connection, ForgeHome } from "./context.ts";

/** The person's own signing key, made when first needed. */
export async function localKey(home: ForgeHome): Promise<SigningKey> {
  const [privateKey, publicKey] = await Promise.all([readIfExists(home.path("signing.key")), readIfExists(home.path("signing.pub"))]);
  if (privateKey !== undefined && publicKey !== undefined)
    return { privateKeyPem: privateKey.toString(), publicKeyPem: publicKey.toString() };
  const key = generateSigningKey();
  await home.writeFile("signing.pub", key.publicKeyPem, 0o644);
  await home.writeFile("signing.key", key.privateKeyPem);
  return key;
}

/** The key in a file, or the person's own. */
export async function signingKeyPem(home: ForgeHome, path: string | undefined): Promise<string> {
  if (path === undefined) return (await localKey(home)).privateKeyPem;
  const bytes = await readIfExists(path);
  if (bytes === undefined) throw new ForgeError("NOT_FOUND", `there is no key file ${path}`);
  return bytes.toString();
}

/** Makes the tenant trust the person's key under the name `local`, once. Who is no owner leaves things as they are. */
export async function trustLocalKey(api: Connection, home: ForgeHome): Promise<void> {
  const { fingerprint, publicKeyPem } = describePublicKey((await localKey(home)).publicKeyPem);
  const { items } = await api.call("listTrustedKeys", {});
  if (items.some((key) => key.fingerprint === fingerprint)) return;
  const name = items.some((key) => key.name === "local") ? `local-${fingerprint.slice(0, 8)}` : "local";
  try {
    await api.call("addTrustedKey", { body: { name, publicKeyPem } });
  } catch (error) {
    if (error instanceof ForgeError && error.code === "FORBIDDEN") return;
    throw error;
  }
}
