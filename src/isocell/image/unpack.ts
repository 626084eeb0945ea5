import { chmodSync, lstatSync, lutimesSync, readdirSync, readlinkSync, type Stats } from "node:fs";
import { open, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { setImmediate as breathe } from "node:timers/promises";
import { makeDirectory } from "../../base/durable.ts";
import { ForgeError } from "../../base/errors.ts";
import { run } from "../../base/exec.ts";
import { checkLayers } from "./layers.ts";
import { type ImageLayer, type ImageManifest, mediaTypes } from "./manifest.ts";
import { digestOf, hexOf, type ImageStore } from "./store.ts";
import { imageLimits, type ImageTree, type Inode, refused } from "./tree.ts";

const unpackTimeoutMs = 15 * 60_000;

/**
 * Unpacks a checked image into `<work>/rootfs`, owned, linked and dated as its layers say, and returns that path.
 *
 * The layers are checked first, all of them, and kept as plain tars; umoci then unpacks exactly those bytes, and the
 * outcome is compared with what the check foresaw: an archive that two readers understand differently is refused.
 */
export async function unpack(manifest: ImageManifest, store: ImageStore, work: string): Promise<string> {
  const layout = join(work, "layout");
  const blobs = join(layout, "blobs", "sha256");
  await makeDirectory(blobs);
  const tree = await checkLayers(manifest, store, (layer) => open(join(blobs, hexOf(layer.diffId)), "w", 0o600));
  await writePlainLayout(layout, manifest, store);
  // Relative to the folder: a colon in its path would read as a tag.
  await run("umoci", ["raw", "unpack", "--image", "layout:image", "rootfs"], { cwd: work, timeoutMs: unpackTimeoutMs });
  await rm(layout, { recursive: true });
  const rootfs = join(work, "rootfs");
  await settle(tree, rootfs);
  return rootfs;
}

/** An OCI layout of the uncompressed layers, which any reader understands whatever the image came as. */
async function writePlainLayout(layout: string, manifest: ImageManifest, store: ImageStore): Promise<void> {
  const put = async (document: object | Buffer, mediaType: string): Promise<object> => {
    const bytes = Buffer.isBuffer(document) ? document : Buffer.from(JSON.stringify(document));
    const digest = digestOf(bytes);
    await writeFile(join(layout, "blobs", "sha256", hexOf(digest)), bytes);
    return { mediaType, digest, size: bytes.length };
  };
  const config = await put(await store.readBlob(manifest.configDescriptor.digest), mediaTypes.ociConfig);
  const layers = manifest.layers.map((layer) => plainDescriptor(layer, layout));
  const image = await put({ schemaVersion: 2, mediaType: mediaTypes.ociManifest, config, layers }, mediaTypes.ociManifest);
  const index = { schemaVersion: 2, manifests: [{ ...image, annotations: { "org.opencontainers.image.ref.name": "image" } }] };
  await writeFile(join(layout, "index.json"), JSON.stringify(index));
  await writeFile(join(layout, "oci-layout"), JSON.stringify({ imageLayoutVersion: "1.0.0" }));
}

function plainDescriptor(layer: ImageLayer, layout: string): object {
  const { size } = lstatSync(join(layout, "blobs", "sha256", hexOf(layer.diffId)));
  return { mediaType: mediaTypes.ociLayer, digest: layer.diffId, size };
}

/** Compares the unpacked folder with the tree, and gives what no entry described a fixed mode and time. */
async function settle(tree: ImageTree, rootfs: string): Promise<void> {
  const seen = new Map<Inode, number>();
  const pending: { path: string; name: string; inode: Inode }[] = [{ path: rootfs, name: ".", inode: tree.root }];
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    settleInode(next.path, next.name, next.inode, seen);
    if ((next.inode.metadata?.xattrs.size ?? 0) > 1) await sortAttributes(next.path);
    if (next.inode.type !== "directory") continue;
    const names = readdirSync(next.path);
    if (names.length !== next.inode.children.size) throw refused(next.name, "the archive unpacks to other entries than it was checked for");
    for (const [name, inode] of next.inode.children) pending.push({ path: join(next.path, name), name: `${next.name}/${name}`, inode });
    await breathe(); // a folder at a time, so that a large image does not hold up the process
  }
}

const implicitFolderMode = 0o755;

function settleInode(path: string, name: string, inode: Inode, seen: Map<Inode, number>): void {
  const stats = lstatSync(path, { throwIfNoEntry: false });
  if (stats === undefined || !isOfType(stats, inode, path))
    throw refused(name, "the archive unpacks to something else than it was checked for");
  const twin = seen.get(inode);
  if (twin !== undefined && twin !== stats.ino) throw refused(name, "a hard link came out as a copy");
  seen.set(inode, stats.ino);
  const { metadata } = inode;
  if (metadata === undefined) chmodSync(path, implicitFolderMode);
  else if (stats.nlink === 1 || inode.type === "directory") {
    // Of a file with several names the entries may contradict each other; of any other there is one truth.
    const isRight =
      stats.uid === metadata.uid && stats.gid === metadata.gid && (inode.type === "symlink" || (stats.mode & 0o7777) === metadata.mode);
    if (!isRight) throw refused(name, "its owner or mode did not come out as its entry says");
  }
  if (inode.type === "directory") {
    const seconds = Math.min(Math.max(Math.floor(metadata?.mtimeSeconds ?? 0), 0), imageLimits.identifier);
    lutimesSync(path, seconds, seconds);
  }
}

/** umoci sets a file's attributes in random order (a Go map), and mkfs.erofs keeps the order it finds. */
async function sortAttributes(path: string): Promise<void> {
  const dump = await run("getfattr", ["--no-dereference", "--absolute-names", "--dump", "--match=-", "--encoding=hex", "--", path]);
  const attributes = [...dump.matchAll(/^((?:user|security|trusted|system)\.[^=\n]+)=(0x[0-9a-f]*)$/gm)].map((match) => ({
    name: match[1] ?? "",
    value: match[2] ?? "",
  }));
  for (const { name } of attributes) await run("setfattr", ["--no-dereference", "--remove", name, "--", path]);
  for (const { name, value } of attributes.sort((a, b) => (a.name < b.name ? -1 : 1)))
    await run("setfattr", ["--no-dereference", "--name", name, "--value", value, "--", path]);
}

function isOfType(stats: Stats, inode: Inode, path: string): boolean {
  const { metadata } = inode;
  const device = metadata === undefined ? 0 : deviceNumber(metadata.deviceMajor, metadata.deviceMinor);
  switch (inode.type) {
    case "file":
      return stats.isFile() && stats.size === metadata?.sizeBytes;
    case "directory":
      return stats.isDirectory();
    case "symlink":
      return stats.isSymbolicLink() && readlinkSync(path) === inode.target;
    case "fifo":
      return stats.isFIFO();
    case "character-device":
      return stats.isCharacterDevice() && stats.rdev === device;
    case "block-device":
      return stats.isBlockDevice() && stats.rdev === device;
  }
}

/** As the kernel hands dev_t to user space on Linux: makedev(3). */
function deviceNumber(major: number, minor: number): number {
  return ((major & 0xfff) << 8) | (minor & 0xff) | ((minor >>> 8) * 2 ** 20);
}

/** A full disk reported by a program in its own words. */
export function isDiskFull(error: unknown): boolean {
  return (
    error instanceof ForgeError && error.code === "EXEC_FAILED" && /no space left on device|ENOSPC/i.test(String(error.details?.["stderr"]))
  );
}
