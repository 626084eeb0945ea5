import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { bpfObjectPath, buildBpf } from "./build.ts";

test("compiles once, and again when the stamp is another's", async () => {
  const buildDir = mkdtempSync(join(tmpdir(), "forge-bpf-"));
  try {
    const path = bpfObjectPath(buildDir);
    expect(await buildBpf(buildDir)).toEqual({ built: true, path });
    expect(readFileSync(path).subarray(0, 4).toString("latin1")).toBe("\x7fELF");
    expect(await buildBpf(buildDir)).toEqual({ built: false, path });
    writeFileSync(`${path}.stamp`, "other sources");
    expect(await buildBpf(buildDir)).toEqual({ built: true, path });
  } finally {
    rmSync(buildDir, { recursive: true });
  }
});
