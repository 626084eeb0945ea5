import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { run } from "../../base/exec.ts";

/** For tests: init's parsers compiled for the host with the address and undefined-behaviour sanitisers. */
export async function buildHarness(): Promise<{ path: string } & AsyncDisposable> {
  const folder = await mkdtemp(join(tmpdir(), "forge-harness-"));
  const path = join(folder, "decode");
  const flags = [
    "-std=gnu17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-I.",
  ];
  await run("gcc", [...flags, "-o", path, "harness/decode.c", "codec.c", "config.c"], { cwd: import.meta.dirname });
  return { path, [Symbol.asyncDispose]: async () => await rm(folder, { recursive: true, force: true }) };
}
