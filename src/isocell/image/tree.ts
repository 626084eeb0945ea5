import { ForgeError } from "../../base/errors.ts";

/**
 * What the layers of an image amount to, kept as names and metadata: the model that each archive entry is checked
 * against before anything touches a disk, and that the unpacked folder is compared with afterwards.
 * Semantics: OCI image specification, "Applying changesets" and "Whiteouts".
 */

/** Beyond these an image is refused. They bound time, memory and disk of everything done with an image. */
export const imageLimits = {
  layers: 128,
  entries: 400_000,
  uncompressedBytes: 16 * 1024 * 1024 * 1024,
  /** Above this size a layer must not have been compressed better than compressionRatio. */
  compressionFreeBytes: 64 * 1024 * 1024,
  compressionRatio: 200,
  nameBytes: 255,
  pathBytes: 4095,
  depth: 256,
  symlinksFollowed: 40,
  /** Names and values of one file together: what ext4 can hold. */
  xattrBytes: 3072,
  xattrsPerEntry: 32,
  paxBytes: 64 * 1024,
  /** The widest numbers of an EROFS inode and of the kernel's dev_t. */
  identifier: 0xffff_fffe,
  deviceMajor: 0xfff,
  deviceMinor: 0xf_ffff,
} as const;

export type EntryType = "file" | "directory" | "symlink" | "link" | "character-device" | "block-device" | "fifo";

/** One entry of a layer's archive, decoded. */
export interface LayerEntry {
  readonly name: string;
  readonly type: EntryType;
  readonly linkName: string;
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly sizeBytes: number;
  readonly mtimeSeconds: number;
  readonly deviceMajor: number;
  readonly deviceMinor: number;
  /** Names with the length of their values. */
  readonly xattrs: ReadonlyMap<string, number>;
}

/** A file, folder, link or device: names that are hard links share one. */
export interface Inode {
  readonly type: Exclude<EntryType, "link">;
  readonly children: Map<string, Inode>;
  readonly target: string;
  /** Undefined: a folder that no entry describes, made because something lies in it. */
  metadata: LayerEntry | undefined;
  /** The last layer that wrote it. */
  layer: number;
}

export class ImageTree {
  readonly root: Inode = folderInode(undefined, 0);
  #layer = 0;
  #entries = 0;

  /** Whiteouts of the entries that follow concern only what came before this call. */
  beginLayer(): void {
    this.#layer += 1;
  }

  /** Checks an entry and applies it. Throws IMAGE_REFUSED, naming the entry and the reason. */
  add(entry: LayerEntry): void {
    this.#entries += 1;
    if (this.#entries > imageLimits.entries) throw refused(entry.name, `the image has more than ${imageLimits.entries} entries`);
    checkNumbers(entry);
    checkXattrs(entry);
    const parts = splitName(entry.name, entry.name);
    const name = parts.pop();
    if (name === undefined) return this.#describeRoot(entry);
    if (parts.some((part) => part.startsWith(whiteoutPrefix))) throw refused(entry.name, "a folder must not be named like a whiteout");
    const parent = this.#resolveFolder(parts, entry.name, "create");
    if (parent === undefined) throw refused(entry.name, "its folder cannot be made");
    if (name.startsWith(whiteoutPrefix)) return this.#whiteout(parent, name, entry);
    this.#place(parent, name, entry);
  }

  #describeRoot(entry: LayerEntry): void {
    if (entry.type !== "directory") throw refused(entry.name, "the root must be a folder");
    this.root.metadata = entry;
  }

  #place(parent: Inode, name: string, entry: LayerEntry): void {
    const present = parent.children.get(name);
    parent.layer = this.#layer;
    if (entry.type === "link") {
      const target = this.#linkTarget(entry);
      if (target === present) throw refused(entry.name, "a hard link to itself");
      target.layer = this.#layer;
      parent.children.set(name, target);
    } else if (entry.type === "directory" && present?.type === "directory") {
      present.metadata = entry;
      present.layer = this.#layer;
    } else {
      const target = entry.type === "symlink" ? checkSymlink(entry) : "";
      parent.children.set(name, { type: entry.type, children: new Map(), target, metadata: entry, layer: this.#layer });
    }
  }

  #linkTarget(entry: LayerEntry): Inode {
    const parts = splitName(entry.linkName, entry.name);
    const name = parts.pop() ?? "";
    const target = this.#resolveFolder(parts, entry.name, "find")?.children.get(name);
    if (target === undefined) throw refused(entry.name, `a hard link to what is not in the image: ${printable(entry.linkName)}`);
    if (target.type === "directory") throw refused(entry.name, "a hard link to a folder");
    return target;
  }

  #whiteout(parent: Inode, name: string, entry: LayerEntry): void {
    if (entry.type !== "file" || entry.sizeBytes !== 0) throw refused(entry.name, "a whiteout must be an empty file");
    if (name === opaqueName) return this.#removeLower(parent);
    const hidden = name.slice(whiteoutPrefix.length);
    if (hidden === "" || hidden === "." || hidden === ".." || hidden.startsWith(whiteoutPrefix))
      throw refused(entry.name, "a malformed whiteout");
    const inode = parent.children.get(hidden);
    if (inode === undefined) return;
    if (inode.layer < this.#layer) parent.children.delete(hidden);
    else this.#removeLower(inode);
  }

  /** Removes what earlier layers put below a folder; what this layer wrote there stays. */
  #removeLower(folder: Inode): void {
    for (const [name, child] of folder.children) {
      if (child.layer < this.#layer) folder.children.delete(name);
      else this.#removeLower(child);
    }
  }

  /** Walks to a folder as a kernel confined to this root would, symbolic links included. */
  #resolveFolder(parts: readonly string[], entryName: string, missing: "create" | "find"): Inode | undefined {
    const trail: Inode[] = [this.root];
    const pending = parts.toReversed();
    let followed = 0;
    for (let part = pending.pop(); part !== undefined; part = pending.pop()) {
      const here = trail.at(-1) ?? this.root;
      if (part === "..") {
        if (trail.length === 1) throw refused(entryName, "a symbolic link on its path leads out of the image");
        trail.pop();
        continue;
      }
      let next = here.children.get(part);
      if (next === undefined) {
        if (missing === "find") return undefined;
        next = folderInode(undefined, this.#layer);
        here.children.set(part, next);
      }
      if (next.type === "symlink") {
        followed += 1;
        if (followed > imageLimits.symlinksFollowed) throw refused(entryName, "too many symbolic links on its path");
        if (next.target.startsWith("/")) trail.length = 1;
        pending.push(
          ...next.target
            .split("/")
            .filter((step) => step !== "" && step !== ".")
            .toReversed(),
        );
        if (pending.length > imageLimits.depth) throw refused(entryName, "too deep");
        continue;
      }
      if (next.type !== "directory") throw refused(entryName, `lies below ${printable(part)}, which is no folder`);
      if (missing === "create") next.layer = this.#layer;
      trail.push(next);
      if (trail.length > imageLimits.depth) throw refused(entryName, "too deep");
    }
    return trail.at(-1);
  }
}

const whiteoutPrefix = ".wh.";
const opaqueName = ".wh..wh..opq";

export function refused(entryName: string, reason: string): ForgeError {
  return new ForgeError("IMAGE_REFUSED", `the entry ${printable(entryName)} is refused: ${reason}`, {
    details: { entry: printable(entryName), reason },
  });
}

function folderInode(metadata: LayerEntry | undefined, layer: number): Inode {
  return { type: "directory", children: new Map(), target: "", metadata, layer };
}

/** The components of an archive name; `./` and doubled slashes mean nothing. */
function splitName(name: string, entryName: string): string[] {
  if (name === "") throw refused(entryName, "an empty name");
  if (name.includes("\0")) throw refused(entryName, "NUL in a name");
  if (name.includes("\uFFFD")) throw refused(entryName, "a name that is not UTF-8");
  if (name.startsWith("/")) throw refused(entryName, "an absolute name");
  if (Buffer.byteLength(name) > imageLimits.pathBytes) throw refused(entryName, `a path longer than ${imageLimits.pathBytes} bytes`);
  const parts = name.split("/").filter((part) => part !== "" && part !== ".");
  if (parts.includes("..")) throw refused(entryName, "a name with ..");
  if (parts.some((part) => Buffer.byteLength(part) > imageLimits.nameBytes))
    throw refused(entryName, `a name longer than ${imageLimits.nameBytes} bytes`);
  if (parts.length > imageLimits.depth) throw refused(entryName, "too deep");
  return parts;
}

/** Where it points is the guest's matter, confined to its own root; only its form is checked. */
function checkSymlink(entry: LayerEntry): string {
  const target = entry.linkName;
  if (target === "" || target.includes("\0") || target.includes("\uFFFD"))
    throw refused(entry.name, "a symbolic link without a proper target");
  if (Buffer.byteLength(target) > imageLimits.pathBytes) throw refused(entry.name, "a symbolic link with a target too long");
  return target;
}

function checkNumbers(entry: LayerEntry): void {
  for (const [value, limit, what] of [
    [entry.mode, 0o7777, "mode"],
    [entry.uid, imageLimits.identifier, "owner"],
    [entry.gid, imageLimits.identifier, "group"],
    [entry.sizeBytes, imageLimits.uncompressedBytes, "size"],
    [entry.deviceMajor, imageLimits.deviceMajor, "device number"],
    [entry.deviceMinor, imageLimits.deviceMinor, "device number"],
  ] as const) {
    if (!Number.isFinite(value) || value < 0 || value > limit) throw refused(entry.name, `an absurd ${what}: ${value}`);
  }
  if (entry.type !== "file" && entry.sizeBytes !== 0) throw refused(entry.name, `a ${entry.type} with content`);
}

function checkXattrs(entry: LayerEntry): void {
  if (entry.xattrs.size > imageLimits.xattrsPerEntry)
    throw refused(entry.name, `more than ${imageLimits.xattrsPerEntry} extended attributes`);
  let total = 0;
  for (const [name, valueBytes] of entry.xattrs) {
    if (!/^(user|security|trusted|system)\.[^\0\uFFFD]{1,240}$/.test(name))
      throw refused(entry.name, `an extended attribute with the name ${printable(name)}`);
    // The guest lays an overlay over this file system: the image must not speak to that overlay.
    if (/^(trusted|user)\.overlay\./.test(name)) throw refused(entry.name, "an extended attribute of overlayfs");
    total += Buffer.byteLength(name) + valueBytes;
  }
  if (total > imageLimits.xattrBytes) throw refused(entry.name, `more than ${imageLimits.xattrBytes} bytes of extended attributes`);
}

/** Names come from strangers: no control character of theirs reaches a terminal or a log. */
function printable(text: string): string {
  return JSON.stringify(text.length > 200 ? `${text.slice(0, 200)}…` : text);
}
