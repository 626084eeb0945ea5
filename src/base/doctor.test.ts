import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { examine, type Finding, requireNothingMissing } from "./doctor.ts";

let folder = "";
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-doctor-"));
});
afterEach(async () => {
  await rm(folder, { recursive: true, force: true });
});

describe("examine", () => {
  test("every finding has words for what was seen and what it means, and a name of its own", async () => {
    const findings = await examine();
    for (const { detail, meaning } of findings) {
      expect(detail).not.toBe("");
      expect(meaning).not.toBe("");
    }
    expect(new Set(findings.map(({ name }) => name)).size).toBe(findings.length);
  });

  test("compiled parts are found where they are, and missed where they are not", async () => {
    expect(await stateOf("compiled parts")).toBe("missing");
    await mkdir(join(folder, "guest"));
    for (const file of ["guest/vmlinuz", "guest/initramfs", "cell.bpf.o"]) await writeFile(join(folder, file), "");
    expect(await stateOf("compiled parts")).toBe("found");
  });

  test("a data folder that does not exist yet is judged by its nearest parent", async () => {
    const findings = await examine({ buildDir: folder, dataDir: join(folder, "not", "yet") });
    expect(findings.find(({ name }) => name === "disk")?.detail).toContain(folder);
  });
});

describe("requireNothingMissing", () => {
  const finding = (state: Finding["state"], name: string): Finding => ({ name, state, detail: "seen", meaning: "needed" });

  test("lets found and degraded pass", () => {
    expect(() => requireNothingMissing([finding("found", "a"), finding("degraded", "b")])).not.toThrow();
  });

  test("names everything that is missing", () => {
    const findings = [finding("missing", "tun"), finding("found", "a"), finding("missing", "bpf")];
    expect(() => requireNothingMissing(findings)).toThrow(
      expect.objectContaining({ code: "UNSUPPORTED", message: expect.stringMatching(/2 things: tun.*bpf/) }),
    );
  });
});

async function stateOf(name: string): Promise<string | undefined> {
  return (await examine({ buildDir: folder, dataDir: folder })).find((finding) => finding.name === name)?.state;
}
