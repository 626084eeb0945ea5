import { createReadStream } from "node:fs";
import { readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { ForgeError } from "../../base/errors.ts";
import { run } from "../../base/exec.ts";
import { maximumDocumentBytes, parseDocument } from "./manifest.ts";
import { digestOf, hexOf, type ImageStore, maximumBlobBytes } from "./store.ts";

const copyTimeoutMs = 30 * 60_000;
const inspectTimeoutMs = 60_000;

/** skopeo's own signature policy is switched off: Forge verifies by digest itself, before and after. */
const globalOptions = ["--insecure-policy", "--override-os", "linux"];

/** The exact bytes of the manifest or index a registry has under a name, or undefined where it has none. */
export async function inspectRaw(source: string, plainHttp: boolean): Promise<Buffer | undefined> {
  try {
    const tls = plainHttp ? ["--tls-verify=false"] : [];
    const output = await run("skopeo", [...globalOptions, "inspect", "--raw", ...tls, source], {
      timeoutMs: inspectTimeoutMs,
      maxOutputBytes: maximumDocumentBytes,
    });
    return Buffer.from(output);
  } catch (error) {
    const stderr = stderrOf(error);
    if (/manifest unknown|name unknown|not found|does not exist/i.test(stderr)) return undefined;
    throw unavailable(source, error);
  }
}

/** Copies one image, byte for byte, into `folder` and from there into the store; returns the manifest's digest. */
export async function copyToFolder(source: string, folder: string, store: ImageStore, plainHttp = false): Promise<string> {
  const target = join(folder, "image");
  try {
    const tls = plainHttp ? ["--src-tls-verify=false"] : [];
    await run("skopeo", [...globalOptions, "--tmpdir", folder, "copy", "--quiet", "--preserve-digests", ...tls, source, `dir:${target}`], {
      timeoutMs: copyTimeoutMs,
    });
  } catch (error) {
    if (/no space left on device/i.test(stderrOf(error)))
      throw new ForgeError("DISK_FULL", "no space left to fetch the image", { cause: error });
    if (source.startsWith("docker://")) throw unavailable(source, error);
    throw error instanceof ForgeError && error.code === "EXEC_FAILED"
      ? new ForgeError("IMAGE_CORRUPT", error.message, { cause: error })
      : error;
  }
  return storeFolder(target, store);
}

/** skopeo's `dir:` form: `manifest.json`, and each blob under its hex digest. */
async function storeFolder(folder: string, store: ImageStore): Promise<string> {
  const path = join(folder, "manifest.json");
  if ((await stat(path)).size > maximumDocumentBytes)
    throw new ForgeError("IMAGE_REFUSED", `the manifest is larger than ${maximumDocumentBytes} bytes`);
  const bytes = await readFile(path);
  const document = parseDocument(bytes, "the manifest");
  if (document.kind === "index") throw new ForgeError("IMAGE_REFUSED", "an index where a manifest was asked for");
  for (const { digest } of [document.manifest.config, ...document.manifest.layers]) {
    await store.putBlob(digest, createReadStream(join(folder, hexOf(digest)), { highWaterMark: 256 * 1024 }) as AsyncIterable<Buffer>, {
      maxBytes: maximumBlobBytes,
    });
  }
  const digest = digestOf(bytes);
  await store.putDocument(digest, bytes);
  return digest;
}

function stderrOf(error: unknown): string {
  const stderr = error instanceof ForgeError ? error.details?.["stderr"] : undefined;
  return typeof stderr === "string" ? stderr : "";
}

function unavailable(source: string, error: unknown): unknown {
  if (!(error instanceof ForgeError) || error.code !== "EXEC_FAILED") return error;
  return new ForgeError("UNAVAILABLE", `${source.replace("docker://", "")} cannot be read: ${error.message}`, { cause: error });
}
