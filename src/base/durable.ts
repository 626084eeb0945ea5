import { randomBytes } from "node:crypto";
import { constants } from "node:fs";
import { type FileHandle, mkdir, open, readFile, rename, rm, unlink } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { errnoOf } from "./errors.ts";

/**
 * Files that survive a crash. The order is always the same: temporary file in the same folder -> fdatasync ->
 * rename -> fsync of the folder. When a function here resolves, the bytes are on stable storage; when it rejects,
 * the old content (or absence) is what a reader finds.
 */

/** Replaces `path` by `data`, atomically and durably. Mode defaults to 0600: what Forge writes is private unless said. */
export async function writeDurable(path: string, data: string | Uint8Array, mode = 0o600): Promise<void> {
  const temporary = temporaryBeside(path);
  try {
    const file = await open(temporary, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, mode);
    try {
      await file.chmod(mode); // the umask must not decide
      await file.writeFile(data);
      await file.datasync();
    } finally {
      await file.close();
    }
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => undefined); // report the first failure, not the clean-up's
    throw error;
  }
  await syncDirectory(dirname(path));
}

/** Moves a finished file or folder to its final name, durably; both must be on one file system. */
export async function renameDurable(from: string, to: string): Promise<void> {
  await rename(from, to);
  await syncDirectory(dirname(to));
  if (dirname(from) !== dirname(to)) await syncDirectory(dirname(from));
}

/** Removes a file durably; absent is fine. */
export async function removeDurable(path: string): Promise<void> {
  try {
    await unlink(path);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return;
    throw error;
  }
  await syncDirectory(dirname(path));
}

/** Creates a folder (and parents) with the mode, durably. */
export async function makeDirectory(path: string, mode = 0o700): Promise<void> {
  const created = await mkdir(path, { recursive: true, mode });
  if (created !== undefined) await syncDirectory(dirname(created));
}

/** fsync of a folder: makes the names in it durable. */
export async function syncDirectory(path: string): Promise<void> {
  const handle = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** The content of a small file, or undefined where there is none. */
export async function readIfExists(path: string): Promise<Buffer | undefined> {
  try {
    return await readFile(path);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return undefined;
    throw error;
  }
}

/** Writes all of `data` at the handle's position and forces it to stable storage. */
export async function appendDurable(file: FileHandle, data: Uint8Array): Promise<void> {
  let written = 0;
  while (written < data.length) {
    const { bytesWritten } = await file.write(data, written, data.length - written);
    written += bytesWritten;
  }
  await file.datasync();
}

/** A name beside `path` that no reader takes for a finished file. */
export function temporaryBeside(path: string): string {
  return join(dirname(path), `.${basename(path)}.${randomBytes(6).toString("hex")}.tmp`);
}
