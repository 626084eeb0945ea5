import { ForgeError } from "../../base/errors.ts";

export interface CpioEntry {
  /** Without a leading slash. */
  readonly path: string;
  /** Type and permission bits as in stat(2). */
  readonly mode: number;
  readonly data?: Uint8Array;
  /** Of a device node. */
  readonly device?: { readonly major: number; readonly minor: number };
}

/** A newc archive (kernel documentation: initramfs buffer format): sorted, owned by root, without times. */
export function writeCpio(entries: readonly CpioEntry[]): Buffer {
  const sorted = [...entries].sort((a, b) => (a.path < b.path ? -1 : 1));
  const parts = sorted.map((entry, index) => encodeEntry(entry, index + 1));
  return padTo(512, Buffer.concat([...parts, encodeEntry({ path: "TRAILER!!!", mode: 0 }, 0)]));
}

function encodeEntry(entry: CpioEntry, inode: number): Buffer {
  const name = Buffer.from(`${entry.path}\0`, "latin1");
  const data = entry.data ?? new Uint8Array();
  if (data.length > 0x7fff_ffff) throw new ForgeError("TOO_LARGE", `${entry.path} is too large for an initramfs`);
  const links = 1;
  const fields = [inode, entry.mode, 0, 0, links, 0, data.length, 0, 0, entry.device?.major ?? 0, entry.device?.minor ?? 0, name.length, 0];
  const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, "0")).join("")}`, "latin1");
  return Buffer.concat([padTo(4, Buffer.concat([header, name])), padTo(4, data)]);
}

function padTo(multiple: number, bytes: Uint8Array): Buffer {
  return Buffer.concat([bytes, Buffer.alloc((multiple - (bytes.length % multiple)) % multiple)]);
}
