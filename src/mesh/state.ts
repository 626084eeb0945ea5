import { readdirSync, rmdirSync } from "node:fs";
import { join } from "node:path";
import { ForgeError } from "../base/errors.ts";
import { isErrno } from "../base/linux.ts";

/** Where the mesh keeps what must be found again after a restart of the agent: one entry a cell in a folder a kind. */
export type StateKind = "netns" | "published";

export function stateFolder(stateDir: string, kind: StateKind): string {
  return join(stateDir, kind);
}

export function cellPath(stateDir: string, kind: StateKind, cellId: string): string {
  if (!/^[A-Za-z0-9_-]{1,64}$/.test(cellId)) throw new ForgeError("INVALID_INPUT", `not a cell's identifier: ${JSON.stringify(cellId)}`);
  return join(stateFolder(stateDir, kind), cellId);
}

/** The names in a folder; none where it does not exist. */
export function namesIn(folder: string): string[] {
  try {
    return readdirSync(folder);
  } catch (error) {
    if (isErrno(error, "ENOENT")) return [];
    throw error;
  }
}

export function removeFolderIfEmpty(folder: string): void {
  try {
    rmdirSync(folder);
  } catch (error) {
    if (!isErrno(error, "ENOTEMPTY") && !isErrno(error, "ENOENT")) throw error;
  }
}
