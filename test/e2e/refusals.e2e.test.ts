import { cp, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { ErrorBody } from "../../src/base/errors.ts";
import type { Cell, Event } from "../../src/api/resources.ts";
import { writeBusyboxImage } from "../support/busybox-image.ts";
import { Runtime } from "../support/runtime.ts";

/** What must not run does not run: a refusal with its own code, an audited denial, and no cell. */

let runtime: Runtime;
const at = (name: string): string => join(runtime.folder, name);

beforeAll(async () => {
  runtime = await Runtime.start();
  await writeBusyboxImage(at("signed"));
  await runtime.ok("image", "sign", at("signed"));
}, 120_000);
afterAll(() => runtime?.destroy(), 120_000);

async function refusal(image: string): Promise<ErrorBody> {
  const manifest = await runtime.manifest({ web: { image, memory: "128MiB" } });
  const result = await runtime.forge("--json", "deploy", manifest);
  expect(result.code).toBe(5);
  const line =
    result.stderr
      .trim()
      .split("\n")
      .findLast((text) => text.startsWith("{")) ?? result.stderr;
  const parsed = JSON.parse(line) as ErrorBody | { error: ErrorBody };
  return "error" in parsed ? parsed.error : parsed;
}

async function denials(): Promise<string[]> {
  const text = await runtime.ok("--json", "events", "--limit", "1000");
  const events = text
    .split("\n")
    .filter(Boolean)
    .map((line) => JSON.parse(line) as Event);
  return events.filter(({ outcome }) => outcome === "denied").map(({ details }) => String(details["code"]));
}

describe("images that are refused", () => {
  test("unsigned", async () => {
    await writeBusyboxImage(at("unsigned"), { files: { "/note": "unsigned" } });
    expect((await refusal("./unsigned")).code).toBe("IMAGE_UNSIGNED");
  });

  test("tagged anew after signing: the signature is for what the tag said before", async () => {
    await cp(at("signed"), at("retagged"), { recursive: true });
    const before = JSON.parse(await readFile(join(at("retagged"), "index.json"), "utf8")) as {
      manifests: { digest: string; annotations?: Record<string, string> }[];
    };
    const digest = await writeBusyboxImage(at("retagged"), { files: { "/note": "changed" } });
    const after = JSON.parse(await readFile(join(at("retagged"), "index.json"), "utf8")) as typeof before;
    const signature = before.manifests.find(({ annotations }) => annotations?.["org.opencontainers.image.ref.name"] !== "latest");
    const moved = {
      ...signature,
      annotations: { ...signature?.annotations, "org.opencontainers.image.ref.name": `${digest.replace(":", "-")}.sig` },
    };
    await writeFile(join(at("retagged"), "index.json"), JSON.stringify({ ...after, manifests: [...after.manifests, moved] }));
    expect((await refusal("./retagged")).code).toBe("IMAGE_SIGNATURE_MISMATCH");
  });

  test("changed by one byte", async () => {
    await cp(at("signed"), at("flipped"), { recursive: true });
    const index = JSON.parse(await readFile(join(at("flipped"), "index.json"), "utf8")) as { manifests: { digest: string }[] };
    const manifest = JSON.parse(await readFile(blob("flipped", index.manifests[0]?.digest), "utf8")) as { layers: { digest: string }[] };
    const layer = blob("flipped", manifest.layers[0]?.digest);
    const bytes = await readFile(layer);
    bytes[bytes.length >> 1] = (bytes[bytes.length >> 1] ?? 0) ^ 1;
    await writeFile(layer, bytes);
    expect((await refusal("./flipped")).code).toBe("IMAGE_CORRUPT");
  });

  test("signed by a key nobody trusts", async () => {
    await runtime.ok("image", "keygen", at("stranger.key"));
    await writeBusyboxImage(at("foreign"), { files: { "/note": "foreign" } });
    await runtime.ok("image", "sign", "--key", at("stranger.key"), at("foreign"));
    expect((await refusal("./foreign")).code).toBe("IMAGE_SIGNATURE_UNTRUSTED");
  });

  test("each refusal is a denial in the log, and no cell came of any", async () => {
    expect((await denials()).toSorted()).toEqual([
      "IMAGE_CORRUPT",
      "IMAGE_SIGNATURE_MISMATCH",
      "IMAGE_SIGNATURE_UNTRUSTED",
      "IMAGE_UNSIGNED",
    ]);
    expect((await runtime.json<{ items: Cell[] }>("ps", "--all")).items).toEqual([]);
    await runtime.ok("audit", "verify");
  });
});

function blob(layout: string, digest: string | undefined): string {
  return join(at(layout), "blobs/sha256", (digest ?? "").slice(7));
}
