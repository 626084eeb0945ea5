import { verify } from "node:crypto";
import { chmod, mkdtemp, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { fileSigner } from "./signer.ts";

let folder = "";
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-signer-"));
});
afterEach(async () => {
  await rm(folder, { recursive: true, force: true });
});

test("the key is made once, is private, and signs what its public half verifies", async () => {
  const path = join(folder, "key");
  const first = await fileSigner(path);
  const second = await fileSigner(path);
  expect(second.publicKeyPem).toBe(first.publicKeyPem);
  expect((await stat(path)).mode & 0o777).toBe(0o600);
  expect(verify(null, Buffer.from("x"), first.publicKeyPem, second.sign(Buffer.from("x")))).toBe(true);
});

test("a key that others can read is refused", async () => {
  const path = join(folder, "key");
  await fileSigner(path);
  await chmod(path, 0o644);
  await expect(fileSigner(path)).rejects.toMatchObject({ code: "AUDIT_UNAVAILABLE" });
});

test("a file that is no Ed25519 key is refused", async () => {
  const path = join(folder, "key");
  await writeFile(path, "no key", { mode: 0o600 });
  await expect(fileSigner(path)).rejects.toMatchObject({ code: "AUDIT_UNAVAILABLE" });
});
