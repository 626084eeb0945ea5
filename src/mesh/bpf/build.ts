import { createHash } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { makeDirectory, readIfExists, renameDurable, temporaryBeside, writeDurable } from "../../base/durable.ts";
import { run } from "../../base/exec.ts";

/** Compiles the eBPF programs. `node src/mesh/bpf/build.ts [folder]` does it from the command line. */

const sourceFolder = import.meta.dirname;
const objectName = "cell.bpf.o";

/** mcpu=v3 (Linux 5.12) for 32-bit instructions; -g for BTF, which the loader needs. */
const flags = ["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror"];

/** Where the compiled programs are looked for. */
export function bpfObjectPath(buildDir = defaultBuildDir()): string {
  return join(buildDir, "bpf", objectName);
}

/** Compiles where source or flags changed since the last time; says whether it did. */
export async function buildBpf(buildDir = defaultBuildDir()): Promise<{ built: boolean; path: string }> {
  const path = bpfObjectPath(buildDir);
  const stampPath = `${path}.stamp`;
  const stamp = await sourceHash();
  const [object, existing] = await Promise.all([readIfExists(path), readIfExists(stampPath)]);
  if (object !== undefined && existing?.toString() === stamp) return { built: false, path };
  await makeDirectory(join(buildDir, "bpf"), 0o755);
  const temporary = temporaryBeside(path);
  await run("clang", [...flags, "-I", await multiarchIncludes(), "-c", join(sourceFolder, "cell.bpf.c"), "-o", temporary]);
  await renameDurable(temporary, path);
  await writeDurable(stampPath, stamp, 0o644);
  return { built: true, path };
}

function defaultBuildDir(): string {
  return process.env["FORGE_BUILD_DIR"] ?? join(sourceFolder, "../../../build");
}

async function sourceHash(): Promise<string> {
  const names = (await readdir(sourceFolder)).filter((name) => /\.[ch]$/.test(name)).toSorted();
  const hash = createHash("sha256").update(JSON.stringify(flags));
  for (const name of names) hash.update(`\0${name}\0`).update(await readFile(join(sourceFolder, name)));
  return hash.digest("hex");
}

/** Debian keeps asm/types.h in a folder by architecture, which clang does not search for the bpf target. */
async function multiarchIncludes(): Promise<string> {
  return join("/usr/include", (await run("clang", ["-print-multiarch"], { timeoutMs: 10_000 })).trim());
}

if (import.meta.main) {
  const { built, path } = await buildBpf(process.argv[2]);
  process.stdout.write(`${path}: ${built ? "compiled" : "up to date"}\n`);
}
